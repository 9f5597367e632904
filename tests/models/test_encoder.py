"""The encoder: padding and batch order change nothing, positions and pooling do what they say, bad sizes are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.models.decoder import Decoder
from ehr_embed.models.encoder import POSITIONS, Encoder
from ehr_embed.models.gru import GRU
from ehr_embed.models.heads import POOLINGS
from ehr_embed.models.mean_pool import MeanPool
from tests.helpers.refusals import refused

TIMES = ("days", "gap_days", "elapsed_days", "age_days")


def encoder(**options) -> Encoder:
    torch.manual_seed(0)
    defaults = {"embedding_dim": 12, "num_classes": 3, "model_dim": 16, "n_heads": 4, "n_layers": 2, "max_length": 32}
    return Encoder(**{**defaults, **options}).eval()


def inputs(lengths: list[int], width: int, *, values: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    found = {
        "embeddings": torch.randn(len(lengths), width, 12, generator=generator),
        "padding_mask": mask,
    }
    found |= {name: torch.rand(len(lengths), width, generator=generator) * 100 for name in TIMES}
    if values:
        found["values"] = torch.randn(len(lengths), width, generator=generator)
    return found


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_and_batch_order_change_nothing(positions, pooling):
    model = encoder(positions=positions, pooling=pooling)
    batch = inputs([3, 8, 5], 8)
    together = model(batch)
    for i, n in enumerate((3, 8, 5)):
        alone = model({name: x[i : i + 1, :n] for name, x in batch.items()})
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)
    turned = model({name: x.flip(0) for name, x in batch.items()})
    torch.testing.assert_close(together.flip(0), turned, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["sinusoidal", "rope", "time", "none"])
def test_order_matters_only_with_positions(positions):
    model, batch = encoder(positions=positions), inputs([6], 6)
    shuffled = dict(batch, embeddings=batch["embeddings"][:, [3, 0, 5, 1, 4, 2]])
    same = torch.allclose(model(batch), model(shuffled), atol=1e-5)
    assert same == (positions == "none")


def test_rope_time_sees_time_between_events_and_nothing_else_of_it():
    model, batch = encoder(positions="rope_time"), inputs([6], 6)
    later = dict(batch, elapsed_days=batch["elapsed_days"] + 30)
    torch.testing.assert_close(model(batch), model(later), atol=1e-4, rtol=1e-4)
    slower = dict(batch, elapsed_days=batch["elapsed_days"] * 2)
    assert not torch.allclose(model(batch), model(slower), atol=1e-4)


@pytest.mark.parametrize("kind", ["gap", "elapsed", "age"])
def test_each_time_is_a_pathway_of_its_own(kind):
    model, batch = encoder(times=[kind]), inputs([6], 6)
    others = {f"{other}_days": torch.zeros(1, 6) for other in ("gap", "elapsed", "age") if other != kind}
    torch.testing.assert_close(model(batch), model(batch | others))
    assert not torch.allclose(model(batch), model(batch | {f"{kind}_days": batch[f"{kind}_days"] + 1}), atol=1e-5)
    unknown = model(batch | {f"{kind}_days": torch.full((1, 6), float("nan"))})
    assert unknown.isfinite().all(), "an unknown age is no age"
    with pytest.raises(UserError, match=r"unknown model\.times 'agee'.*did you mean 'age'"):
        encoder(times=["agee"])


@pytest.mark.parametrize("how", ["film", "add", "none"])
def test_values_enter_as_asked(how):
    model, batch = encoder(has_values=True, values=how), inputs([6], 6, values=True)
    if how == "none":
        assert model.body.input.values is None
        return
    assert model.body.input.values is not None
    torch.nn.init.normal_(model.body.input.values[2].weight)
    assert not torch.allclose(model(batch), model(batch | {"values": batch["values"] + 1}))


def test_the_embeddings_reach_the_logits():
    model, batch = encoder(), inputs([6], 6)
    constant = dict(batch, embeddings=torch.ones_like(batch["embeddings"]))
    assert not torch.allclose(model(batch), model(constant), atol=1e-3)


def test_both_faces_give_the_same_logits():
    model, batch = encoder(), inputs([3, 6], 6)
    rows = torch.randn(9, 12)
    row_ids = torch.randint(0, 9, (2, 6))
    rest = {name: x for name, x in batch.items() if name != "embeddings"}
    by_rows = model({**rest, "rows": rows, "row_ids": row_ids})
    torch.testing.assert_close(by_rows, model({**rest, "embeddings": rows[row_ids]}))


def test_values_scale_and_shift_their_event_only():
    model, batch = encoder(has_values=True), inputs([6], 6, values=True)
    before = model(batch)
    assert model.body.input.values is not None
    last = model.body.input.values[2]
    assert isinstance(last, torch.nn.Linear)
    torch.nn.init.normal_(last.weight)
    assert not torch.allclose(before, model(batch))
    nothing = dict(batch, values=torch.full_like(batch["values"], float("nan")))
    torch.testing.assert_close(model(nothing), before)
    torch.testing.assert_close(model({name: x for name, x in batch.items() if name != "values"}), before)


def test_bad_sizes_are_refused():
    with pytest.raises(UserError, match=r"model\.n_heads=5 .*model\.model_dim=16.*1, 2, 4, 8, 16"):
        encoder(n_heads=5)
    with pytest.raises(UserError, match=r"unknown model\.pooling 'men'.*did you mean 'mean'"):
        encoder(pooling="men")
    with pytest.raises(UserError, match=r"unknown model\.positions"):
        encoder(positions="learned")
    with pytest.raises(UserError, match=r"rope .*even"):
        encoder(positions="rope", n_heads=16)
    with refused("width 5", "12"):
        encoder()({"embeddings": torch.zeros(1, 2, 5), "padding_mask": torch.ones(1, 2, dtype=torch.bool)})
    with refused("40 events", "model.max_length", "32"):
        encoder()(inputs([40], 40))


@pytest.mark.parametrize("kind", [Encoder, Decoder, GRU, MeanPool])
def test_whitened_vectors_are_told_apart_from_the_start(kind):
    """Texts of one domain share most of their vector: behind a layer norm records hardly differ, whitened they do."""
    sizes = {"n_heads": 2} if kind in (Encoder, Decoder) else {}
    shared, own = torch.randn(12, generator=torch.Generator().manual_seed(2)), inputs([1] * 40, 1)
    vectors = shared + 0.02 * own["embeddings"][:, 0]
    given = own | {"embeddings": vectors[:, None]} | {name: torch.ones(40, 1) for name in TIMES}

    def spread(**options) -> tuple[float, torch.nn.Module]:
        torch.manual_seed(0)
        model = kind(embedding_dim=12, num_classes=2, model_dim=16, **sizes, **options).eval()
        model.adapt_to_vectors(vectors)
        return float(model(given).detach().std(0).mean()), model

    plain, _ = spread()
    white, model = spread(whiten=True)
    assert white > 5 * plain
    as_rows = given | {"rows": vectors, "row_ids": torch.arange(40)[:, None]}
    del as_rows["embeddings"]
    torch.testing.assert_close(model(as_rows), model(given))
    _, again = spread(whiten=True)
    again.adapt_to_vectors(torch.randn(40, 12))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(given), model(given))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (model(as_rows).float() - model(given).float()).abs().max() < 0.1
