"""The parts transformers are built of: attention, positions, pooling. Shapes: B batch, T events, D model, H heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehr_embed.errors import UserError, unknown_name

POSITIONS = ("sinusoidal", "rope", "time", "none")
POOLINGS = ("mean", "cls", "max", "last", "attention")
LONGEST_DAYS, SHORTEST_DAYS = 36525.0, 1.0 / 24
"""Periods of the time features run from an hour to a century."""


def sinusoids(position_BT: Tensor, dim: int, *, base: float = 10_000.0) -> Tensor:
    """Sinusoidal features (Vaswani et al. 2017, section 3.5), (B, T) -> (B, T, dim)."""
    frequency = base ** (-torch.arange(0, dim, 2, device=position_BT.device, dtype=torch.float32) / dim)
    angle = position_BT.float().unsqueeze(-1) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[..., :dim]


def time_features(days_BT: Tensor, dim: int) -> Tensor:
    """Sines and cosines of continuous time, periods spaced evenly in log from an hour to a century, (B, T, dim)."""
    n = (dim + 1) // 2
    periods = torch.logspace(math.log10(SHORTEST_DAYS), math.log10(LONGEST_DAYS), n, device=days_BT.device)
    angle = 2 * math.pi * days_BT.float().unsqueeze(-1) / periods
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[..., :dim]


def rotate(x_BHTK: Tensor, position_BT: Tensor, *, base: float = 10_000.0) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of queries or keys, (B, H, T, K)."""
    half = x_BHTK.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x_BHTK.device, dtype=torch.float32) / half)
    angle_B1TK = (position_BT.float().unsqueeze(-1) * frequency).unsqueeze(1)
    sin, cos = angle_B1TK.sin().to(x_BHTK.dtype), angle_B1TK.cos().to(x_BHTK.dtype)
    first, second = x_BHTK[..., :half], x_BHTK[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Dropout(nn.Module):
    """Dropout whose CPU path draws eight mask entries from each random number, at probabilities in steps of 1/256.

    torch's own draws them one by one, which on a CPU took a third of a training step.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise UserError(f"model.dropout={p}: expected a probability in [0, 1).")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; the identity in evaluation."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        n_dropped = max(1, round(self.p * 256))
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= n_dropped
        return x * keep.to(x.dtype).mul_(256 / (256 - n_dropped))


class Attention(nn.Module):
    """Multi-head self-attention on `scaled_dot_product_attention`.

    No dropout on the attention weights: it would rule out the fused kernels, and the block drops on the output.
    """

    def __init__(self, *, model_dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(model_dim, 3 * model_dim)
        self.out = nn.Linear(model_dim, model_dim)

    def forward(self, x_BTD: Tensor, mask_B11T: Tensor, rope_BT: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, D); `mask_B11T` True = attend; `rope_BT` positions to rotate by, or None."""
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(B, T, 3, self.n_heads, D // self.n_heads).permute(2, 0, 3, 1, 4)
        if rope_BT is not None:
            q, k = rotate(q, rope_BT), rotate(k, rope_BT)
        y_BHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B11T)
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Pre-norm transformer block (Xiong et al. 2020, arXiv:2002.04745) with a GELU MLP four times as wide."""

    def __init__(self, *, model_dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(model_dim)
        self.attention = Attention(model_dim=model_dim, n_heads=n_heads)
        self.norm_mlp = nn.LayerNorm(model_dim)
        self.mlp = nn.Sequential(nn.Linear(model_dim, 4 * model_dim), nn.GELU(), nn.Linear(4 * model_dim, model_dim))
        self.dropout = Dropout(dropout)

    def forward(self, x_BTD: Tensor, mask_B11T: Tensor, rope_BT: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x_BTD = x_BTD + self.dropout(self.attention(self.norm_attention(x_BTD), mask_B11T, rope_BT))
        return x_BTD + self.dropout(self.mlp(self.norm_mlp(x_BTD)))


class EventInput(nn.Module):
    """Projects event vectors to the model's width; where values are carried, each scales and shifts its event.

    Text vectors have norm one whatever their width, so they are brought to unit variance first. The scale and shift
    come from a small MLP of (value, has value) and start at zero: FiLM (Perez et al. 2018, arXiv:1709.07871).
    """

    def __init__(self, *, embedding_dim: int, model_dim: int, has_values: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embedding_dim)
        self.project = nn.Linear(embedding_dim, model_dim)
        self.values = None
        if has_values:
            last = nn.Linear(model_dim, 2 * model_dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.values = nn.Sequential(nn.Linear(2, model_dim), nn.GELU(), last)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, T, D) from `embeddings` (B, T, E), or from `rows` (U, E) and `row_ids` (B, T), and `values` (B, T), NaN = none.

        Rows are projected once however many events share them: the same numbers, with fewer products.
        """
        if "rows" in inputs:
            self._check_width(inputs["rows"])
            x_BTD = F.embedding(inputs["row_ids"], self.project(self.norm(inputs["rows"])))
        else:
            self._check_width(inputs["embeddings"])
            x_BTD = self.project(self.norm(inputs["embeddings"]))
        if self.values is None:
            return x_BTD
        values_BT = inputs.get("values")
        if values_BT is None:
            raise UserError(
                "the model carries values, but the batch has none. Use a store with data.values=continuous or both."
            )
        present_BT = ~values_BT.isnan()
        features = torch.stack([values_BT.nan_to_num(), present_BT.to(values_BT.dtype)], dim=-1)
        scale, shift = self.values(features.to(x_BTD.dtype)).chunk(2, dim=-1)
        return torch.where(present_BT.unsqueeze(-1), x_BTD * (1 + scale) + shift, x_BTD)

    def _check_width(self, vectors: Tensor) -> None:
        expected = self.project.in_features
        if vectors.shape[-1] != expected:
            raise UserError(
                f"event vectors of width {vectors.shape[-1]}, but this model was built for {expected}: "
                "another embedder made them. Use the embedder of the model's config.yaml."
            )


class Pooling(nn.Module):
    """One vector a sample from the events' vectors: `mean`, `max`, `last` event, `cls` (first), or learned `attention`."""

    def __init__(self, kind: str, *, model_dim: int) -> None:
        super().__init__()
        if kind not in POOLINGS:
            raise unknown_name("model.pooling", kind, POOLINGS)
        self.kind = kind
        self.score = nn.Linear(model_dim, 1) if kind == "attention" else None

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, T, D), True = event -> (B, D). A sample without any event is undefined."""
        keep_BT1 = mask_BT.unsqueeze(-1)
        if self.kind == "cls":
            return x_BTD[:, 0]
        if self.kind == "last":
            last_B = mask_BT.long().cumsum(1).argmax(1)
            return x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), last_B]
        if self.kind == "max":
            return x_BTD.masked_fill(~keep_BT1, torch.finfo(x_BTD.dtype).min).amax(1)
        if self.score is not None:
            weight = self.score(x_BTD).float().masked_fill(~keep_BT1, float("-inf")).softmax(1)
            return (x_BTD * weight.to(x_BTD.dtype)).sum(1)
        return (x_BTD * keep_BT1).sum(1) / keep_BT1.sum(1)


def check_heads(model_dim: int, n_heads: int, positions: str) -> None:
    """Refuse sizes that attention cannot be built with.

    Raises:
        UserError: `n_heads` does not divide `model_dim`, an odd head size under rope, unknown `positions`.
    """
    if positions not in POSITIONS:
        raise unknown_name("model.positions", positions, POSITIONS)
    if n_heads < 1 or model_dim % n_heads:
        good = [n for n in range(1, model_dim + 1) if model_dim % n == 0 and n <= 64]
        raise UserError(
            f"model.n_heads={n_heads} does not divide model.model_dim={model_dim}; every head needs the same width. "
            f"Valid with this model_dim: {', '.join(map(str, good))}."
        )
    if positions == "rope" and (model_dim // n_heads) % 2:
        raise UserError(f"model.positions=rope needs an even head width, model_dim/n_heads is {model_dim // n_heads}.")
