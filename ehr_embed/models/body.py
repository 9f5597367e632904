"""The body that encoder and decoder share: it turns events into one vector per event.

A run that starts from a pretrained run (`init_from`) takes over the weights of the body.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import Count, OneOf, Told, Width, check_setting, checked
from ehr_embed.data.batches import LENGTH_MULTIPLE
from ehr_embed.models.blocks import Block, DropShare, sinusoids, time_features
from ehr_embed.models.cache import KeyValueCache
from ehr_embed.models.event_vectors import event_vectors
from ehr_embed.models.packing import Packing, kernel_takes, packing_of, pays_on_cpu, product_dtype
from ehr_embed.models.whitening import Shrinkage, Whiten, Whitening, normalising

ROTARY = ("rope", "rope_time")
"""Rotary positions: attention sees the number of events, or the time, between two events."""
Layers = Annotated[int, Field(ge=1, le=1024)]
Times = Sequence[Annotated[str, OneOf("gap", "elapsed", "age"), Told(remedy="[] leaves times out.")]]
Values = Annotated[str, OneOf("film", "add", "none")]


class EventInput(nn.Module):
    """Projects event vectors to the model's width, and lets each numeric value change the vector of its event.

    Text vectors have norm one whatever their width, so they are first brought to unit variance: by a layer norm, or with
    `whiten` by a `Whitening`, which the model's `adapt_to_vectors` fits to those of train's tokens. Text vectors of one domain
    share most of their length, and behind a layer norm a short training hardly learns to tell them apart. A small MLP reads the
    value and a flag that says whether there is one. With `values=film` the MLP returns a scale and a shift of the vector (Perez et
    al. 2018, arXiv:1709.07871), with `add` a shift alone; both start at zero. `none` ignores the values.
    """

    @checked("model")
    def __init__(
        self,
        *,
        embedding_dim: int,
        model_dim: Width,
        has_values: bool,
        values: Values = "film",
        whiten: Whiten = False,
        shrinkage: Shrinkage = 0.1,
    ) -> None:
        super().__init__()
        self.norm = normalising(embedding_dim, whiten, shrinkage)
        self.project = nn.Linear(embedding_dim, model_dim)
        self.values = None
        if has_values and values != "none":
            last = nn.Linear(model_dim, 2 * model_dim if values == "film" else model_dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.values = nn.Sequential(nn.Linear(2, model_dim), nn.GELU(), last)

    def adapt_to_vectors(self, vectors: Tensor) -> None:
        """Fit the whitening, if there is one, to the vectors (V, E) of train's tokens."""
        if isinstance(self.norm, Whitening):
            self.norm.fit(vectors)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the projected events, (B, T, D).

        Args:
            inputs: `embeddings` (B, T, E), or `rows` (U, E) and `row_ids` (B, T), which give the same vectors and
                project each distinct row once however many events share it; `values` (B, T), NaN = no value. Without
                `values` no event has a value.
        """
        if "rows" in inputs:
            x_BTD = F.embedding(inputs["row_ids"], self._projected(inputs["rows"]))
        else:
            x_BTD = self._projected(event_vectors(inputs))
        values_BT = inputs.get("values")
        if self.values is None or values_BT is None:
            return x_BTD
        present_BT = ~values_BT.isnan()
        features = torch.stack([values_BT.nan_to_num(), present_BT.to(values_BT.dtype)], dim=-1)
        shift, *scale = self.values(features.to(x_BTD.dtype)).split(x_BTD.shape[-1], dim=-1)
        scaled = x_BTD * (1 + scale[0]) if scale else x_BTD
        return torch.where(present_BT.unsqueeze(-1), scaled + shift, x_BTD)

    def _projected(self, vectors: Tensor) -> Tensor:
        """Return the vectors (..., E) at the model's width, (..., D)."""
        check_width(vectors, self.project.in_features)
        if isinstance(self.norm, Whitening):
            # In half precision the small differences that whitening amplifies would be rounded away.
            with torch.autocast(vectors.device.type, enabled=False):
                return self.project(self.norm(vectors.float()).to(self.project.weight.dtype))
        return self.project(self.norm(vectors))


