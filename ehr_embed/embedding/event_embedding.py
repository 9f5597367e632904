"""Event vectors by lookup in the embedding table, on the model's device."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehr_embed.core.errors import unknown_name
from ehr_embed.data.batches import Batch

TRAINABLE = ("frozen", "residual", "full")


class EventEmbedding(nn.Module):
    """The table: token ids to vectors. Kept apart from the model, whose weights stay free of it.

    Its `state_dict` holds what is learned and nothing else: `learned` (V, E), or nothing when frozen.

    Args:
        table: (V, E) vectors of the tokens' texts.
        trainable: `frozen` (the vectors stay as they are), `residual` (each gets a learned offset, zero at the start), or
            `full` (the vectors themselves are learned; these are the start).

    Raises:
        UserError: unknown `trainable`.

    >>> embedding = EventEmbedding(torch.eye(3), "residual")
    >>> torch.equal(embedding.table, torch.eye(3)), list(embedding.state_dict())
    (True, ['learned'])
    """

    fixed: Tensor | None

    def __init__(self, table: Tensor, trainable: str = "frozen") -> None:
        super().__init__()
        if trainable not in TRAINABLE:
            raise unknown_name("embedder.trainable", trainable, TRAINABLE)
        self.trainable, vectors = trainable, table.float()
        learned = {"frozen": None, "residual": torch.zeros_like(vectors), "full": vectors.clone()}[trainable]
        self.learned = None if learned is None else nn.Parameter(learned)
        self.register_buffer("fixed", None if trainable == "full" else vectors, persistent=False)

    @property
    def _parts(self) -> list[Tensor]:
        """What a vector is the sum of."""
        return [part for part in (self.fixed, self.learned) if part is not None]

    @property
    def table(self) -> Tensor:
        """(V, E): every token's vector as it now is."""
        return reduce(torch.add, self._parts)

    def forward(self, token_ids: Tensor) -> Tensor:
        """(...) ids -> (..., E)."""
        return reduce(torch.add, (F.embedding(token_ids, part) for part in self._parts))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What a model takes, from a batch on the table's device: the table's rows in use, each event's row and token, times, and
        where the events and the sequences are."""
        row_ids, n_tokens = batch.token_ids, len(self._parts[0])
        if n_tokens <= row_ids.numel():
            rows = self.table
        elif row_ids.device.type != "cpu":
            # To find the distinct ones would wait for the device, which costs more than the products spared.
            rows = self(row_ids.flatten())
            row_ids = torch.arange(row_ids.numel(), device=row_ids.device).view_as(row_ids)
        else:
            used, row_ids = batch.token_ids.unique(return_inverse=True)
            rows = self(used)
        inputs = {"rows": rows, "row_ids": row_ids, "token_ids": batch.token_ids, "padding_mask": batch.is_event}
        inputs |= {"is_static": batch.is_static, "places": batch.places, "sequence_starts": batch.sequence_starts}
        optional = {"values": batch.values, "segments": batch.segments, "event_index": batch.event_index}
        times = {name: getattr(batch, name) for name in ("days", "gap_days", "elapsed_days", "age_days")}
        return inputs | times | {name: x for name, x in optional.items() if x is not None}
