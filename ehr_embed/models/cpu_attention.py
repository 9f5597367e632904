"""Attention in bfloat16 on a CPU, computed for a few sequences at a time.

Shapes: B batch, T events, H heads, K head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

SCORES_AT_ONCE = 2**20
"""Attention scores computed at a time: 2 MiB in bfloat16, which stay in the CPU's cache until the softmax."""
LONGEST = 1024
"""Longest sequence, in events, for which the attention weights (B, H, T, T) are kept for the backward pass."""
MASKED = -1e30


def applies(q_BHTK: Tensor, k_BHTK: Tensor) -> bool:
    """Return whether `cpu_attention` is faster than torch's fused kernel, which is slow in bfloat16 on a CPU."""
    is_bf16_cpu = q_BHTK.device.type == "cpu" and q_BHTK.dtype == torch.bfloat16
    return is_bf16_cpu and 1 < q_BHTK.shape[-2] == k_BHTK.shape[-2] <= LONGEST


def cpu_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attended values (B, H, T, K), equal to `scaled_dot_product_attention` up to rounding.

    The scores are rounded to the number format of the inputs.

    Args:
        mask: True = attend, broadcastable to (B, 1, T, T); None = causal.
    """
    B, _, T, _ = q_BHTK.shape
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    bias = torch.zeros(mask.shape, dtype=q_BHTK.dtype).masked_fill_(~mask, MASKED)
    attended: Tensor = _Attention.apply(q_BHTK, k_BHTK, v_BHTK, bias.expand(B, *bias.shape[1:]))
    return attended


class _Attention(torch.autograd.Function):
    """Computes attention and its gradient with plain matrix products, one chunk of the batch after the other."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        B, H, T, K = q.shape
        chunks = _chunks(B, H * T * T)
        # The memory order is that of (B, T, H, K), so that the heads can be joined without a copy.
        out = q.new_empty(B, T, H, K).transpose(1, 2)
        weights = []
        for rows in chunks:
            scores = torch.matmul(q[rows] / math.sqrt(K), k[rows].transpose(-1, -2)).add_(bias[rows])
            weight = scores.softmax(-1)
            out[rows] = torch.matmul(weight, v[rows])
            if any(ctx.needs_input_grad):
                weights.append(weight)
        ctx.save_for_backward(q, k, v, *weights)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *weights = ctx.saved_tensors
        B, H, T, K = q.shape
        grad_q, grad_k, grad_v = q.new_empty(B, T, 3, H, K).permute(2, 0, 3, 1, 4)
        for rows, weight in zip(_chunks(B, H * T * T), weights, strict=True):
            grad_v[rows] = torch.matmul(weight.transpose(-1, -2), grad[rows])
            grad_weight = torch.matmul(grad[rows], v[rows].transpose(-1, -2))
            grad_scores = torch._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
            grad_q[rows] = torch.matmul(grad_scores, k[rows]).div_(math.sqrt(K))
            grad_k[rows] = torch.matmul(grad_scores.transpose(-1, -2), q[rows] / math.sqrt(K))
        return grad_q, grad_k, grad_v, None


def _chunks(n_rows: int, scores_a_row: int) -> list[slice]:
    step = max(1, SCORES_AT_ONCE // scores_a_row)
    return [slice(start, start + step) for start in range(0, n_rows, step)]