class TimeInput(nn.Module):
    """Projects the times of an event, as sines and cosines, to the model's width.

    `gap` (days since the previous event), `elapsed` (days since the first event) and `age` look back only, so that a
    causal model cannot learn from them how long the record continues.
    """

    def __init__(self, *, kinds: Times, model_dim: Width) -> None:
        super().__init__()
        check_setting("model.times", kinds, Times)
        self.kinds, self.model_dim = tuple(kinds), model_dim
        self.project = nn.Linear(len(kinds) * model_dim, model_dim)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the time features (B, T, D).

        Args:
            inputs: `gap_days`, `elapsed_days` and `age_days`, (B, T) each, NaN = unknown, of which the kinds of this
                module are needed. Without `age_days` every age is unknown.

        Raises:
            UserError: `gap_days` or `elapsed_days` is needed and missing.
        """
        names = [f"{kind}_days" for kind in self.kinds]
        if missing := [name for name in names if name not in inputs and name != "age_days"]:
            raise UserError(
                f"model.times=[{','.join(self.kinds)}] needs the inputs {' and '.join(missing)} (B, T), which are "
                "missing. Give each of them, or build the model with times=[]."
            )
        unknown_BT = torch.full(inputs["padding_mask"].shape, float("nan"), device=inputs["padding_mask"].device)
        features = [time_features(inputs.get(name, unknown_BT), self.model_dim).nan_to_num() for name in names]
        return self.project(torch.cat(features, dim=-1).to(self.project.weight.dtype))


class Body(nn.Module):
    """Event input, positions, pre-norm transformer blocks and a final norm.

    Args:
        embedding_dim: width E of the event vectors.
        has_values: whether batches carry a numeric value with each event.
        model_dim: width D of the model.
        n_heads: number of attention heads; must divide `model_dim`.
        n_layers: number of transformer blocks.
        dropout: dropout probability on the residual branches of each block.
        max_length: longest sequence, in events.
        positions: how the order or the times of the events enter; the constructor of the model says which it supports.
        times: the time features that are added to each event.
        values: how a numeric value changes its event vector.
        whiten, shrinkage: as in `EventInput`.

    Attributes:
        packs: whether the blocks compute without padding, for inputs that hold `places`; None = where torch has a kernel for
            packed sequences, and on a CPU where `pays_on_cpu`. Both ways give the same vectors.
    """

    packs: bool | None = None

    @checked("model")
    def __init__(
        self,
        *,
        embedding_dim: int,
        has_values: bool,
        model_dim: Width,
        n_heads: Count,
        n_layers: Layers,
        dropout: DropShare,
        max_length: int,
        positions: Annotated[str, OneOf("sinusoidal", *ROTARY, "time", "none")],
        times: Times,
        values: Values,
        whiten: Whiten = False,
        shrinkage: Shrinkage = 0.1,
    ) -> None:
        super().__init__()
        check_heads(model_dim, n_heads, positions)
        self.max_length, self.positions, self.n_heads = max_length, positions, n_heads
        self.input = EventInput(
            embedding_dim=embedding_dim,
            model_dim=model_dim,
            has_values=has_values,
            values=values,
            whiten=whiten,
            shrinkage=shrinkage,
        )
        self.time = nn.Linear(model_dim, model_dim) if positions == "time" else None
        self.times = TimeInput(kinds=times, model_dim=model_dim) if times else None
        self.blocks = nn.ModuleList(
            Block(model_dim=model_dim, n_heads=n_heads, dropout=dropout) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(model_dim)

    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the event vectors with positions and times added, before any attention, (B, T, D).

        Raises:
            UserError: the batch is longer than `max_length`.
        """
        n_events = inputs["padding_mask"].shape[1]
        if n_events >= self.max_length + LENGTH_MULTIPLE:  # batches are padded to a multiple of it
            raise UserError(
                f"the batch has {n_events} events per record, but model.max_length is {self.max_length}. "
                "Keep the last events."
            )
        x_BTD = self.input(inputs)
        if self.positions == "sinusoidal":
            # All rows count their events alike, unless they hold several sequences, so one row of sines is enough.
            index = event_index(inputs) if "event_index" in inputs else event_index(inputs)[:1]
            x_BTD = x_BTD + sinusoids(index, x_BTD.shape[-1]).to(x_BTD.dtype)
        elif self.time is not None:
            x_BTD = x_BTD + self.time(time_features(inputs["days"], x_BTD.shape[-1]).to(x_BTD.dtype))
        if self.times is not None:
            x_BTD = x_BTD + self.times(inputs)
        return x_BTD

    def rotary(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """Return the positions that rotate queries and keys, (B, T), or None without rotary positions.

        A position is the event's index with `rope`, and the hours since the first event with `rope_time`.
        """
        if self.positions == "rope_time":
            return inputs["elapsed_days"] * 24
        return event_index(inputs) if self.positions == "rope" else None

    @property
    def is_compiled(self) -> bool:
        """Return whether blocks are compiled, so that inputs of other shapes or kinds are compiled once more."""
        return any(getattr(block, "_compiled_call_impl", None) is not None for block in self.blocks)

    def packing(self, inputs: dict[str, Tensor], *, is_causal: bool) -> Packing | None:
        """Return the packing that `attend` takes in place of a mask to skip the padding; None to keep the padding."""
        packing, weight = packing_of(inputs, is_causal=is_causal), self.norm.weight
        if packing is None:
            return None
        dtype = product_dtype(weight)
        has_kernel = kernel_takes(weight.device, dtype, len(weight) // self.n_heads)
        # Attention one sequence at a time has other lengths in each batch, which would be compiled again and again.
        pays = has_kernel or (not self.is_compiled and pays_on_cpu(packing, dtype))
        packs = pays if self.packs is None else self.packs
        return replace(packing, at_once=has_kernel) if packs else None

    def attend(
        self,
        x_BTD: Tensor,
        mask: Tensor | Packing | None,
        rope_BT: Tensor | None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Return the output of the blocks and the final norm, (B, T, D) -> (B, T, D).

        Args:
            mask: as in `Attention.forward`; with a packing the vectors of padding are zero.
            rope_BT: as `rotary` returns it.
            cache: keys and values of the events before these.
        """
        if isinstance(mask, Packing):
            x_ND = self._blocks(mask.pack(x_BTD), mask, None if rope_BT is None else mask.pack(rope_BT))
            return mask.unpack(x_ND, *x_BTD.shape[:2])
        return self._blocks(x_BTD, mask, rope_BT, cache)

    def attend_at(self, x_BTD: Tensor, place_BQ: Tensor, rope_BT: Tensor | None) -> Tensor:
        """Return what `attend` without a mask returns at a few places (B, Q) of each row, (B, Q, D). The last block, whose other
        places nothing reads, is computed there alone."""
        *blocks, last = self.blocks
        for block in blocks:
            x_BTD = block(x_BTD, None, rope_BT)
        return self.norm(last(x_BTD, None, rope_BT, place_BQ=place_BQ))

    def _blocks(
        self, x: Tensor, mask: Tensor | Packing | None, rope: Tensor | None, cache: KeyValueCache | None = None
    ) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x, mask, rope, None if cache is None else cache.attend_of(number))
        return self.norm(x)


def check_width(vectors: Tensor, expected: int) -> None:
    """Refuse event vectors (..., E) whose width is not the one that the model was built for.

    Raises:
        UserError: E is not `expected`.
    """
    if vectors.shape[-1] != expected:
        raise UserError(
            f"event vectors of width {vectors.shape[-1]}, but this model was built for {expected}: "
            "another embedder made them. Use the embedder of the model's config.yaml."
        )


def event_index(inputs: dict[str, Tensor]) -> Tensor:
    """Return the index of each event within its sequence, (B, T).

    It is the input `event_index` where given (several sequences per row, or a cache), else 0 ... T - 1.
    """
    if "event_index" in inputs:
        return inputs["event_index"]
    mask_BT = inputs["padding_mask"]
    return torch.arange(mask_BT.shape[1], device=mask_BT.device).expand(mask_BT.shape)


def check_heads(model_dim: int, n_heads: int, positions: str = "none") -> None:
    """Refuse heads that no transformer block can have.

    Raises:
        UserError: `n_heads` does not divide `model_dim`, or the head width is odd with rotary positions.
    """
    if model_dim % n_heads:
        good = [n for n in range(1, model_dim + 1) if model_dim % n == 0 and n <= 64]
        raise UserError(
            f"model.n_heads={n_heads} does not divide model.model_dim={model_dim}; every head needs the same width. "
            f"Valid with this model_dim: {', '.join(map(str, good))}."
        )
    if positions in ROTARY and (model_dim // n_heads) % 2:
        raise UserError(
            f"model.positions={positions} needs an even head width, model_dim/n_heads is {model_dim // n_heads}."
        )
