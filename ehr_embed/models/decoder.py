"""A causal transformer decoder over event vectors: next-event pretraining, generation, classification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ehr_embed.models.body import ROTARY, Body
from ehr_embed.models.cache import KeyValueCache
from ehr_embed.models.heads import EventScores, build_head
from ehr_embed.models.packing import Packing, product_dtype

POSITIONS = ("sinusoidal", *ROTARY, "none")
POOLINGS = ("last", "mean", "max", "attention")


class Decoder(nn.Module):
    """An event sees itself and those before it; scores the next one, or is pooled into one prediction.

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
        positions: `sinusoidal` or `rope` (order), `rope_time` (hours between events), `none`. Days before the prediction would
            tell how long a record goes on.
        times: which are added to each event: `gap` (days since the previous one), `elapsed` (since the first), `age`.
        values: how a number enters its event: `film` (scale and shift), `add`, `none`.
        pooling: `last`, `mean`, `max`, `attention`.
        vocabulary_head: `text_tied` or `linear`, for a task that predicts events.
    """

    is_causal = True

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
        times: Sequence[str] = ("gap", "elapsed"),
        values: str = "film",
        pooling: str = "last",
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

    def forward(self, inputs: dict[str, Tensor]) -> Tensor | EventScores:
        """Logits (B, num_classes) from `embeddings` (B, T, E) and `padding_mask` (B, T), True = event, padding last.

        In place of `embeddings`, `rows` (U, E) and `row_ids` (B, T) give the same logits. `times` need `gap_days` and
        the like (B, T), a model that carries values takes `values` (B, T), NaN = none. Several sequences may share a
        row: `segments` (B, T), equal within a sequence, and `event_index` (B, T). `places` and `sequence_starts`, see
        `Packing`, spare the padding and change nothing else. A model built with `vocab_size` returns what `EventHead` does.
        """
        return self.head(self.hidden(inputs), inputs)

    def hidden(self, inputs: dict[str, Tensor], cache: KeyValueCache | None = None) -> Tensor:
        """The vector of each event before the head, (B, T, D).

        With a cache the T events follow those in it, `padding_mask` says which of them are events, and the cache grows by
        them; `event_index` is then the cache's.
        """
        if cache is not None:
            T = inputs["padding_mask"].shape[1]
            inputs = {**inputs, "event_index": cache.index_of(T)}
            mask: Tensor | Packing | None = cache.mask(T)
        else:
            mask = self.body.packing(inputs, is_causal=True)
            if mask is None and "segments" in inputs:
                mask = segment_mask(inputs["segments"])
        x_BTD = self.body.attend(self.body.embed(inputs), mask, self.body.rotary(inputs), cache)
        if cache is not None:
            cache.lengths += inputs["padding_mask"].sum(1)
        return x_BTD

    def new_cache(self, batch_size: int, n_events: int) -> KeyValueCache:
        """An empty cache for `batch_size` sequences of up to `n_events` events, on the model's device."""
        weight = self.body.norm.weight
        return KeyValueCache(
            n_layers=len(self.body.blocks),
            batch_size=batch_size,
            n_heads=self.body.n_heads,
            n_events=n_events,
            head_dim=len(weight) // self.body.n_heads,
            device=weight.device,
            dtype=product_dtype(weight),
        )


def segment_mask(segments_BT: Tensor) -> Tensor:
    """Causal and block-diagonal: which events each may see, (B, 1, T, T).

    >>> segment_mask(torch.tensor([[1, 1, 2]]))[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    T = segments_BT.shape[1]
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return (same_BTT & torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril())[:, None]
