"""The CPU's bfloat16 attention against torch's own, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ehr_embed.models import cpu_attention
from ehr_embed.models.blocks import Attention
from ehr_embed.models.decoder import segment_mask

B, H, T, K = 5, 2, 24, 8


def masks() -> dict[str, Tensor | None]:
    lengths = torch.tensor([24, 1, 7, 13, 20])
    segments = (torch.arange(T) // 9 + 1).expand(B, T) * (torch.arange(T) < 20)
    return {
        "padding": (torch.arange(T) < lengths[:, None])[:, None, None, :],
        "causal": None,
        "packed": segment_mask(segments),
    }


def attend(function, mask, dtype) -> list[Tensor]:
    """Output and the gradients of queries, keys and values."""
    torch.manual_seed(0)
    inputs = [torch.randn(B, H, T, K).to(dtype).requires_grad_() for _ in range(3)]
    out = function(*inputs, mask)
    (out * torch.randn(out.shape).to(dtype)).sum().backward()
    return [out, *(x.grad for x in inputs)]


def reference(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("scores_at_once", [1, 2**20])
def test_it_is_attention(kind, scores_at_once, monkeypatch):
    monkeypatch.setattr(cpu_attention, "SCORES_AT_ONCE", scores_at_once)
    mask = masks()[kind]
    exact = attend(reference, mask, torch.float64)
    for found, expected in zip(attend(cpu_attention.cpu_attention, mask, torch.float64), exact, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", masks())
def test_its_error_in_bfloat16_is_that_of_torch(kind):
    """Both against float64; rounding scores to bfloat16 costs no more than twice what rounding the inputs already does."""
    mask = masks()[kind]
    exact = attend(reference, mask, torch.float64)
    for found, torchs, expected in zip(
        attend(cpu_attention.cpu_attention, mask, torch.bfloat16),
        attend(reference, mask, torch.bfloat16),
        exact,
        strict=True,
    ):
        error = (found.double() - expected).pow(2).mean().sqrt()
        assert error < 2 * (torchs.double() - expected).pow(2).mean().sqrt()


def test_it_is_used_where_it_pays_and_nowhere_else(monkeypatch):
    used = []

    def spy(*arguments):
        used.append(True)
        return reference(*arguments)

    monkeypatch.setattr("ehr_embed.models.blocks.cpu_attention", spy)
    attention, mask = Attention(model_dim=16, n_heads=2), torch.ones(3, 1, 1, 6, dtype=torch.bool)
    attention(torch.randn(3, 6, 16), mask)
    assert not used, "float32 takes torch's kernel"
    attention.bfloat16()(torch.randn(3, 6, 16).bfloat16(), mask)
    assert used
    used.clear()
    attention(torch.randn(1, cpu_attention.LONGEST + 1, 16).bfloat16(), None)
    assert not used, "of long sequences the weights would fill the memory"
