"""The code encoder: a code is summarised as a loop would, whatever the batch; every pathway does something and can be left out."""

from __future__ import annotations

import math
from dataclasses import replace

import polars as pl
import pytest
import torch
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.embedding.event_embedding import TRAINABLE, EventEmbedding
from ehr_embed.models.code_encoder import POOLINGS, SUMMARIES, CodeEncoder, CodeInput
from ehr_embed.models.protocol import adapt
from ehr_embed.models.whitening import LEAST, Whitening
from tests.helpers.code_batches import batch, vocabulary

NAN = float("nan")
RECORDS = [
    [(6, 23_000.0, NAN), (2, 5.0, 1.0), (3, 3.0, NAN), (2, 2.0, 3.0), (2, 1.0, NAN), (1, 0.5, NAN)],
    [(6, 15_000.0, NAN), (4, 2.0, -40.0)],
    [(3, 9.0, NAN), (3, 8.0, 0.25), (5, 0.0, 2.0)],
]
WIDTH = 12


def inputs(records=RECORDS, width: int | None = None) -> dict[str, Tensor]:
    """Return the inputs of `batch`, with vectors by token and the ages that births tell."""
    found = batch(records, width)
    rows = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(3))
    ages = torch.tensor([next((days for token, days, _ in record if token == 6), NAN) for record in records])
    return found | {
        "rows": rows,
        "row_ids": found["token_ids"],
        "age_days": torch.where(found["padding_mask"], ages[:, None] - found["days"], NAN),
    }


def build(**options) -> CodeEncoder:
    torch.manual_seed(0)
    sizes = {"embedding_dim": WIDTH, "num_classes": 2, "model_dim": 16, "n_heads": 2, "has_values": True}
    model = CodeEncoder(**{**sizes, **options}).eval()
    model.set_vocabulary(vocabulary())
    model.adapt_to_vectors(inputs()["rows"][2:7])
    return model


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_neighbours_and_the_order_of_records_change_nothing(pooling):
    model = build(pooling=pooling)
    together = model(inputs())
    for row, record in enumerate(RECORDS):
        torch.testing.assert_close(model(inputs([record], 16)), together[row : row + 1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(inputs(RECORDS[::-1])), together.flip(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_record_without_events_has_a_prediction(pooling):
    """Such as one none of whose codes has a match; without the age it has no element of its own."""
    model, given = build(pooling=pooling, age=False), inputs()
    given["padding_mask"][1] = False
    logits = model(given)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(logits[0], model(inputs())[0], atol=1e-5, rtol=1e-4)
    given["padding_mask"][:] = False
    torch.testing.assert_close(model(given), logits[[1]].expand(3, 2), atol=1e-5, rtol=1e-4)


def test_rows_and_vectors_give_the_same():
    model, given = build(), inputs()
    vectors = {"embeddings": given["rows"][given["row_ids"].long()]}
    without = {name: x for name, x in given.items() if name not in ("rows", "row_ids")}
    torch.testing.assert_close(model(without | vectors), model(given), atol=1e-5, rtol=1e-4)


def test_summaries_are_those_of_a_loop():
    code_input = build().body.input
    code_input.join = Recorder()
    x_BSD, is_code = code_input(inputs())
    assert is_code.sum(1).tolist() == [4, 2, 2], "birth, A, B and the unknown event; birth and C; B and D"
    assert not x_BSD[~is_code].any()
    groups = [(row, code) for row, record in enumerate(RECORDS) for code in sorted({t for t, _, _ in record})]
    for (row, token), found in zip(groups, code_input.join.seen[:, -sum(SUMMARIES.values()) :], strict=True):
        events = [event for event in RECORDS[row] if event[0] == token]
        values, days = [v for _, _, v in events if not math.isnan(v)], [d for _, d, _ in events]
        mean = sum(values) / len(values) if values else 0
        sd = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)) if values else 0
        numbers = [values[0], values[-1], mean, min(values), max(values), sd] if values else [0] * 6
        expected = [math.log1p(len(events)), *map(math.asinh, numbers), bool(values)]
        expected += [math.log1p(max(days)), math.log1p(min(days))]
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)


