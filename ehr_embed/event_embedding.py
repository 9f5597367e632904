"""Event vectors by lookup in the embedding table, on the model's device."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehr_embed.batches import Batch
from ehr_embed.errors import UserError, unknown_name

TRAINABLE = ("frozen", "residual", "full")


class EventEmbedding(nn.Module):
    """The table: token ids to vectors. Kept apart from the model, whose weights stay free of it.

    Its `state_dict` holds what is learned and nothing else: `learned` (V, E), or nothing when frozen.

    Args:
        table: (V, E) vectors of the tokens' texts.
        trainable: `frozen` (the vectors stay as they are), `residual` (each gets a learned offset, zero at the start), or
            `full` (the vectors themselves are learned; these are the start).
        noise: while gradients are wanted, each token's vector is moved by a random one, anew in every batch, whose length is
            this share of the vectors' mean length (Bishop 1995, doi:10.1162/neco.1995.7.1.108). A model that has to
            tolerate it reads a neighbourhood of each text, not the one vector by which it could know the token.

    Raises:
        UserError: unknown `trainable`, negative noise.

    >>> embedding = EventEmbedding(torch.eye(3), "residual")
    >>> torch.equal(embedding.table, torch.eye(3)), list(embedding.state_dict())
    (True, ['learned'])
    """

    fixed: Tensor | None

    def __init__(self, table: Tensor, trainable: str = "frozen", *, noise: float = 0.0) -> None:
        super().__init__()
        if noise < 0:
            raise UserError(f"trainer.vector_noise={noise}: expected a share of the vectors' length, 0 or more.")
        self.noise = noise
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
        """What a model takes, from a batch on the table's device: the table's rows in use, each event's row and token, times."""
        row_ids, n_tokens = batch.token_ids, len(self._parts[0])
        if n_tokens > row_ids.numel():
            used, row_ids = batch.token_ids.unique(return_inverse=True)
            rows = self(used)
        else:
            rows = self.table
        if self.noise and torch.is_grad_enabled():
            length = self.noise * rows.detach().norm(dim=-1).mean()
            rows = rows + length * F.normalize(torch.randn_like(rows), dim=-1)
        inputs = {"rows": rows, "row_ids": row_ids, "token_ids": batch.token_ids, "padding_mask": batch.is_event}
        inputs |= {"days": batch.days}
        optional = {"values": batch.values, "segments": batch.segments, "event_index": batch.event_index}
        looking_back = {"gap_days": batch.gap_days, "elapsed_days": batch.elapsed_days}
        return inputs | looking_back | {name: x for name, x in optional.items() if x is not None}
