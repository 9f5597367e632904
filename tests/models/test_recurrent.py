"""Mean pooling and the GRU: padding and batch order change nothing, order matters where it should, everything learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.models import gru, mean_pool
from ehr_embed.models.gru import GRU
from ehr_embed.models.mean_pool import MeanPool

LENGTHS = (3, 8, 5)
MODELS = [(MeanPool, pooling) for pooling in mean_pool.POOLINGS] + [(GRU, pooling) for pooling in gru.POOLINGS]


def build(kind, **options) -> nn.Module:
    torch.manual_seed(0)
    return kind(**{"embedding_dim": 12, "num_classes": 3, "model_dim": 16, "has_values": True, **options}).eval()


def inputs(lengths=LENGTHS) -> dict[str, Tensor]:
    generator, n, width = torch.Generator().manual_seed(1), len(lengths), max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    found = {"embeddings": torch.randn(n, width, 12, generator=generator), "padding_mask": mask}
    found["values"] = torch.randn(n, width, generator=generator)
    found["values"][:, ::2] = float("nan")
    return found | {name: torch.rand(n, width, generator=generator) * 100 for name in ("gap_days", "elapsed_days")}


@pytest.mark.parametrize(("kind", "pooling"), MODELS)
def test_padding_and_batch_order_change_nothing(kind, pooling):
    model, batch = build(kind, pooling=pooling), inputs()
    together = model(batch)
    for i, n in enumerate(LENGTHS):
        alone = model({name: x[i : i + 1, :n] for name, x in batch.items()})
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)
    turned = model({name: x.flip(0) for name, x in batch.items()})
    torch.testing.assert_close(together.flip(0), turned, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "pooling"), MODELS)
def test_order_matters_to_the_gru_only(kind, pooling):
    model, batch = build(kind, pooling=pooling, **({"times": []} if kind is GRU else {})), inputs((6,))
    shuffled = {name: x[:, [3, 0, 5, 1, 4, 2]] for name, x in batch.items()}
    assert torch.allclose(model(batch), model(shuffled), atol=1e-5) == (kind is MeanPool)


@pytest.mark.parametrize(("kind", "pooling"), MODELS)
def test_gradients_reach_every_parameter_and_no_padding(kind, pooling):
    model, batch = build(kind, pooling=pooling), inputs()
    batch["embeddings"].requires_grad_()
    nn.init.normal_(model.body["input"].values[2].weight if kind is MeanPool else model.body.input.values[2].weight)
    model(batch).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # One score for all events shifts none of their weights.
    assert [name for name in without if not name.endswith("score.bias")] == []
    gradient = batch["embeddings"].grad.abs().sum(-1)
    assert not gradient[~batch["padding_mask"]].any()
    assert pooling == "max" or gradient[batch["padding_mask"]].all()


@pytest.mark.parametrize("kind", [MeanPool, GRU])
def test_a_planted_signal_is_learned(kind):
    """The label says which of two vectors occurs among noise."""
    torch.manual_seed(0)
    vectors, mask = torch.randn(6, 12), torch.ones(128, 8, dtype=torch.bool)
    tokens, labels = torch.randint(2, 6, (128, 8)), torch.arange(128) % 2
    tokens[torch.arange(128), torch.randint(0, 8, (128,))] = labels
    batch = {"rows": vectors, "row_ids": tokens, "padding_mask": mask}
    batch |= {name: torch.zeros(128, 8) for name in ("gap_days", "elapsed_days")}
    model = build(kind, num_classes=2, has_values=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch), labels)
        loss.backward()
        optimizer.step()
    assert (model.eval()(batch).argmax(1) == labels).float().mean() > 0.95


def test_what_the_gru_sees_lies_before():
    model, batch = build(GRU), inputs((6,))
    states = model.body(batch)
    changed = dict(batch, embeddings=batch["embeddings"].clone())
    changed["embeddings"][:, 4:] = 9
    torch.testing.assert_close(model.body(changed)[:, :4], states[:, :4])
    assert not torch.allclose(model.body(changed)[:, 4:], states[:, 4:])


def test_mixed_precision_runs():
    for kind in (MeanPool, GRU):
        model, batch = build(kind).train(), inputs()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(batch).float().square().sum()
        loss.backward()
        assert torch.isfinite(loss)


def test_bad_options_are_refused():
    with pytest.raises(UserError, match=r"unknown model\.pooling 'men'.*did you mean 'mean'"):
        build(MeanPool, pooling="men")
    with pytest.raises(UserError, match=r"unknown model\.pooling 'cls'"):
        build(GRU, pooling="cls")
    with pytest.raises(UserError, match=r"model\.n_layers=0"):
        build(GRU, n_layers=0)
    with pytest.raises(UserError, match=r"model=gru predicts classes"):
        GRU(embedding_dim=4, vocab_size=9)
