"""Layers of the transformers: position and time features, dropout, attention, and the block made of them.

Shapes: B batch, T events, D model width, H heads, K head width, S events in the cache, N events of all sequences
without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ehr_embed.core.settings import Told, check_setting
from ehr_embed.models.cpu_attention import applies, cpu_attention
from ehr_embed.models.packing import Packing

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
LONGEST_DAYS, SHORTEST_DAYS = 36525.0, 1.0 / 24
"""Longest and shortest period of the time features, in days: a century and an hour."""


def sinusoids(position_BT: Tensor, dim: int, *, base: float = 10_000.0) -> Tensor:
    """Return sinusoidal position features (Vaswani et al. 2017, section 3.5), (B, T) -> (B, T, dim)."""
    frequency = base ** (-torch.arange(0, dim, 2, device=position_BT.device, dtype=torch.float32) / dim)
    angle = position_BT.float().unsqueeze(-1) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[..., :dim]


def time_features(days_BT: Tensor, dim: int) -> Tensor:
    """Return sines and cosines of continuous time in days, (B, T) -> (B, T, dim).

    The periods are spaced evenly on a log scale from an hour to a century.
    """
    n = (dim + 1) // 2
    periods = torch.logspace(math.log10(SHORTEST_DAYS), math.log10(LONGEST_DAYS), n, device=days_BT.device)
    angle = 2 * math.pi * days_BT.float().unsqueeze(-1) / periods
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[..., :dim]


def rotate(x_BHTK: Tensor, position_BT: Tensor, *, base: float = 10_000.0) -> Tensor:
    """Apply the rotary position embedding (Su et al. 2021, arXiv:2104.09864) to queries or keys.

    Takes queries or keys (B, H, T, K) with positions (B, T), or packed ones (N, H, K) with positions (N,).
    """
    half = x_BHTK.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x_BHTK.device, dtype=torch.float32) / half)
    angle_B1TK = (position_BT.float().unsqueeze(-1) * frequency).unsqueeze(1)
    sin, cos = angle_B1TK.sin().to(x_BHTK.dtype), angle_B1TK.cos().to(x_BHTK.dtype)
    first, second = x_BHTK[..., :half], x_BHTK[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


DropShare = Annotated[float, Field(ge=0, lt=1), Told("a probability in [0, 1)", example="0.1")]
STEPS = 256
"""Values of a mask entry of 8 bits."""


class Dropout(nn.Module):
    """Dropout whose probability is a multiple of 1/256 on every device: 0.1 is 26/256 = 0.1016.

    On a CPU each 64-bit random number gives eight mask entries. `torch.nn.functional.dropout` draws the entries one by one
    there, which takes a third of a training step.
    """

    def __init__(self, p: DropShare) -> None:
        super().__init__()
        check_setting("model.dropout", p, DropShare)
        self.p, self.n_dropped = p, min(max(1, round(p * STEPS)), STEPS - 1) if p else 0

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Return `x`, of any shape, with entries dropped in training and unchanged in evaluation.

        With a packing, `x` (N, D) is packed; on a CPU the entries are dropped that would be dropped with the padding.
        """
        if not self.training or not self.n_dropped:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.n_dropped / STEPS)
        shape = x.shape if packing is None else (packing.n_places, x.shape[-1])
        n = math.prod(shape)
        words = torch.empty((n + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        keep = words.view(torch.uint8)[:n].view(shape) >= self.n_dropped
        if packing is not None:
            keep = keep.index_select(0, packing.places)
        return x * keep.to(x.dtype).mul_(STEPS / (STEPS - self.n_dropped))


def attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attended values (B, H, T, K); `mask` is True = attend, broadcastable to (B, H, T, T), None = causal."""
    if applies(q_BHTK, k_BHTK):
        return cpu_attention(q_BHTK, k_BHTK, v_BHTK, mask)
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=mask, is_causal=mask is None)


class Attention(nn.Module):
    """Multi-head self-attention with torch's fused kernels, or with `cpu_attention` for bfloat16 on a CPU.

    There is no dropout on the attention weights, because dropout would rule out the fused kernels. The block applies
    dropout to the output instead.
    """

    def __init__(self, *, model_dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(model_dim, 3 * model_dim)
        self.out = nn.Linear(model_dim, model_dim)

    def forward(
        self, x_BTD: Tensor, mask: Tensor | Packing | None, rope_BT: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """Return the attended vectors, (B, T, D) -> (B, T, D).

        Args:
            mask: True = attend, broadcastable to (B, H, T, T); None = causal. With a packing, `x_BTD` and `rope_BT` are packed,
                (N, D) and (N,), and `attend` is None.
            rope_BT: positions that rotate the queries and keys; None = no rotation.
            attend: stores the new keys and values (B, H, T, K), and returns what the queries attend to in all events so far,
                (B, H, T, K); `mask` is not used.
        """
        if isinstance(mask, Packing):
            return self._packed(x_BTD, mask, rope_BT)
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(B, T, 3, self.n_heads, D // self.n_heads).permute(2, 0, 3, 1, 4)
        if rope_BT is not None:
            q, k = rotate(q, rope_BT), rotate(k, rope_BT)
        y_BHTK = attention(q, k, v, mask) if attend is None else attend(q, k, v)
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))

    def at(self, query_BQD: Tensor, x_BTD: Tensor, place_BQ: Tensor, rope_BT: Tensor | None = None) -> Tensor:
        """Return what a few places of each row attend to in themselves and the places before them, (B, Q, D).

        Args:
            query_BQD: vectors at those places.
            x_BTD: vectors at all places.
            place_BQ: int64, the places.
            rope_BT: as in `forward`.
        """
        B, T, D = x_BTD.shape
        weight, bias, width = self.qkv.weight, self.qkv.bias, D // self.n_heads
        q = F.linear(query_BQD, weight[:D], bias[:D]).unflatten(-1, (self.n_heads, width)).transpose(1, 2)
        k, v = F.linear(x_BTD, weight[D:], bias[D:]).view(B, T, 2, self.n_heads, width).permute(2, 0, 3, 1, 4)
        if rope_BT is not None:
            q, k = rotate(q, rope_BT.gather(1, place_BQ)), rotate(k, rope_BT)
        is_seen_B1QT = (torch.arange(T, device=x_BTD.device) <= place_BQ.unsqueeze(-1)).unsqueeze(1)
        y_BHQK = F.scaled_dot_product_attention(q, k, v, attn_mask=is_seen_B1QT)
        return self.out(y_BHQK.transpose(1, 2).flatten(2))

    def _packed(self, x_ND: Tensor, packing: Packing, rope_N: Tensor | None) -> Tensor:
        N, D = x_ND.shape
        q, k, v = self.qkv(x_ND).view(N, 3, self.n_heads, D // self.n_heads).unbind(1)
        if rope_N is not None:
            q, k = rotate(q, rope_N), rotate(k, rope_N)
        return self.out(packing.attend(q, k, v).reshape(N, D))


class Block(nn.Module):
    """Pre-norm transformer block (Xiong et al. 2020, arXiv:2002.04745) with a GELU MLP four times as wide."""

    def __init__(self, *, model_dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(model_dim)
        self.attention = Attention(model_dim=model_dim, n_heads=n_heads)
        self.norm_mlp = nn.LayerNorm(model_dim)
        self.mlp = nn.Sequential(nn.Linear(model_dim, 4 * model_dim), nn.GELU(), nn.Linear(4 * model_dim, model_dim))
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x_BTD: Tensor,
        mask: Tensor | Packing | None,
        rope_BT: Tensor | None = None,
        attend: Attend | None = None,
        *,
        place_BQ: Tensor | None = None,
    ) -> Tensor:
        """Return the block's output, of the shape of the input; arguments as in `Attention.forward`.

        Args:
            place_BQ: int64, a few places of each row: then return the causal output there alone, (B, Q, D), without computing it
                elsewhere; `mask` and `attend` are None. It comes through this method and no other, since sharding gathers a block's
                parameters when the block is called.
        """
        if place_BQ is not None:
            return self._at(x_BTD, place_BQ, rope_BT)
        packing = mask if isinstance(mask, Packing) else None
        x_BTD = x_BTD + self.dropout(self.attention(self.norm_attention(x_BTD), mask, rope_BT, attend), packing)
        return x_BTD + self.dropout(self.mlp(self.norm_mlp(x_BTD)), packing)

    def _at(self, x_BTD: Tensor, place_BQ: Tensor, rope_BT: Tensor | None) -> Tensor:
        normed_BTD, index = self.norm_attention(x_BTD), place_BQ.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1])
        query_BQD = normed_BTD.gather(1, index)
        x_BQD = x_BTD.gather(1, index) + self.dropout(self.attention.at(query_BQD, normed_BTD, place_BQ, rope_BT))
        return x_BQD + self.dropout(self.mlp(self.norm_mlp(x_BQD)))
