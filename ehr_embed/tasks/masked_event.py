"""Pretraining of an encoder by masked events: some events are masked and predicted from all the others."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import Told, checked
from ehr_embed.core.transfer import places_of
from ehr_embed.data.batches import Batch
from ehr_embed.data.vocabulary import FIRST_TOKEN, PADDING
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.tasks.next_event import NextEvent

MaskShare = Annotated[float, Field(gt=0, lt=1), Told("a share in (0, 1)")]


class MaskedEvent(NextEvent):
    """Predicts masked events from the events on both sides (Devlin et al. 2019, arXiv:1810.04805).

    A share of the timed events is masked. A masked event keeps its place and time but loses its text and value. It has
    the vector of the padding token, which no model reads elsewhere: zero, or learned if the embedder's vectors are
    learned. The loss and the metrics are those of `NextEvent`.

    Args:
        mask_share: share of the timed events that is masked, in (0, 1).
        options: options of `NextEvent`; `windows=packed` is refused, because only causal models support it.
    """

    needs_causal = False

    @checked("task")
    def __init__(self, *, mask_share: MaskShare = 0.15, **options: Any) -> None:
        super().__init__(**options)
        if self.windows == "packed":
            raise UserError("task.windows=packed needs a causal model. Type: task.windows=random")
        self.mask_share = mask_share

    def is_target(self, batch: Batch, *, is_training: bool = False) -> Tensor:
        candidate_BT = batch.is_next & (batch.token_ids >= FIRST_TOKEN)
        shape, device = batch.token_ids.shape, batch.token_ids.device
        if is_training:
            return candidate_BT & (torch.rand(shape, device=device) < self.mask_share)
        return candidate_BT & (repeatable_draws(batch.sample, shape[1]) < self.mask_share)

    def target_places(self, batch: Batch, targets_BT: Tensor) -> Tensor:
        """Return the places of the masked events, then -1.

        The number of masked events is random. The result has room for eight standard deviations above its mean, beyond which not
        one batch in 10^14 lies; masked events without room would be left out of that step's loss. A subclass that chooses its
        targets by itself has room for all events.
        """
        if type(self).is_target is not MaskedEvent.is_target:
            return super().target_places(batch, targets_BT)
        n, share = batch.n_events, self.mask_share
        most = min(n, int(n * share + 8 * math.sqrt(n * share * (1 - share))) + 8)
        return places_of(targets_BT.flatten() > 0, most)

    def inputs(self, embedding: EventEmbedding, batch: Batch, is_target_BT: Tensor) -> dict[str, Tensor]:
        """Return the model's inputs: the batch with masked targets, and the targets' tokens, gaps and values."""
        token_ids = batch.token_ids.masked_fill(is_target_BT, PADDING)
        values = None if batch.values is None else batch.values.masked_fill(is_target_BT, float("nan"))
        inputs = embedding.inputs(replace(batch, token_ids=token_ids, values=values))
        own = {"targets": batch.token_ids * is_target_BT, "target_gap_days": inputs["gap_days"]}
        if batch.values is not None:
            own["target_values"] = batch.values
        return inputs | own | {"table": embedding.table}


def repeatable_draws(sample_B: Tensor, n_events: int) -> Tensor:
    """Return numbers in [0, 1), (B, T), that depend only on sample and place.

    Evaluation therefore masks the same events of a sample in any batch.

    >>> draws = repeatable_draws(torch.arange(100), 100)
    >>> round(draws.mean().item(), 1), torch.equal(draws[7:8], repeatable_draws(torch.tensor([7]), 100))
    (0.5, True)
    """
    place_BT = sample_B[:, None] * 1_000_003 + torch.arange(n_events, device=sample_B.device)
    # A multiplicative hash (Knuth, TAOCP 3, section 6.4) is applied twice, so that neighbours get unrelated numbers.
    for _ in range(2):
        place_BT = ((place_BT ^ (place_BT >> 15)) * 2_654_435_761) & 0xFFFF_FFFF
    return place_BT / 2**32
