"""Pretraining by next-event prediction: every event of a record is predicted from the events before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import polars as pl
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path
from ehr_embed.core.settings import NotNegative, OneOf, checked
from ehr_embed.core.transfer import reads_freely
from ehr_embed.data.batches import Batch, BatchDataset, EventDataset, PackedDataset
from ehr_embed.data.samples import Samples, packed_samples, window_samples
from ehr_embed.data.store import EventStore, SplitEvents
from ehr_embed.data.vocabulary import FIRST_TOKEN
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.evaluation.metric import Metric, metric_named
from ehr_embed.models.heads import EventScores
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.tasks.event_outputs import EVENT_METRICS, TOP, Families, event_metrics, sum_by_sample, totals
from ehr_embed.tasks.ngrams import NgramCounts, count_distinct
from ehr_embed.tasks.protocol import Curves, Outputs, StepResult

WINDOWS = ("random", "packed")
EVALUATED_WINDOWS = ("last", "all")
BASELINE_ROWS = 1024
"""Number of samples, of similar length, that are gathered at a time for the n-gram baselines."""


class NextEvent:
    """Predicts the token of each event, the gap before it and its value from the events before it.

    Static events are context and never targets. An event whose code does not occur in train is no target either,
    because the vocabulary has no token for it.

    The loss is a mean over the predicted events. Each event contributes the negative log likelihood of its token, plus
    `time_weight` times that of its gap, plus `value_weight` times that of its value: of the presence of a value and, if
    there is one, of its density. All three terms are divided by the number of predicted events, events without a value
    included.

    Args:
        windows: training windows, `random` (each record is cut into windows from a random place on) or `packed` (a row
            holds several whole records).
        evaluated_windows: windows that are evaluated, `last` (one window per subject) or `all` windows of the record.
        time_weight: weight of the loss of the gap before an event; 0 = the gap is not trained.
        value_weight: weight of the loss of an event's value, if the data carry values; 0 = the value is not trained.
        monitor: metric on tuning that chooses the best checkpoint.
    """

    is_trained = True
    needs_causal = True
    metrics: Sequence[Metric] = EVENT_METRICS

    @checked("task")
    def __init__(
        self,
        *,
        windows: Annotated[str, OneOf("random", "packed")] = "random",
        evaluated_windows: Annotated[str, OneOf("last", "all")] = "last",
        time_weight: NotNegative = 0.1,
        value_weight: NotNegative = 0.1,
        monitor: str = "perplexity",
    ) -> None:
        self.windows, self.evaluated_windows = windows, evaluated_windows
        self.time_weight, self.value_weight = time_weight, value_weight
        self.monitor, self._monitored = monitor, metric_named(monitor, self.metrics)
        self.is_higher_better = self._monitored.is_higher_better
        self.samples: dict[str, Samples] = {}

    @property
    def sizes(self) -> dict[str, int]:
        return {"vocab_size": len(self._families.of_token)}

    @property
    def class_names(self) -> list[str]:
        return []

    @property
    def n_outputs(self) -> int:
        return self._families.n_outputs

    def setup(self, store: EventStore, labels_dir: Path, max_length: int) -> None:
        if max_length < 3:
            raise UserError(f"model.max_length={max_length}: expected 3 or more events, to predict one from another.")
        if self._monitored.needs == "values" and not store.manifest["has_values"]:
            raise UserError(
                f"task.monitor={self.monitor} needs events that carry values. Type: data.values=both, or another monitor"
            )
        self._max_length = max_length
        self._families = Families.of(store.vocabulary)
        self._events: dict[str, SplitEvents] = {split: store.split(split) for split in SPLITS}
        self._store = store
        which = {split: "all" if split == "train" else self.evaluated_windows for split in SPLITS}
        self.samples = {
            split: window_samples(events, max_length=max_length, which=which[split])
            for split, events in self._events.items()
        }

    def dataset(self, split: str, rng: np.random.Generator | None = None) -> EventDataset:
        events = self._events[split]
        if rng is None:
            return BatchDataset(events, self.samples[split])
        if self.windows == "packed":
            return PackedDataset(events, *packed_samples(events, max_length=self._max_length, rng=rng))
        return BatchDataset(events, window_samples(events, max_length=self._max_length, which="all", rng=rng))

    def fit_thresholds(self, outputs: Outputs) -> None:
        """Do nothing: this task has no decision thresholds."""

    def evaluate(self, split: str, outputs: Outputs, *, n_bootstrap: int) -> dict[str, Any]:
        return event_metrics(
            outputs, self._families, subject_ids=self.samples[split].subject_ids, n_bootstrap=n_bootstrap
        )

    def baselines(self, split: str) -> dict[str, dict[str, float]]:
        """Return the loss, perplexity and top-k accuracy of unigram and bigram counts on the split's targets."""
        return self._ngrams.score(*count_distinct(self._target_pairs(split)))

    @cached_property
    def _ngrams(self) -> NgramCounts:
        return NgramCounts.of(self._store)

    def write_predictions(self, path: Path, split: str, outputs: Outputs) -> None:
        """Write one row per window: subject_id, prediction_time, n_events, nll (sum), and top1, ... (counts).

        The prediction time of a window is the time of its last event.
        """
        samples, sums = self.samples[split], totals(outputs)
        columns: dict[str, Any] = {
            **samples.meds_keys,
            "n_events": sums["n"].astype(np.int64),
            "nll": sums["nll"],
        }
        columns |= {f"top{k}": sums[f"top{k}"].astype(np.int64) for k in TOP}
        with atomic_path(path) as temporary:
            pl.DataFrame(columns).write_parquet(temporary)

    def curves(self, outputs: dict[str, Outputs]) -> Curves:
        return {}

    def step(self, model: nn.Module, embedding: EventEmbedding, batch: Batch) -> StepResult:
        """Return the sum of the losses of the predicted events, their number, and the outputs of `sum_by_sample`."""
        inputs = self.inputs(embedding, batch, self.is_target(batch, is_training=model.training))
        if model.training and not reads_freely(batch.token_ids.device):
            inputs["target_places"] = self.target_places(batch, inputs["targets"])
        scores = model(inputs)
        if not isinstance(scores, EventScores):
            raise UserError(f"{type(model).__name__} was not built to predict events. Type: model=decoder")
        loss_sum = scores.nll.sum() + self.time_weight * scores.time_nll.sum()
        if scores.value_nll is not None:
            loss_sum = loss_sum + self.value_weight * scores.value_nll.sum()
        n_targets = len(scores.nll) if scores.is_target is None else scores.is_target.sum()
        return StepResult(loss_sum, n_targets, sum_by_sample(scores, inputs["targets"], self._families))

    def is_target(self, batch: Batch, *, is_training: bool = False) -> Tensor:
        """Return which events of a batch are predicted, (B, T) bool."""
        return batch.is_next & (batch.token_ids >= FIRST_TOKEN)

    def target_places(self, batch: Batch, targets_BT: Tensor) -> Tensor:
        """Return the numbers of places, b * T + t, among which all targets are, (N,), -1 = none; the host knows N."""
        return batch.places  # a target follows an event

    def inputs(self, embedding: EventEmbedding, batch: Batch, is_target_BT: Tensor) -> dict[str, Tensor]:
        """Return the model's inputs, and as the targets of each place the token, gap and value of the next event."""
        inputs = embedding.inputs(batch)
        targets_BT = (batch.token_ids * is_target_BT).roll(-1, dims=1)
        following = {"targets": targets_BT, "target_gap_days": inputs["gap_days"].roll(-1, dims=1)}
        if batch.values is not None:
            following["target_values"] = batch.values.roll(-1, dims=1)
        return inputs | following | {"table": embedding.table}

    def _target_pairs(self, split: str) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the targets of a split with the token before each, as numbers like those of `NgramCounts.pairs`."""
        dataset, n_tokens = self.dataset(split), len(self._families.of_token)
        for rows in np.array_split(np.argsort(dataset.lengths), -(-len(dataset) // BASELINE_ROWS)):
            batch = dataset[rows]
            is_target = self.is_target(batch)
            previous = batch.token_ids.roll(1, dims=1)[is_target].numpy().astype(np.int64)
            yield previous * n_tokens + batch.token_ids[is_target].numpy()
