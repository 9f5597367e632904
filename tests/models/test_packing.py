"""Without padding everything is as with it: outputs, gradients, whatever the padding holds; and nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehr_embed.models import decoder as decoders
from ehr_embed.models import encoder as encoders
from ehr_embed.models import packing
from ehr_embed.models.blocks import rotate
from ehr_embed.models.body import Body
from ehr_embed.models.decoder import Decoder
from ehr_embed.models.encoder import Encoder
from ehr_embed.models.heads import POOLINGS, EventScores
from ehr_embed.models.packing import Packing, attend_at_once, attend_one_by_one, kernel_takes
from tests.helpers.refusals import refused

LENGTHS = (3, 8, 5, 1)
WIDTH, VOCAB, E = 8, 30, 12
TIMES = ("days", "gap_days", "elapsed_days", "age_days")
SIZES = {"embedding_dim": E, "model_dim": 32, "n_heads": 4, "n_layers": 2, "max_length": 32, "dropout": 0.0}
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def rows(lengths=LENGTHS, width: int = WIDTH) -> dict[str, Tensor]:
    """A batch of one sequence a row, with what packing needs."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    found = {"embeddings": torch.randn(len(lengths), width, E, generator=generator), "padding_mask": mask}
    found |= {name: torch.rand(len(lengths), width, generator=generator) * 100 for name in TIMES}
    found["values"] = torch.randn(len(lengths), width, generator=generator)
    return found | where(mask, lengths)


def where(mask: Tensor, lengths) -> dict[str, Tensor]:
    starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    return {"places": mask.flatten().nonzero().squeeze(1), "sequence_starts": starts}


def packed_rows() -> dict[str, Tensor]:
    """Two rows of 3 + 1 + 2 and 4 + 3 events, with a next event for each but the last of a sequence."""
    lengths = [3, 1, 2, 4, 3]
    batch = rows((6, 7))
    segments = torch.zeros(2, WIDTH, dtype=torch.int32)
    segments[0, :6] = torch.tensor([1, 1, 1, 2, 3, 3])
    segments[1, :7] = torch.tensor([4, 4, 4, 4, 5, 5, 5])
    index = torch.zeros(2, WIDTH, dtype=torch.int64)
    index[0, :6] = torch.tensor([0, 1, 2, 0, 0, 1])
    index[1, :7] = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    generator = torch.Generator().manual_seed(2)
    follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets = torch.randint(2, VOCAB, (2, WIDTH), generator=generator) * F.pad(follows, (0, 1))
    batch |= {"segments": segments, "event_index": index, "targets": targets}
    batch |= {"target_gap_days": batch["gap_days"], "target_values": batch["values"]}
    batch["table"] = torch.randn(VOCAB, E, generator=generator)
    return batch | where(batch["padding_mask"], lengths)


def build(kind: type[nn.Module], **options) -> nn.Module:
    torch.manual_seed(0)
    model = kind(**{**SIZES, "has_values": True, "times": ["gap", "elapsed", "age"], **options})
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "values" in name:  # they start at zero, which would hide them
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def results(model: nn.Module, batch: dict[str, Tensor], *, packs: bool) -> dict[str, Tensor]:
    """Outputs and the gradient of every parameter."""
    model.body.packs = packs
    model.zero_grad()
    out = model(batch)
    if isinstance(out, EventScores):
        outputs = {"nll": out.nll, "time_nll": out.time_nll, "value_nll": out.value_nll}
    else:
        outputs = {"logits": out}
    weights = torch.Generator().manual_seed(3)
    sum((x.float() * torch.randn(x.shape, generator=weights).to(x.device)).sum() for x in outputs.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in outputs.items()} | gradients


def used(monkeypatch) -> list[Packing]:
    """The packings that attention is computed with from here on."""
    found: list[Packing] = []

    def spy(self: Packing, *arguments: Tensor) -> Tensor:
        found.append(self)
        return attend_one_by_one(*arguments, self)

    monkeypatch.setattr(Packing, "attend", spy)
    return found


