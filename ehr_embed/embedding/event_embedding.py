"""Look up the vectors of events in the embedding table, and make a model's inputs from a batch."""

from __future__ import annotations

from functools import reduce
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehr_embed.core.settings import OneOf, check_setting
from ehr_embed.data.batches import Batch
from ehr_embed.embedding.variants import TextVariants

TRAINABLE = ("frozen", "residual", "full")
Trainable = Annotated[str, OneOf(*TRAINABLE)]


class EventEmbedding(nn.Module):
    """Embedding table as a module of its own, so that the model's weights do not include it.

    Its `state_dict` holds learned parameters only: `learned` (V, E), or nothing when frozen.

    Args:
        table: (V, E) vectors of the tokens' texts.
        trainable: `frozen` (the vectors stay as they are), `residual` (a learned offset, zero at the start, is added to
            each), or `full` (the vectors themselves are learned, starting from `table`).
        variants: vectors of other words, by which some tokens of `inputs` are read in training mode; the module begins in
            evaluation mode, and a trainer changes it. None = there are none.

    Raises:
        UserError: `trainable` is none of these.

    >>> embedding = EventEmbedding(torch.eye(3), "residual")
    >>> torch.equal(embedding.table, torch.eye(3)), list(embedding.state_dict())
    (True, ['learned'])
    """

    fixed: Tensor | None

    def __init__(self, table: Tensor, trainable: Trainable = "frozen", variants: TextVariants | None = None) -> None:
        super().__init__()
        check_setting("embedder.trainable", trainable, Trainable)
        self.trainable, vectors = trainable, table.float()
        learned = {"frozen": None, "residual": torch.zeros_like(vectors), "full": vectors.clone()}[trainable]
        self.learned = None if learned is None else nn.Parameter(learned)
        self.register_buffer("fixed", None if trainable == "full" else vectors, persistent=False)
        self.variants = variants
        self.eval()

    @property
    def _parts(self) -> list[Tensor]:
        """Return the tables, (V, E) each, whose sum is the embedding table."""
        return [part for part in (self.fixed, self.learned) if part is not None]

    @property
    def table(self) -> Tensor:
        """Return the present vector of every token, (V, E)."""
        return reduce(torch.add, self._parts)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the vectors (..., E) of token ids (...)."""
        return reduce(torch.add, (F.embedding(token_ids, part) for part in self._parts))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the inputs of a model, by name, from a batch on the table's device.

        `rows` (R, E) are the vectors in use, and `row_ids` (B, T) the row of each event in them; `event_vectors` of
        models/event_vectors.py makes one vector per event (B, T, E) of them. `padding_mask` (B, T)
        is True for events and False for padding. All other inputs are attributes of `Batch` under the same name and
        with the same shape: `token_ids`, `is_static`, `places`, `sequence_starts`, the times `days`, `gap_days`,
        `elapsed_days`, `age_days`, and `values`, `segments` and `event_index`, which are left out where the batch has
        None.
        """
        row_ids, n_tokens = batch.token_ids, len(self._parts[0])
        tokens: Tensor | None = None
        if n_tokens <= row_ids.numel():
            rows = self.table
        elif row_ids.device.type != "cpu":
            # Finding the distinct tokens would make the host wait for the device, which takes longer than the products
            # it saves.
            tokens = row_ids.flatten()
            rows = self(tokens)
            row_ids = torch.arange(row_ids.numel(), device=row_ids.device).view_as(row_ids)
        else:
            tokens, row_ids = batch.token_ids.unique(return_inverse=True)
            rows = self(tokens)
        if self.training and self.variants is not None and self.fixed is not None:
            tokens = torch.arange(n_tokens, device=rows.device) if tokens is None else tokens
            own = self.fixed[tokens]
            rows = rows + (self.variants(tokens, own) - own)
        inputs = {"rows": rows, "row_ids": row_ids, "token_ids": batch.token_ids, "padding_mask": batch.is_event}
        inputs |= {"is_static": batch.is_static, "places": batch.places, "sequence_starts": batch.sequence_starts}
        optional = {"values": batch.values, "segments": batch.segments, "event_index": batch.event_index}
        times = {name: getattr(batch, name) for name in ("days", "gap_days", "elapsed_days", "age_days")}
        return inputs | times | {name: x for name, x in optional.items() if x is not None}
