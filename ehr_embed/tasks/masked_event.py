"""Pretraining of an encoder: events are blanked out and predicted from all the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.data.batches import Batch
from ehr_embed.data.vocabulary import FIRST_TOKEN, PADDING
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.tasks.next_event import NextEvent


class MaskedEvent(NextEvent):
    """As `NextEvent`, but a share of the timed events is blanked out and predicted from what stands on both sides
    (Devlin et al. 2019, arXiv:1810.04805). A blank event keeps its place and time; its text and value are gone.
    It has the vector of padding, which no model looks at elsewhere: zero, or learned where vectors are.

    Args:
        mask_share: share of the timed events that is blanked out, in (0, 1).
        options: those of `NextEvent`; `windows=packed` is for causal models only.
    """

    needs_causal = False

    def __init__(self, *, mask_share: float = 0.15, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < mask_share < 1:
            raise UserError(f"task.mask_share={mask_share}: expected a share in (0, 1).")
        if self.windows == "packed":
            raise UserError("task.windows=packed needs a causal model. Type: task.windows=random")
        self.mask_share = mask_share

    def is_target(self, batch: Batch, *, is_training: bool = False) -> Tensor:
        candidate_BT = batch.is_next & (batch.token_ids >= FIRST_TOKEN)
        shape, device = batch.token_ids.shape, batch.token_ids.device
        if is_training:
            return candidate_BT & (torch.rand(shape, device=device) < self.mask_share)
        return candidate_BT & (repeatable_draws(batch.sample, shape[1]) < self.mask_share)

    def inputs(self, embedding: EventEmbedding, batch: Batch, is_target_BT: Tensor) -> dict[str, Tensor]:
        """What the model takes: the batch with its targets blanked out, and what they were."""
        token_ids = batch.token_ids.masked_fill(is_target_BT, PADDING)
        values = None if batch.values is None else batch.values.masked_fill(is_target_BT, float("nan"))
        inputs = embedding.inputs(replace(batch, token_ids=token_ids, values=values))
        own = {"targets": batch.token_ids * is_target_BT, "target_gap_days": inputs["gap_days"]}
        if batch.values is not None:
            own["target_values"] = batch.values
        return inputs | own | {"table": embedding.table}


def repeatable_draws(sample_B: Tensor, n_events: int) -> Tensor:
    """Numbers in [0, 1), (B, T), that depend on sample and place alone: evaluation blanks the same events in any batch.

    >>> draws = repeatable_draws(torch.arange(100), 100)
    >>> round(draws.mean().item(), 1), torch.equal(draws[7:8], repeatable_draws(torch.tensor([7]), 100))
    (0.5, True)
    """
    place_BT = sample_B[:, None] * 1_000_003 + torch.arange(n_events, device=sample_B.device)
    # A multiplicative hash (Knuth, TAOCP 3, section 6.4), twice, so that neighbours get unrelated numbers.
    for _ in range(2):
        place_BT = ((place_BT ^ (place_BT >> 15)) * 2_654_435_761) & 0xFFFF_FFFF
    return place_BT / 2**32
