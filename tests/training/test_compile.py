"""Compiled blocks are compiled once for batches of all shapes: a step must not wait for the compiler again and again.

The graphs are traced and counted, and run as they are; the compiler proper, which takes minutes, is torch's to test.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ehr_embed.models import heads, packing
from ehr_embed.models.blocks import Dropout
from ehr_embed.models.decoder import Decoder
from ehr_embed.models.encoder import Encoder
from ehr_embed.models.packing import attend_one_by_one
from ehr_embed.training.set_up import compile_blocks, compile_head
from ehr_embed.training.settings import TrainerSettings
from tests.helpers.refusals import refused

SHAPES = ((4, 24), (5, 32), (7, 40), (1, 48), (9, 56), (3, 8))
"""Rows and places of batches."""


@torch.library.custom_op("ehr_embed_tests::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Attention of packed sequences as one operation whose inside is not traced, as torch's kernel for GPUs is."""
    found = packing.Packing(torch.arange(len(q)), starts, longest, len(q), is_causal=False)
    return attend_one_by_one(q, k, v, found).contiguous()


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, starts = ctx.saved_tensors
    found = packing.Packing(torch.arange(len(q)), starts, ctx.longest, len(q), is_causal=False)
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        gradients = torch.autograd.grad(attend_one_by_one(*inputs, found), inputs, gradient)
    return (*gradients, None, None)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.longest = inputs[4]


attend.register_autograd(_backward, setup_context=_keep)


@pytest.fixture
def counter(monkeypatch) -> Iterator[CompileCounterWithBackend]:
    """Counts the graphs; the kernel of a GPU is replaced by an operation of the same kind."""
    torch._dynamo.reset()
    counted, compiled = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **own: compiled(function, **{"backend": counted, **own}))
    monkeypatch.setattr(packing, "attend_at_once", lambda q, k, v, own: attend(q, k, v, own.starts, own.longest))
    yield counted
    torch._dynamo.reset()


def batch(n_rows: int, n_places: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n_places)
    lengths = torch.randint(1, n_places + 1, (n_rows,), generator=generator)
    mask = torch.arange(n_places) < lengths[:, None]
    return {
        "embeddings": torch.randn(n_rows, n_places, 12, generator=generator),
        "padding_mask": mask,
        "days": torch.zeros(n_rows, n_places),
        "age_days": torch.zeros(n_rows, n_places),
        "places": mask.flatten().nonzero().squeeze(1),
        "sequence_starts": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int(),
    }


def model(*, packs: bool) -> Encoder:
    torch.manual_seed(0)
    found = Encoder(embedding_dim=12, num_classes=2, model_dim=16, n_heads=2, n_layers=2, max_length=64).train()
    for module in found.modules():
        if isinstance(module, Dropout):
            module.n_dropped = 0
    found.body.packs = packs
    return found


def results(found: Encoder, after_each: Callable[[], None] = lambda: None) -> list[list[Tensor]]:
    """The loss, and the gradients of the first block, for a batch of each shape."""
    all_results = []
    for shape in SHAPES:
        found.zero_grad()
        loss = found(batch(*shape)).square().mean()
        loss.backward()
        gradients = [p.grad.clone() for p in found.body.blocks[0].parameters() if p.grad is not None]
        all_results.append([loss.detach(), *gradients])
        after_each()
    return all_results


@pytest.mark.parametrize(
    ("packs", "most"), [(True, 1), pytest.param(False, 2, marks=pytest.mark.slow)], ids=["packed", "padded"]
)
def test_batches_of_all_shapes_share_the_compiled_blocks(packs, most, counter, monkeypatch):
    """Without padding one graph serves all numbers of events and of sequences; with it, a batch of one row has another."""
    monkeypatch.setattr("ehr_embed.models.body.kernel_takes", lambda *_: packs)
    expected = results(model(packs=packs))
    compiled, n_graphs = model(packs=packs), list[int]()
    compile_blocks(compiled)
    found = results(compiled, lambda: n_graphs.append(counter.frame_count))
    for own, plain in zip(found, expected, strict=True):
        for x, y in zip(own, plain, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert 0 < n_graphs[-1] <= most * n_graphs[0], n_graphs


def test_compiled_blocks_keep_the_padding_where_there_is_no_kernel(counter):
    """One sequence after the other would be another graph for each number of sequences."""
    found, inputs = model(packs=False), batch(9, 56)
    found.body.packs = None
    assert found.body.packing(inputs, is_causal=False) is not None, "half of the batch is padding"
    compile_blocks(found)
    assert found.body.packing(inputs, is_causal=False) is None


def test_the_scores_of_a_vocabulary_are_compiled_for_all_sizes_and_have_the_same_gradients(counter, monkeypatch):
    """Chunks of all sizes, the smaller last one included, share three graphs; evaluation stays as it is."""
    monkeypatch.setattr(heads, "LOGITS_AT_ONCE", 40 * 8)  # eight events per chunk
    torch.manual_seed(0)
    head = heads.EventHead(kind="linear", model_dim=10, embedding_dim=6, vocab_size=40, has_values=False).train()
    table, found, n_graphs = torch.randn(40, 6), [], []
    for is_compiled in (False, True):
        if is_compiled:
            head.compile_scores()
        for n_events in (20, 30, 7, 17):
            generator = torch.Generator().manual_seed(n_events)
            x = torch.randn(1, n_events, 10, generator=generator, requires_grad=True)
            targets = torch.randint(2, 40, (1, n_events), generator=generator)
            head.zero_grad()
            scores = head(x, {"table": table, "targets": targets, "target_gap_days": torch.ones(1, n_events)})
            scores.nll.square().sum().backward()
            gradients = [p.grad.clone() for p in (x, *head.tokens.parameters()) if p.grad is not None]
            found.append([scores.nll.detach(), *gradients])
            n_graphs.append(counter.frame_count)
    for plain, compiled in zip(found[:4], found[4:], strict=True):
        assert len(plain) == 4
        for x, y in zip(plain, compiled, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert n_graphs[:4] == [0] * 4
    assert 0 < n_graphs[-1] <= 3, "one of the first chunk, one of those after it, and one of a single event left over"
    copied = copy.deepcopy(head)
    assert torch.equal(copied.tokens.weight, head.tokens.weight)
    head.eval()(torch.zeros(1, 17, 10), {"table": table, "targets": targets, "target_gap_days": torch.ones(1, 17)})
    assert counter.frame_count == n_graphs[-1]


def test_the_head_alone_can_be_compiled_where_there_is_one(counter):
    sizes = {"embedding_dim": 6, "model_dim": 8, "n_heads": 2, "n_layers": 1, "max_length": 16}
    decoder = Decoder(**sizes, vocab_size=40)
    compile_head(decoder)
    head = decoder.head
    assert isinstance(head, heads.EventHead)
    assert head._compiled is not None
    assert all(block._compiled_call_impl is None for block in decoder.body.blocks)
    with refused("Encoder", "trainer.compile=false"):
        compile_head(Encoder(**sizes, num_classes=2))
    with refused("trainer.compile=body", "head"):
        TrainerSettings(compile="body")
