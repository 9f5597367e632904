"""What encoder and decoder share: from events to one vector an event. Its weights are what pretraining hands on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehr_embed.errors import UserError, unknown_name
from ehr_embed.models.blocks import Block, sinusoids, time_features
from ehr_embed.models.cache import KeyValueCache

LENGTH_MULTIPLE = 8
"""Batches are padded to a multiple of this: few distinct shapes, and whole vector registers."""


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

        Without `values` no event has a number. Rows are projected once however many events share them: the same vectors,
        with fewer products.
        """
        if "rows" in inputs:
            self._check_width(inputs["rows"])
            x_BTD = F.embedding(inputs["row_ids"], self.project(self.norm(inputs["rows"])))
        else:
            self._check_width(inputs["embeddings"])
            x_BTD = self.project(self.norm(inputs["embeddings"]))
        values_BT = inputs.get("values")
        if self.values is None or values_BT is None:
            return x_BTD
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


class ElapsedTime(nn.Module):
    """Days since the previous event and since the first one, as sines and cosines.

    Both look back only, so that a causal model cannot read from them how long the record goes on.
    """

    def __init__(self, *, model_dim: int) -> None:
        super().__init__()
        self.model_dim = model_dim
        self.project = nn.Linear(2 * model_dim, model_dim)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, T, D) from `gap_days` and `elapsed_days`, (B, T) each."""
        if "gap_days" not in inputs or "elapsed_days" not in inputs:
            raise UserError("model.times=true needs gap_days and elapsed_days (B, T) beside the events. Give both.")
        features = [time_features(inputs[name], self.model_dim) for name in ("gap_days", "elapsed_days")]
        return self.project(torch.cat(features, dim=-1).to(self.project.weight.dtype))


class Body(nn.Module):
    """Event input, positions, pre-norm blocks, final norm.

    Args:
        embedding_dim: width E of the event vectors.
        has_values: whether a number stands beside each event.
        model_dim: width D of the model.
        n_heads: attention heads; must divide `model_dim`.
        n_layers: blocks.
        dropout: probability, on what each block adds.
        max_length: longest sequence, in events.
        positions: one of `valid_positions`.
        valid_positions: what the model that owns this body can do.
        times: whether the days since the previous and the first event are added to each event.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        has_values: bool,
        model_dim: int,
        n_heads: int,
        n_layers: int,
        dropout: float,
        max_length: int,
        positions: str,
        valid_positions: tuple[str, ...],
        times: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(model_dim, n_heads, positions, valid_positions)
        self.max_length, self.positions, self.n_heads = max_length, positions, n_heads
        self.input = EventInput(embedding_dim=embedding_dim, model_dim=model_dim, has_values=has_values)
        self.time = nn.Linear(model_dim, model_dim) if positions == "time" else None
        self.elapsed = ElapsedTime(model_dim=model_dim) if times else None
        self.blocks = nn.ModuleList(
            Block(model_dim=model_dim, n_heads=n_heads, dropout=dropout) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(model_dim)

    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        """Events with their order and time, before any attention, (B, T, D)."""
        n_events = inputs["padding_mask"].shape[1]
        if n_events >= self.max_length + LENGTH_MULTIPLE:  # batches are padded to a multiple of it
            raise UserError(f"{n_events} events, but model.max_length is {self.max_length}: keep the last ones.")
        x_BTD = self.input(inputs)
        if self.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoids(event_index(inputs), x_BTD.shape[-1]).to(x_BTD.dtype)
        elif self.time is not None:
            x_BTD = x_BTD + self.time(time_features(inputs["days"], x_BTD.shape[-1]).to(x_BTD.dtype))
        if self.elapsed is not None:
            x_BTD = x_BTD + self.elapsed(inputs)
        return x_BTD

    def attend(
        self, x_BTD: Tensor, mask: Tensor | None, index_BT: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Blocks and final norm, (B, T, D) -> (B, T, D); `mask` as in `Attention`, `index_BT` for rope."""
        rope_BT = index_BT if self.positions == "rope" else None
        for number, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, mask, rope_BT, None if cache is None else cache.extend_of(number))
        return self.norm(x_BTD)


def event_index(inputs: dict[str, Tensor]) -> Tensor:
    """Number of each event within its sequence, (B, T): `event_index` where given (packed rows, a cache), else 0 ... T - 1."""
    if "event_index" in inputs:
        return inputs["event_index"]
    mask_BT = inputs["padding_mask"]
    return torch.arange(mask_BT.shape[1], device=mask_BT.device).expand(mask_BT.shape)


def check_sizes(model_dim: int, n_heads: int, positions: str, valid_positions: tuple[str, ...]) -> None:
    """Refuse sizes that attention cannot be built with.

    Raises:
        UserError: `n_heads` does not divide `model_dim`, an odd head size under rope, unknown `positions`.
    """
    if positions not in valid_positions:
        raise unknown_name("model.positions", positions, valid_positions)
    if n_heads < 1 or model_dim % n_heads:
        good = [n for n in range(1, model_dim + 1) if model_dim % n == 0 and n <= 64]
        raise UserError(
            f"model.n_heads={n_heads} does not divide model.model_dim={model_dim}; every head needs the same width. "
            f"Valid with this model_dim: {', '.join(map(str, good))}."
        )
    if positions == "rope" and (model_dim // n_heads) % 2:
        raise UserError(f"model.positions=rope needs an even head width, model_dim/n_heads is {model_dim // n_heads}.")
