"""A causal transformer decoder over event vectors: next-event pretraining, generation, classification."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from ehr_embed.core.settings import Count, OneOf, Width, checked
from ehr_embed.models.blocks import DropShare
from ehr_embed.models.body import ROTARY, Body, Layers, Times, Values
from ehr_embed.models.cache import KeyValueCache
from ehr_embed.models.heads import EventScores, VocabularyHead, build_head
from ehr_embed.models.packing import Packing
from ehr_embed.models.whitening import Shrinkage, Whiten

POSITIONS = ("sinusoidal", *ROTARY, "none")
POOLINGS = ("last", "mean", "max", "attention")


class Decoder(nn.Module):
    """Causal transformer: each event attends to itself and earlier events.

    It scores the next event, for pretraining and generation, or pools all events into one prediction.

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
        positions: `sinusoidal` or `rope` (order), `rope_time` (hours between events), `none`. Days before the
            prediction are not offered, because they would reveal how long a record continues.
        times: time features of each event: `gap` (days since the previous event), `elapsed` (since the first), `age`.
        values: how a numeric value changes its event vector: `film` (scale and shift), `add` (shift), `none`.
        whiten: whether text vectors are whitened, fitted to those of train's tokens; `lift` raises small variances instead of
            making all equal (see `Whitening`). Otherwise a layer norm brings each vector to unit variance.
        shrinkage: shrinkage of the whitening.
        pooling: how event vectors become one vector: `last`, `mean`, `max`, `attention`.
        vocabulary_head: `text_tied` or `linear`, for a task that predicts events.
    """

    is_causal = True

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
        times: Times = ("gap", "elapsed"),
        values: Values = "film",
        whiten: Whiten = False,
        shrinkage: Shrinkage = 0.1,
        pooling: Annotated[str, OneOf(*POOLINGS)] = "last",
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

    def adapt_to_vectors(self, vectors: Tensor) -> None:
        """Fit the whitening to the vectors (V, E) of train's tokens."""
        self.body.input.adapt_to_vectors(vectors)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor | EventScores:
        """Return logits (B, num_classes), or the output of `EventHead` for a model built with `vocab_size`.

        Args:
            inputs: `embeddings` (B, T, E), or `rows` (U, E) and `row_ids` (B, T), which give the same logits;
                `padding_mask` (B, T), True = event, padding last; `gap_days`, `elapsed_days` and `age_days` (B, T), if
                `times` has them; `values` (B, T), NaN = no value, if `has_values` is set. A row may hold several
                sequences: then `segments` (B, T), equal within a sequence, and `event_index` (B, T). `places` and
                    `sequence_starts` (see `Packing`)
                let the model skip the padding and change nothing else.
        """
        return self.head(self.hidden(inputs), inputs)

    def hidden(self, inputs: dict[str, Tensor], cache: KeyValueCache | None = None) -> Tensor:
        """Return the vector of each event before the head, (B, T, D).

        An empty cache takes the events as prompts. Afterwards each call has one new event per future, and `event_index` comes from
        the cache.
        """
        mask: Tensor | Packing | None = None
        is_next = cache is not None and not cache.is_empty
        if cache is None:
            mask = self.body.packing(inputs, is_causal=True)
            if mask is None and "segments" in inputs:
                mask = segment_mask(inputs["segments"])
        elif is_next:
            inputs = {**inputs, "event_index": cache.lengths.unsqueeze(1)}
        else:
            cache.take_prompts(inputs["padding_mask"])
        x_BTD = self.body.attend(self.body.embed(inputs), mask, self.body.rotary(inputs), cache)
        if cache is not None and is_next:
            cache.end_event()
        return x_BTD

    def hidden_at(self, inputs: dict[str, Tensor], places_N: Tensor) -> Tensor:
        """Return what `hidden` returns at a few places, (N, D), in less time; each row is one sequence.

        Args:
            places_N: numbers b * T + t, ascending; N may be 0.
        """
        is_packed = self.body.packing(inputs, is_causal=True) is not None or "segments" in inputs
        if is_packed or self.body.is_compiled or not len(places_N):
            return self.hidden(inputs).flatten(0, 1)[places_N]
        T = inputs["padding_mask"].shape[1]
        row_N = places_N // T
        slot_N = torch.arange(len(places_N), device=places_N.device) - torch.searchsorted(row_N, row_N)
        place_BQ = places_N.new_zeros(len(inputs["padding_mask"]), int(slot_N.max()) + 1)
        place_BQ[row_N, slot_N] = places_N % T
        x_BQD = self.body.attend_at(self.body.embed(inputs), place_BQ, self.body.rotary(inputs))
        return x_BQD[row_N, slot_N]

    def new_cache(self, n_new: int) -> KeyValueCache:
        """Return an empty cache for prompts, and up to `n_new` new events of each of their futures."""
        return KeyValueCache(n_layers=len(self.body.blocks), n_new=n_new)


def segment_mask(segments_BT: Tensor) -> Tensor:
    """Return the causal mask of rows that hold several sequences, (B, 1, T, T), True = attend.

    >>> segment_mask(torch.tensor([[1, 1, 2]]))[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    T = segments_BT.shape[1]
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return (same_BTT & torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril())[:, None]