def check(model: nn.Module, batch: dict[str, Tensor], monkeypatch) -> None:
    """Packed and padded are the same, and so are the packed ones whatever the padding holds."""
    padded = results(model, batch, packs=False)
    packings = used(monkeypatch)
    packed = results(model, batch, packs=True)
    assert len(packings) == SIZES["n_layers"], "every layer's attention was packed"
    assert packed.keys() == padded.keys()
    assert sum(x.abs().sum() > 0 for x in padded.values()) > 20, "gradients were compared, not zeros"
    for name, expected in padded.items():
        torch.testing.assert_close(packed[name], expected, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    is_padding = ~batch["padding_mask"]
    garbage = {
        name: torch.where(is_padding.view(*is_padding.shape, *(1,) * (x.ndim - 2)), torch.full_like(x, 1e3), x)
        for name, x in batch.items()
        if x.shape[:2] == is_padding.shape and x.is_floating_point()
    }
    assert garbage
    for name, other in results(model, batch | garbage, packs=True).items():
        assert torch.equal(other, packed[name]), f"{name} depends on the padding"


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("positions", encoders.POSITIONS)
def test_an_encoder_packed_is_the_encoder(positions, pooling, monkeypatch):
    check(build(Encoder, num_classes=3, positions=positions, pooling=pooling), rows(), monkeypatch)


@pytest.mark.parametrize("pooling", decoders.POOLINGS)
@pytest.mark.parametrize("positions", decoders.POSITIONS)
def test_a_decoder_packed_is_the_decoder(positions, pooling, monkeypatch):
    check(build(Decoder, num_classes=3, positions=positions, pooling=pooling), rows(), monkeypatch)


@pytest.mark.parametrize("positions", decoders.POSITIONS)
def test_each_sequence_of_a_packed_row_is_by_itself(positions, monkeypatch):
    check(build(Decoder, vocab_size=VOCAB, positions=positions), packed_rows(), monkeypatch)


def test_masked_events_are_scored_alike(monkeypatch):
    one_a_row = {name: x for name, x in packed_rows().items() if name not in ("segments", "event_index")}
    check(build(Encoder, vocab_size=VOCAB), one_a_row | where(one_a_row["padding_mask"], (6, 7)), monkeypatch)


@pytest.mark.parametrize(("kind", "pooling"), [(Encoder, "mean"), (Encoder, "cls"), (Decoder, "last")])
def test_in_bfloat16_it_is_as_close_to_float32_as_with_padding(kind, pooling):
    model, batch = build(kind, num_classes=3, positions="rope", pooling=pooling), rows()
    exact = results(model, batch, packs=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        padded, packed = (results(model, batch, packs=packs) for packs in (False, True))

    def error(found: dict[str, Tensor]) -> Tensor:
        return torch.stack([(found[name] - x).norm() / (x.norm() + 1e-3) for name, x in exact.items()]).mean()

    assert error(padded) > 1e-4, "it was computed in bfloat16"
    assert error(packed) < 1.5 * error(padded)
    assert packed["logits"].dtype == padded["logits"].dtype


@pytest.mark.parametrize("pooling", ["max", "cls"])
def test_rows_without_padding_and_rows_of_one_event(pooling, monkeypatch):
    model = build(Encoder, num_classes=3, pooling=pooling)
    for lengths in ((8, 8), (1, 1, 1), (8,)):
        batch = rows(lengths)
        padded = results(model, batch, packs=False)
        with monkeypatch.context() as patch:
            packings = used(patch)
            packed = results(model, batch, packs=True)
        assert packings
        torch.testing.assert_close(packed, padded, atol=2e-5, rtol=1e-4)


def test_the_padding_of_hidden_states_is_zero():
    model, batch = build(Decoder, num_classes=3), rows()
    model.body.packs = True
    assert not model.hidden(batch)[~batch["padding_mask"]].any()


def test_packing_by_hand():
    given = Packing(torch.tensor([0, 1, 3, 6, 7, 8]), torch.tensor([0, 2, 3, 6]).int(), 3, 9, True)
    x = torch.arange(9).view(3, 3)
    assert given.pack(x).tolist() == [0, 1, 3, 6, 7, 8]
    unpacked = given.unpack(given.pack(x).float()[:, None] + 1, 3, 3)
    assert unpacked.squeeze(-1).tolist() == [[1, 2, 0], [4, 0, 0], [7, 8, 9]]
    first = given.with_first(3, 3)
    assert first.places.tolist() == [0, 1, 2, 4, 5, 8, 9, 10, 11]
    assert first.starts.tolist() == [0, 3, 5, 9]
    assert first.starts.dtype == torch.int32
    assert (first.longest, first.is_causal) == (4, True)


def test_one_by_one_takes_empty_sequences():
    q = torch.randn(3, 2, 8)
    empty_between = Packing(torch.arange(3), torch.tensor([0, 1, 1, 3]).int(), 2, 3, False)
    without = replace(empty_between, starts=torch.tensor([0, 1, 3]).int())
    assert torch.equal(attend_one_by_one(q, q, q, empty_between), attend_one_by_one(q, q, q, without))


def test_packed_queries_are_rotated_like_padded_ones():
    x, position = torch.randn(1, 5, 2, 8), torch.rand(1, 5) * 9
    padded = rotate(x.transpose(1, 2), position).transpose(1, 2)[0]
    torch.testing.assert_close(rotate(x[0], position[0]), padded, atol=0, rtol=0)


def test_a_cpu_packs_where_much_is_padding_and_packing_pays(monkeypatch):
    packings = used(monkeypatch)
    model = build(Encoder, num_classes=3)
    assert isinstance(model.body, Body)

    def packs(batch: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> bool:
        packings.clear()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(batch)
        return bool(packings)

    much, little = rows(), rows(lengths=(8, 8, 8, 7))
    assert packs(much)
    assert not packs(little), "less than a tenth is padding"
    assert not packs(much, torch.bfloat16), "short sequences share products"
    monkeypatch.setattr("ehr_embed.models.packing.LONG", 8)
    assert packs(much, torch.bfloat16)
    assert not packs({name: x for name, x in much.items() if name not in ("places", "sequence_starts")}), "no places"
    block = model.body.blocks[0]
    monkeypatch.setattr(block, "_compiled_call_impl", block._call_impl)
    assert not packs(much), "compiled"
    monkeypatch.setattr(block, "_compiled_call_impl", None)
    model.body.packs = False
    assert not packs(much), "asked otherwise"


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_on_a_cpu_the_same_entries_are_dropped_with_and_without_padding(pooling):
    batch = rows()
    model = build(Encoder, num_classes=3, dropout=0.3, pooling=pooling).train()
    found = []
    for packs in (False, True):
        torch.manual_seed(5)
        model.body.packs = packs
        model.zero_grad()
        logits = model(batch)
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for padded, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)
    torch.manual_seed(6)
    assert not torch.allclose(model(batch).detach(), found[0][0], atol=1e-3), "entries are dropped"


def test_a_cache_is_not_packed(monkeypatch):
    packings, batch = used(monkeypatch), rows()
    model = build(Decoder, num_classes=3)
    model.body.packs = True
    with torch.no_grad():
        model.hidden(batch, model.new_cache(1))
    assert not packings


def test_where_the_kernel_is_used(monkeypatch):
    cuda = torch.device("cuda")
    assert not kernel_takes(torch.device("cpu"), torch.bfloat16, 32)
    monkeypatch.setattr(packing, "has_kernel", lambda device: device.type == "cuda")
    monkeypatch.setattr(packing, "is_right", lambda *place: True)
    for dtype in (torch.bfloat16, torch.float16):
        assert all(kernel_takes(cuda, dtype, width) for width in (8, 32, 64, 128, 192))
        assert not any(kernel_takes(cuda, dtype, width) for width in (4, 12, 100, 200, 256))
    assert not kernel_takes(cuda, torch.float32, 32)
    assert not kernel_takes(torch.device("cpu"), torch.bfloat16, 32)


def without_kernel(q: Tensor, k: Tensor, v: Tensor, given: Packing) -> Tensor:
    raise RuntimeError("no kernel image is available for execution on the device\nCompile with ...")


def across_sequences(q: Tensor, k: Tensor, v: Tensor, given: Packing) -> Tensor:
    return attend_one_by_one(q, k, v, replace(given, starts=given.starts[[0, -1]]))


def with_wrong_gradient(q: Tensor, k: Tensor, v: Tensor, given: Packing) -> Tensor:
    return attend_one_by_one(q, k.detach() + 0 * k, v, given)


@pytest.mark.parametrize(
    ("kernel", "word"),
    [
        (attend_one_by_one, None),
        (without_kernel, "no kernel image"),
        (across_sequences, "not close"),
        (with_wrong_gradient, "not close"),
    ],
)
def test_a_kernel_that_fails_or_is_wrong_is_not_used(kernel, word, monkeypatch, caplog):
    """It cannot be run here, so that its first use on a GPU is to prove it."""
    monkeypatch.setattr(packing, "attend_at_once", kernel)
    with torch.inference_mode():
        found = packing.is_right.__wrapped__(torch.device("cpu"), torch.bfloat16, 32)
    assert found == (word is None)
    assert (word or "") in caplog.text
    assert bool(caplog.text) == (word is not None)


def test_places_of_other_rows_are_refused():
    batch = rows()
    repeated = {name: x.repeat(2, *(1,) * (x.ndim - 1)) if len(x) == len(LENGTHS) else x for name, x in batch.items()}
    for model in (build(Encoder, num_classes=3), build(Decoder, num_classes=3)):
        with refused("sequence_starts", "4 sequences", "8 rows"):
            model(repeated)
    with refused("5 sequences", "2 rows"):
        build(Encoder, vocab_size=VOCAB)(packed_rows())


@pytest.mark.parametrize("positions", ["sinusoidal", "rope"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: build(Encoder, num_classes=3, pooling="cls", **o),
        lambda **o: build(Encoder, num_classes=3, **o),
        lambda **o: build(Decoder, num_classes=3, **o),
    ],
)
def test_no_step_waits_for_the_device(make: Callable[..., nn.Module], positions, monkeypatch):
    """Tensors without data: whatever asks for a number fails. The kernel is torch's own, called as on a GPU."""
    monkeypatch.setattr(packing, "has_kernel", lambda device: device.type == "meta")
    monkeypatch.setattr(packing, "is_right", lambda *place: True)
    calls: list[Packing] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, given: Packing) -> Tensor:
        calls.append(given)
        return attend_at_once(q, k, v, given)

    monkeypatch.setattr(packing, "attend_at_once", spy)
    model = make(positions=positions, dropout=0.1).train().to("meta", torch.bfloat16)
    model.body.packs = True
    batch = {name: x.to("meta") for name, x in rows().items()}
    batch["embeddings"] = batch["embeddings"].bfloat16()
    logits = model(batch)
    logits.sum().backward()
    assert len(calls) == SIZES["n_layers"]
    assert logits.shape == (len(LENGTHS), 3)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@ON_A_GPU
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_width", [8, 32, 64, 192])
@pytest.mark.parametrize("lengths", [(3, 80, 1, 129, 7), (64,), (1, 1), (5, 0, 9)])
def test_the_kernel_is_attention(lengths, head_width, is_causal):
    """Against float32, its error is that of torch's attention in bfloat16, give or take; forward and backward."""
    starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().cuda()
    n = sum(lengths)
    # More events than the longest sequence has, as in a padded batch.
    given = Packing(torch.arange(n, device="cuda"), starts, max(lengths) + 7, n, is_causal)
    assert kernel_takes(torch.device("cuda"), torch.bfloat16, head_width)

    def attend(function, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator("cuda").manual_seed(0)
        # As `Attention` has them: views of one tensor, not contiguous.
        qkv = torch.randn(n, 3, 2, head_width, device="cuda", generator=generator).to(torch.bfloat16).to(dtype)
        qkv.requires_grad_()
        out = function(*qkv.unbind(1), given)
        (out * torch.randn(out.shape, device="cuda", generator=generator).to(dtype)).sum().backward()
        assert qkv.grad is not None
        return [out.detach(), *qkv.grad.unbind(1)]

    exact = attend(attend_one_by_one, torch.float32)
    kernel, torchs = (attend(f, torch.bfloat16) for f in (attend_at_once, attend_one_by_one))
    for found, other, expected in zip(kernel, torchs, exact, strict=True):
        assert found.isfinite().all()
        assert (found.float() - expected).norm() <= 2 * (other.float() - expected).norm() + 0.01 * expected.norm()


@ON_A_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["encoder", "cls", "decoder", "packed rows"])
def test_a_model_on_a_gpu_gives_the_same_without_padding(kind, dtype):
    options = {"positions": "rope", "model_dim": 64}
    if kind == "packed rows":
        model, batch = build(Decoder, vocab_size=VOCAB, **options), packed_rows()
    elif kind == "decoder":
        model, batch = build(Decoder, num_classes=3, **options), rows()
    else:
        model, batch = build(Encoder, num_classes=3, pooling="cls" if kind == "cls" else "mean", **options), rows()
    model.cuda()
    batch = {name: x.cuda() for name, x in batch.items()}
    exact = results(model, batch, packs=False)
    with torch.autocast("cuda", dtype=dtype):
        assert model.body.packing(batch, is_causal=kind in ("decoder", "packed rows")) is None, "packs=False"
        padded = results(model, batch, packs=False)
        model.body.packs = None
        assert model.body.packing(batch, is_causal=kind in ("decoder", "packed rows")) is not None
        packed = results(model, batch, packs=True)
    for name, expected in exact.items():
        allowed = 2 * (padded[name].float() - expected).norm() + 0.02 * expected.norm() + 1e-3
        assert (packed[name].float() - expected).norm() <= allowed, name