class Recorder(nn.Module):
    """Keeps what it is given; changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x.new_zeros(len(x), 16)


def test_bins_of_a_code_are_one_vector_and_their_numbers_its_values():
    words = vocabulary(bins={"A": [0.5, 1.5]})  # tokens 7, 8, 9
    torch.manual_seed(0)
    code_input = CodeInput(
        embedding_dim=WIDTH, model_dim=16, has_values=False, summaries=["values"], whiten=False, shrinkage=0.0
    )
    code_input.set_vocabulary(words)
    code_input.join = Recorder()
    given = {name: x for name, x in inputs([[(7, 3.0, NAN), (9, 1.0, NAN)]]).items() if name != "values"}
    rows = torch.randn(10, WIDTH)
    x_BSD, is_code = code_input(given | {"rows": rows})
    assert is_code.tolist() == [[True]]
    expected = code_input.project(code_input.norm(rows[[7, 9]])).mean(0)
    torch.testing.assert_close(x_BSD[0, 0], expected, atol=1e-5, rtol=1e-4)
    assert code_input.join.seen[0, -7:-1].sinh().tolist() == pytest.approx([1, 3, 2, 1, 3, 1], rel=1e-5)


@pytest.mark.parametrize("name", [*SUMMARIES, "age", "vectors"])
def test_every_pathway_counts_and_can_be_switched_off(name):
    given, changed = inputs(), inputs()
    if name == "count":
        changed["padding_mask"][2, 0] = False  # the first of two events of B: no first value, no later time
        changed["days"][2, 0] = given["days"][2, 1]
        given["days"][2, 0] = given["days"][2, 1]
    elif name == "values":
        changed["values"][0, 1] = 2.0
    elif name == "times":
        changed["days"][2, :2] -= 1
    elif name == "age":
        changed["age_days"] += 9_000
    else:
        changed["rows"][2] += 1
    options = {"age": False} if name == "age" else {"summaries": [s for s in SUMMARIES if s != name]}
    model = build()
    assert not torch.allclose(model(given), model(changed), atol=1e-6)
    if name != "vectors":
        model = build(**options)
        torch.testing.assert_close(model(given), model(changed))


def test_gradients_reach_every_parameter_and_no_padding():
    model, given = build(), inputs()
    given["embeddings"] = given.pop("rows")[given.pop("row_ids").long()].requires_grad_()
    given["values"].requires_grad_()
    model(given).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []
    gradient = given["embeddings"].grad.abs().sum(-1)
    assert not gradient[~given["padding_mask"]].any()
    assert gradient[given["padding_mask"]].all()
    assert not given["values"].grad.isnan().any()


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_vectors_may_be_learned_beside_the_whitening(trainable):
    model, embedding = build(), EventEmbedding(inputs()["rows"][:7], trainable)
    adapt(model, embedding.table, vocabulary_with_counts())
    white = model.body.input.norm.matrix.clone()
    optimizer = torch.optim.SGD([*model.parameters(), *embedding.parameters()], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs() | {"rows": embedding.table}).square().sum().backward()
        optimizer.step()
    assert torch.equal(model.body.input.norm.matrix, white)
    assert (embedding.learned is None) == (trainable == "frozen")
    assert trainable == "frozen" or not torch.equal(embedding.table, inputs()["rows"][:7])


def vocabulary_with_counts() -> Vocabulary:
    words = vocabulary()
    return replace(words, tokens=words.tokens.with_columns(count=pl.Series([0, 0, *[1] * (len(words) - 2)])))


def test_an_event_before_birth_does_not_hide_the_age():
    model, given = build(), inputs()
    late = given | {"age_days": given["age_days"].clone()}
    late["age_days"][0, 0] = NAN
    torch.testing.assert_close(model(late), model(given))


def test_the_age_may_be_unknown():
    model, given = build(), inputs()
    without = {name: x for name, x in given.items() if name != "age_days"}
    torch.testing.assert_close(model(without)[2], model(given)[2])
    assert not model(given).isnan().any()


def test_whitening_brings_out_small_differences_and_is_kept():
    torch.manual_seed(0)
    shared, small = torch.randn(WIDTH), torch.randn(40, WIDTH) * torch.logspace(0, -2, WIDTH)
    vectors = shared + 0.05 * small
    whitening = Whitening(WIDTH, shrinkage=0.0)
    assert torch.equal(whitening(vectors), vectors), "the identity until it is fitted"
    whitening.fit(vectors)
    white = whitening(vectors)
    torch.testing.assert_close(white.T @ white / 40, torch.eye(WIDTH), atol=1e-3, rtol=0)
    again = Whitening(WIDTH)
    again.load_state_dict(whitening.state_dict())
    assert torch.equal(again(vectors), white)
    shrunk = Whitening(WIDTH, shrinkage=0.1)
    shrunk.fit(vectors)
    spread = shrunk(vectors).std(0)
    assert spread.max() / spread.min() > 5, "components that hardly vary stay small"
    assert shrunk(vectors).square().mean().item() == pytest.approx(1, rel=1e-3)
    lifted = Whitening(WIDTH, shrinkage=0.5, lifts=True)
    lifted.fit(vectors)
    variance = torch.linalg.svdvals(vectors - vectors.mean(0)) ** 2
    raised = variance * (variance + 0.5 * variance.mean()) / (variance + LEAST * variance.mean())
    torch.testing.assert_close(
        lifted(vectors).var(0) / lifted(vectors).var(0)[0], raised / raised[0], atol=1e-3, rtol=1e-3
    )
    assert lifted(vectors).square().mean().item() == pytest.approx(1, rel=1e-3)
    assert lifted.matrix.norm(dim=0).max() / lifted.matrix.norm(dim=0).min() < (0.5 / LEAST + 1) ** 0.5, (
        "no noise is blown up"
    )


def test_whitening_of_few_vectors_drops_what_they_do_not_span():
    vectors = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    whitening = Whitening(WIDTH)
    whitening.fit(vectors)
    assert whitening.matrix.any(0).sum() == 3, "as many directions as differences"
    one = Whitening(WIDTH)
    one.fit(vectors[:1])
    assert torch.equal(one.matrix, torch.eye(WIDTH))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"summaries": ["counts"]}, r"model\.summaries.*count, times, values"),
        ({"pooling": "cls"}, r"model\.pooling.*attention, max, mean"),
        ({"n_heads": 3}, r"model\.n_heads=3"),
        ({"n_layers": 0}, r"model\.n_layers=0"),
        ({"shrinkage": -1.0}, r"model\.shrinkage=-1"),
        ({"num_classes": None, "vocab_size": 9}, "code_encoder predicts classes"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)


def test_vectors_without_tokens_and_of_another_width_are_refused():
    model, given = build(), inputs()
    with pytest.raises(UserError, match="Give texts or a MEDS dataset to predict on"):
        model({name: x for name, x in given.items() if name != "token_ids"})
    with pytest.raises(UserError, match=f"built for {WIDTH}"):
        model(given | {"rows": torch.zeros(8, WIDTH + 1)})


def test_hidden_events_stay_hidden_on_a_gpu(monkeypatch):
    """A task may hide events of a batch, whose places the batch still tells."""
    model, given = build(), inputs()
    given["places"] = given["padding_mask"].flatten().nonzero().squeeze(1)
    given["padding_mask"] = given["padding_mask"].clone()
    given["padding_mask"][0, 1], given["padding_mask"][2, 2] = False, False
    expected = model(given)
    monkeypatch.setattr("ehr_embed.models.code_encoder.reads_freely", lambda device: False)
    torch.testing.assert_close(model(given), expected, atol=1e-5, rtol=1e-4)


def test_explanations_on_a_gpu_have_gradients_of_the_values(monkeypatch):
    """Without counting, events without a value are in the computation too, and give nothing to the gradient."""
    model, gradients = build(), []
    for counts in (True, False):
        monkeypatch.setattr("ehr_embed.models.code_encoder.reads_freely", lambda device, counts=counts: counts)
        given = inputs()
        given["values"] = given["values"].clone().requires_grad_()
        model(given)[:, 1].sum().backward()
        gradients.append(given["values"].grad.nan_to_num(nan=77.0))
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)
