"""A bidirectional transformer encoder over event vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehr_embed.models.body import ROTARY, Body
from ehr_embed.models.heads import POOLINGS, EventScores, build_head

POSITIONS = ("sinusoidal", *ROTARY, "time", "none")


class Encoder(nn.Module):
    """Every event sees every other; pooled into one prediction, or scoring events that were masked.

    Args:
        embedding_dim: width E of the event vectors; the embedder says it.
        num_classes: outputs of a pooled prediction; the task says it.
        vocab_size: tokens, for a task that predicts events instead; the task says it.
        has_values: whether batches carry a number beside each event; the data say it.
        model_dim: width D of the model.
        n_heads: attention heads; must divide `model_dim`.
        n_layers: blocks.
        dropout: probability, on what each block adds and on the pooled vector.
        max_length: longest sequence, in events; longer records keep their last events.
        positions: `sinusoidal` or `rope` (order), `rope_time` (hours between events), `time` (days before the prediction),
            `none`.
        times: which are added to each event: `gap` (days since the previous one), `elapsed` (since the first), `age`.
        values: how a number enters its event: `film` (scale and shift), `add`, `none`.
        pooling: `mean`, `cls`, `max`, `last`, `attention`.
        vocabulary_head: `text_tied` or `linear`, for a task that predicts events.
    """

    is_causal = False

    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        model_dim: int = 256,
        n_heads: int = 8,
        n_layers: int = 6,
        dropout: float = 0.1,
        max_length: int = 512,
        positions: str = "sinusoidal",
        times: Sequence[str] = (),
        values: str = "film",
        pooling: str = "mean",
        vocabulary_head: str = "text_tied",
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
            valid_positions=POSITIONS,
            times=times,
            values=values,
        )
        self.head = build_head(
            num_classes=num_classes,
            vocab_size=vocab_size,
            has_values=has_values,
            embedding_dim=embedding_dim,
            model_dim=model_dim,
            pooling=pooling,
            valid_poolings=POOLINGS,
            vocabulary_head=vocabulary_head,
            dropout=dropout,
        )
        self.cls = nn.Parameter(torch.randn(model_dim) * 0.02) if pooling == "cls" and num_classes else None

    def forward(self, inputs: dict[str, Tensor]) -> Tensor | EventScores:
        """Logits (B, num_classes) from `embeddings` (B, T, E) and `padding_mask` (B, T), True = event.

        In place of `embeddings`, `rows` (U, E) and `row_ids` (B, T) give the same logits. `positions=time` needs `days`
        (B, T), days before the prediction, and `times` need `gap_days` and the like; a model that carries values takes
        `values` (B, T), NaN = none. `places` and `sequence_starts`, see `Packing`, spare the padding and change nothing else. A
        model built with `vocab_size` returns what `EventHead` does.
        """
        mask_BT, rope_BT, x_BTD = inputs["padding_mask"], self.body.rotary(inputs), self.body.embed(inputs)
        packing = self.body.packing(inputs, is_causal=False)
        if self.cls is not None:
            B, T, D = x_BTD.shape
            x_BTD = torch.cat([self.cls.to(x_BTD.dtype).expand(B, 1, D), x_BTD], dim=1)
            mask_BT = torch.cat([mask_BT.new_ones(B, 1), mask_BT], dim=1)
            rope_BT = None if rope_BT is None else F.pad(rope_BT + 1, (1, 0))  # it stands a step before the first event
            packing = None if packing is None else packing.with_first(B, T)
        mask = mask_BT[:, None, None, :] if packing is None else packing
        return self.head(self.body.attend(x_BTD, mask, rope_BT), {**inputs, "padding_mask": mask_BT})
