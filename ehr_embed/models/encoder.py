"""A bidirectional transformer encoder over event vectors."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehr_embed.core.settings import Count, OneOf, Width, checked
from ehr_embed.models.blocks import DropShare
from ehr_embed.models.body import ROTARY, Body, Layers, Times, Values
from ehr_embed.models.heads import POOLINGS, EventScores, VocabularyHead, build_head
from ehr_embed.models.whitening import Shrinkage, Whiten

POSITIONS = ("sinusoidal", *ROTARY, "time", "none")


class Encoder(nn.Module):
    """Bidirectional transformer: every event attends to every other event.

    It pools all events into one prediction, or scores the events that were masked.

    Args:
        embedding_dim: width E of the event vectors, set by the embedder.
        num_classes: number of outputs of a pooled prediction, set by the task.
        vocab_size: number V of tokens, set instead by a task that predicts events.
        has_values: whether batches carry a numeric value with each event, set by the data.
        model_dim: width D of the model.
        n_heads: number of attention heads; must divide `model_dim`.
        n_layers: number of transformer blocks.
        dropout: dropout probability on the residual branches of each block and on the pooled vector.
        max_length: longest sequence, in events; a longer record keeps its static events and its last timed ones.
        positions: `sinusoidal` or `rope` (order), `rope_time` (hours between events), `time` (days before the prediction),
            `none`.
        times: time features of each event: `gap` (days since the previous event), `elapsed` (since the first), `age`.
        values: how a numeric value changes its event vector: `film` (scale and shift), `add` (shift), `none`.
        whiten: whether text vectors are whitened, fitted to those of train's tokens; `lift` raises small variances instead of
            making all equal (see `Whitening`). Otherwise a layer norm brings each vector to unit variance.
        shrinkage: shrinkage of the whitening.
        pooling: how event vectors become one vector: `mean`, `cls`, `max`, `last`, `attention`.
        vocabulary_head: `text_tied` or `linear`, for a task that predicts events.
    """

    is_causal = False

    @checked("model")
    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        model_dim: Width = 256,
        n_heads: Count = 8,
        n_layers: Layers = 6,
        dropout: DropShare = 0.1,
        max_length: int = 512,
        positions: Annotated[str, OneOf(*POSITIONS)] = "sinusoidal",
        times: Times = (),
        values: Values = "film",
        whiten: Whiten = False,
        shrinkage: Shrinkage = 0.1,
        pooling: Annotated[str, OneOf(*POOLINGS)] = "mean",
        vocabulary_head: VocabularyHead = "text_tied",
    ) -> None:
        super().__init__()
        self.body = Body(
            embedding_dim=embedding_dim,
            has_values=has_values,
            model_dim=model_dim,
            n_heads=n_heads,
            n_layers=n_layers,
            dropout=dropout,
            max_length=max_length,
            positions=positions,
            times=times,
            values=values,
            whiten=whiten,
            shrinkage=shrinkage,
        )
        self.head = build_head(
            num_classes=num_classes,
            vocab_size=vocab_size,
            has_values=has_values,
            embedding_dim=embedding_dim,
            model_dim=model_dim,
            pooling=pooling,
            vocabulary_head=vocabulary_head,
            dropout=dropout,
        )
        self.cls = nn.Parameter(torch.randn(model_dim) * 0.02) if pooling == "cls" and num_classes else None

    def adapt_to_vectors(self, vectors: Tensor) -> None:
        """Fit the whitening to the vectors (V, E) of train's tokens."""
        self.body.input.adapt_to_vectors(vectors)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor | EventScores:
        """Return logits (B, num_classes), or the output of `EventHead` for a model built with `vocab_size`.

        Args:
            inputs: `embeddings` (B, T, E), or `rows` (U, E) and `row_ids` (B, T), which give the same logits;
                `padding_mask` (B, T), True = event; `days` (B, T), days before the prediction, with `positions=time`;
                `gap_days`, `elapsed_days` and `age_days` (B, T), if `times` has them; `values` (B, T), NaN = no value,
                if `has_values` is set. `places` and `sequence_starts` (see `Packing`) let the model skip the padding
                and change nothing else.
        """
        mask_BT, rope_BT, x_BTD = inputs["padding_mask"], self.body.rotary(inputs), self.body.embed(inputs)
        packing = self.body.packing(inputs, is_causal=False)
        if self.cls is not None:
            B, T, D = x_BTD.shape
            x_BTD = torch.cat([self.cls.to(x_BTD.dtype).expand(B, 1, D), x_BTD], dim=1)
            mask_BT = torch.cat([mask_BT.new_ones(B, 1), mask_BT], dim=1)
            rope_BT = None if rope_BT is None else F.pad(rope_BT + 1, (1, 0))  # cls is one step before the first event
            packing = None if packing is None else packing.with_first(B, T)
        mask = mask_BT[:, None, None, :] if packing is None else packing
        return self.head(self.body.attend(x_BTD, mask, rope_BT), {**inputs, "padding_mask": mask_BT})
