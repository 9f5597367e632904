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
        """What a model takes, from a batch on the table's device: the table's rows in use and each event's row."""
        rows, row_ids = self.table, batch.token_ids
        if len(rows) > row_ids.numel():
            used, row_ids = batch.token_ids.unique(return_inverse=True)
            rows = self(used)
        inputs = {"rows": rows, "row_ids": row_ids, "padding_mask": batch.is_event, "days": batch.days}
        if batch.values is not None:
            inputs["values"] = batch.values
        return inputs
