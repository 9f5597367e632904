"""code_encoder_ranks: neighbours change nothing, every pathway counts, and known, new and matched codes are read as they should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.models.code_encoder import POOLINGS
from ehr_embed.models.code_encoder_ranks import CodeEncoderRanks
from ehr_embed.models.protocol import AlignsTwins, PoolsCodes, adapt, check_vectors
from tests.helpers.code_batches import vocabulary
from tests.helpers.host_waits import count_nothing
from tests.models.test_code_tab import NAN, RECORDS, WIDTH, counted, inputs, train_records


def build(*, known: int = 7, **options) -> CodeEncoderRanks:
    torch.manual_seed(0)
    sizes = {"embedding_dim": WIDTH, "num_classes": 2, "model_dim": 16, "n_heads": 2, "has_values": True}
    model = CodeEncoderRanks(**{**sizes, **options}).eval()
    words = counted(vocabulary(), known)
    model.set_vocabulary(words)
    adapt(model, inputs()["rows"][:7], words)
    model.adapt_to_records([inputs(train_records())])
    return model


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_neighbours_and_the_order_of_records_change_nothing(pooling):
    model = build(pooling=pooling)
    together = model(inputs())
    assert together.shape == (3, 2)
    for row, record in enumerate(RECORDS):
        assert same(model(inputs([record], 16)), together[row : row + 1])
    assert same(model(inputs(RECORDS[::-1])), together.flip(0))


def test_a_code_is_one_element_and_events_without_a_code_are_none():
    read = build().body.input
    x_BSD, is_code_BS = read(inputs())
    assert is_code_BS.sum(1).tolist() == [3, 2, 2], "birth, A and B; birth and C; B and D"
    assert not x_BSD[~is_code_BS].any()


@pytest.mark.parametrize("pathway", ["count", "value", "hours", "window", "text", "age"])
def test_every_pathway_counts(pathway):
    model, given = build(), inputs([[(6, 20_000.0, NAN), (2, 1.9, 0.3), (2, 1.2, 0.1), (2, 0.2, 0.3)]])
    changed = {name: x.clone() for name, x in given.items()}
    if pathway == "count":
        changed["padding_mask"][0, 2] = False  # between two others of its code
    elif pathway == "value":
        changed["values"][0, 2] = 0.2
    elif pathway == "hours":
        changed["days"][0, 3] = 0.01
    elif pathway == "window":  # neither the first nor the last event of its code
        changed["days"][0, 2] = 0.6
    elif pathway == "text":  # copied from train's, which the events' own do not replace
        model.body.input.vectors[0] += 1.0
    else:
        changed["age_days"] += 9_000
    before = build()(given)
    assert not torch.allclose(model(changed), before, atol=1e-6)


def test_numbers_count_by_their_rank_alone():
    """Twice as large numbers, in train as in the record, give the same prediction."""
    train, given = inputs(train_records()), inputs(RECORDS)
    model = build()
    before = model(given)
    for batch in (train, given):
        batch["values"] = 2 * batch["values"]
    model.adapt_to_records([train])
    assert same(model(given), before)


def test_the_text_of_a_new_code_is_that_of_its_events():
    given, changed = inputs(), inputs()
    changed["rows"][4] += 1  # of code C, which train never had
    assert not torch.allclose(build(known=4)(given), build(known=4)(changed), atol=1e-6)
    assert same(build()(given), build()(changed)), "a known code has the vector that train gave it"
    vectors = {"embeddings": given["rows"][given["row_ids"].long()]}
    without = {name: x for name, x in given.items() if name not in ("rows", "row_ids")}
    assert same(build(known=4)(without | vectors), build(known=4)(given))


def test_codes_of_another_dataset_are_read_as_known_ones():
    """With the same records under other codes, and ranks of their own, nothing changes; unmatched codes are left out."""
    model = build()
    assert isinstance(model, AlignsTwins)
    assert isinstance(model, PoolsCodes)
    records = train_records()
    before = model(inputs(records))
    model.set_vocabulary(vocabulary(codes=("W", "X", "Y", "Z", "MEDS_BIRTH")))
    matches = {new: (old, 1.0) for new, old in zip("WXYZ", "ABCD", strict=True)} | {"MEDS_BIRTH": ("MEDS_BIRTH", 1.0)}
    model.align(matches)
    model.adapt_to_records([inputs(records)])
    assert torch.allclose(model(inputs(records)), before, atol=0.05)
    model.align({new: match for new, match in matches.items() if new != "W"})
    model.adapt_to_records([inputs(records)])
    assert model.body.input(inputs(RECORDS))[1].sum(1).tolist() == [2, 2, 2]


def test_without_counting_as_on_a_gpu_logits_and_gradients_are_the_same(monkeypatch):
    found = []
    for counts in (True, False):
        with monkeypatch.context() as patch:
            count_nothing(patch, counts=counts)
            model = build(known=5)
            logits = model(inputs())
            logits.square().sum().backward()
            found.append((logits.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-4, rtol=1e-3)
    assert all(gradient.abs().sum() for gradient in found[0][1]), "every parameter counts"


def test_saved_weights_bring_codes_vectors_and_quantiles():
    model, other = (
        build(),
        CodeEncoderRanks(embedding_dim=WIDTH, num_classes=2, model_dim=16, n_heads=2, has_values=True),
    )
    other.set_vocabulary(counted(vocabulary()))
    other.load_state_dict(model.state_dict())
    assert same(other.eval()(inputs()), model(inputs()))


def test_what_it_cannot_do_is_refused():
    with pytest.raises(UserError, match="model=code_encoder_ranks"):
        build(num_classes=None, vocab_size=9)
    with pytest.raises(UserError, match="windows_hours"):
        build(windows_hours=[24, 12])
    with pytest.raises(UserError, match=r"embedder\.trainable"):
        check_vectors(build(), "offset")
