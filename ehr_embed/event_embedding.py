"""Event vectors by lookup in the embedding table, on the model's device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehr_embed.batches import Batch


class EventEmbedding(nn.Module):
    """The frozen table: token ids to vectors. Kept apart from the model, whose checkpoint stays free of it."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table.float())

    def forward(self, token_ids: Tensor) -> Tensor:
        """(...) ids -> (..., E)."""
        return F.embedding(token_ids, self.table)

    @torch.no_grad()
    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What a model takes, from a batch on the table's device: the table's rows in use, each event's row, and times."""
        rows, row_ids = self.table, batch.token_ids
        if len(rows) > row_ids.numel():
            used, row_ids = batch.token_ids.unique(return_inverse=True)
            rows = self(used)
        inputs = {"rows": rows, "row_ids": row_ids, "padding_mask": batch.is_event, "days": batch.days}
        if batch.values is not None:
            inputs["values"] = batch.values
        start_BT = sequence_start(batch)
        if batch.segments is not None:
            inputs["segments"] = batch.segments
            inputs["event_index"] = torch.arange(start_BT.shape[1], device=start_BT.device) - start_BT
        inputs["gap_days"], inputs["elapsed_days"] = looking_back(batch.days, start_BT)
        return inputs


def sequence_start(batch: Batch) -> Tensor:
    """Place in its row of the first event of each event's sequence, (B, T) int64."""
    if batch.segments is None:
        return torch.zeros_like(batch.token_ids, dtype=torch.int64)
    is_first_BT = torch.ones_like(batch.is_event)
    is_first_BT[:, 1:] = batch.segments[:, 1:] != batch.segments[:, :-1]
    place_T = torch.arange(is_first_BT.shape[1], device=is_first_BT.device)
    return (is_first_BT * place_T).cummax(dim=1).values


def looking_back(days_BT: Tensor, start_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Days since the previous event and since the first one of the sequence, (B, T) each, from days before the prediction.

    >>> gap, elapsed = looking_back(torch.tensor([[9.0, 9.0, 2.0]]), torch.zeros(1, 3, dtype=torch.int64))
    >>> gap.tolist(), elapsed.tolist()
    ([[0.0, 0.0, 7.0]], [[0.0, 0.0, 7.0]])
    """
    elapsed_BT = days_BT.gather(1, start_BT) - days_BT
    place_T = torch.arange(days_BT.shape[1], device=days_BT.device)
    gap_BT = (days_BT.roll(1, dims=1) - days_BT).clamp(min=0).masked_fill(place_T == start_BT, 0)
    return gap_BT, elapsed_BT
