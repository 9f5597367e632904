"""Prediction of several yes-or-no labels at each prediction time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path
from ehr_embed.core.lost_data import NEARLY_ALL, ONLY_SAID, say_or_refuse
from ehr_embed.core.transfer import kept_on
from ehr_embed.data.batches import Batch, BatchDataset
from ehr_embed.data.labels import LabelSet, available_labels, read_labels
from ehr_embed.data.prefixes import Prefixes, drawn
from ehr_embed.data.samples import Samples, build_samples
from ehr_embed.data.store import EventStore
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.evaluation.metric import Metric, metric_named
from ehr_embed.evaluation.metrics import CLASS_METRICS, choose_threshold, multilabel_metrics
from ehr_embed.models.members import loss_over_members, over_members
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.tasks.classification import encode_classes, refuse_missing_classes, split_labels
from ehr_embed.tasks.protocol import (
    Curves,
    Outputs,
    StepResult,
    as_tensor,
    check_class_weights,
    check_losses,
    logits_of,
)


class Multilabel:
    """Predicts several boolean label sets together, at the prediction times that all of them share.

    Args:
        labels: names or paths of label sets; None = all label sets of the dataset.
        class_weights: None, "balanced" (negatives per positive in train), or one number per label, the weight of a
            positive relative to a negative. Both weights of a label are scaled to a mean of 1 over the samples of
            train, so that no label outweighs another.
        monitor: metric on tuning, averaged over labels, that chooses the best checkpoint.
        prefixes: `hours` and `shares` of `Prefixes`: how often a record is cut before the prediction time when it is trained
            on; None = never.
    """

    def __init__(
        self,
        *,
        labels: Sequence[str] | None = None,
        class_weights: str | Sequence[float] | None = None,
        monitor: str = "auroc",
        prefixes: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.labels, self.class_weights, self.monitor = labels, class_weights, monitor
        self.is_higher_better = metric_named(monitor, self.metrics).is_higher_better
        check_class_weights(class_weights)
        self.prefixes = None if prefixes is None else Prefixes(**prefixes)
        self.samples: dict[str, Samples] = {}
        self.label_names: list[str] = []

    is_trained = True
    needs_causal: bool | None = None
    metrics: Sequence[Metric] = CLASS_METRICS

    @property
    def class_names(self) -> list[str]:
        return self.label_names

    @property
    def num_classes(self) -> int:
        return len(self.label_names)

    @property
    def sizes(self) -> dict[str, int]:
        return {"num_classes": self.num_classes}

    @property
    def n_outputs(self) -> int:
        return self.num_classes

    def label_sets(self, labels_dir: Path) -> list[LabelSet]:
        """Return the label sets.

        Raises:
            UserError: there are fewer than two, or one is not boolean.
        """
        names = available_labels(labels_dir) if self.labels is None else list(self.labels)
        if len(names) < 2:
            raise UserError(f"task=multilabel needs two label sets or more, got {names}. Type: task.labels=[NAME,NAME]")
        label_sets = [read_labels(name, labels_dir) for name in names]
        if others := [label_set.name for label_set in label_sets if not label_set.is_boolean]:
            raise UserError(
                f"task=multilabel takes boolean label sets; {', '.join(others)} are not. Use task=classification."
            )
        return label_sets

    def setup(self, store: EventStore, labels_dir: Path, max_length: int) -> None:
        self._max_length = max_length
        label_sets = self.label_sets(labels_dir)
        joined = join_labels(label_sets)
        self.label_names = [label_set.name for label_set in label_sets]
        self._events = {split: store.split(split) for split in SPLITS}
        for split, (events, frame) in split_labels(joined, self._events).items():
            columns = [
                encode_classes(frame[name], ["false", "true"], f"{name}, split {split}") for name in self.label_names
            ]
            for name, column in zip(self.label_names, columns, strict=True):
                refuse_missing_classes(column, ["false", "true"], name, split)
            values = np.stack(columns, axis=1).astype(np.float32)
            self.samples[split] = build_samples(events, frame, values, max_length=max_length)
        self._weights = self._fit_weights()
        self.thresholds = np.full(self.num_classes, 0.5)

    def _fit_weights(self) -> Tensor | None:
        """Return the weights of a negative and of a positive sample of each label, (2, L)."""
        if self.class_weights is None:
            return None
        rate = np.asarray(np.nanmean(self.samples["train"].labels, axis=0, dtype=np.float64))
        if isinstance(self.class_weights, str):
            if self.class_weights != "balanced":
                raise UserError(
                    f"task.class_weights={self.class_weights}: expected null, balanced, or one number per label."
                )
            return _of_mean_one(np.asarray((1 - rate) / rate), rate)
        if len(self.class_weights) != self.num_classes:
            raise UserError(
                f"task.class_weights has {len(self.class_weights)} numbers for {self.num_classes} labels: "
                f"{', '.join(self.label_names)}. Give one weight per label, in this order."
            )
        return _of_mean_one(np.array(self.class_weights, np.float64), rate)

    def dataset(self, split: str, rng: np.random.Generator | None = None) -> BatchDataset:
        samples = drawn(self.prefixes, self._events[split], self.samples[split], rng, max_length=self._max_length)
        return BatchDataset(self._events[split], samples)

    def step(self, model: nn.Module, embedding: EventEmbedding, batch: Batch) -> StepResult:
        """Return the sum of the losses of all known labels, their number, and the probabilities, each label's on its own."""
        logits = logits_of(model, embedding.inputs(batch))
        loss_BL = loss_over_members(self.loss, logits, batch.labels)
        check_losses(self, loss_BL, batch.labels.shape, "sample and label")
        return StepResult(loss_BL.sum(), (~batch.labels.isnan()).sum(), self.probabilities(logits))

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        """Return the probability of each label, (B, L) float64, from a model's logits (B, L), or (B, M, L) of M members."""
        return over_members(logits.detach().double().sigmoid())

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted binary cross-entropy of each label, (B, L), from logits and labels (B, L).

        A label of NaN is unknown and has a loss of 0.
        """
        is_known_BL, known_BL = ~labels.isnan(), labels.nan_to_num()
        loss_BL = F.binary_cross_entropy_with_logits(logits.float(), known_BL, reduction="none") * is_known_BL
        if self._weights is None:
            return loss_BL
        of_negative_L, of_positive_L = kept_on(labels.device, self._weights)
        return loss_BL * torch.where(known_BL == 1, of_positive_L, of_negative_L)

    def fit_thresholds(self, outputs: Outputs) -> None:
        labels = self.samples["tuning"].labels
        self.thresholds = np.array([choose_threshold(y, p) for y, p in zip(labels.T, outputs.T, strict=True)])

    def evaluate(self, split: str, outputs: Outputs, *, n_bootstrap: int) -> dict[str, Any]:
        return multilabel_metrics(
            self.samples[split].labels,
            outputs,
            thresholds=self.thresholds,
            label_names=self.label_names,
            subject_ids=self.samples[split].subject_ids,
            n_bootstrap=n_bootstrap,
            split_name=split,
        )

    def write_predictions(self, path: Path, split: str, outputs: Outputs) -> None:
        samples = self.samples[split]
        columns: dict[str, Any] = dict(samples.meds_keys)
        for index, name in enumerate(self.label_names):
            columns[f"{name}/label"] = samples.labels[:, index].astype(bool)
            columns[f"{name}/predicted"] = outputs[:, index] >= self.thresholds[index]
            columns[f"{name}/probability"] = outputs[:, index].astype(np.float64)
        with atomic_path(path) as temporary:
            pl.DataFrame(columns).write_parquet(temporary)

    def curves(self, outputs: dict[str, Outputs]) -> Curves:
        return {
            f"{split}, {name}": (self.samples[split].labels[:, index], p[:, index])
            for split, p in outputs.items()
            for index, name in enumerate(self.label_names)
        }


def _of_mean_one(of_positive: npt.NDArray[np.float64], rate: npt.NDArray[np.float64]) -> Tensor:
    """Return the weights of negatives and positives, (2, L), with a mean of 1 over the samples of each label.

    Args:
        of_positive: (L,) weight of a positive relative to a negative.
        rate: (L,) share of the samples that are positive.

    >>> _of_mean_one(np.array([99.0]), np.array([0.01])).flatten().tolist()
    [0.5050504803657532, 50.0]
    """
    of_negative = 1 / (rate * of_positive + 1 - rate)
    return as_tensor(np.stack([of_negative, of_negative * of_positive]))


def join_labels(label_sets: list[LabelSet]) -> LabelSet:
    """Join label sets on subject and prediction time, with one value column per set.

    The number of rows of each set without a partner in every other set is logged.

    Raises:
        UserError: (nearly) none of the rows of the smallest set are in all other sets.
    """
    keys = ["subject_id", "prediction_time"]
    frame = label_sets[0].frame.rename({"value": label_sets[0].name})
    for other in label_sets[1:]:
        frame = frame.join(other.frame.rename({"value": other.name}), on=keys, how="inner")
    sizes = ", ".join(f"{label_set.name}: {len(label_set.frame):,}" for label_set in label_sets)
    # A larger set loses rows anyway; only rows that the smallest set loses show that subjects or times do not match.
    for label_set in sorted(label_sets, key=lambda label_set: len(label_set.frame), reverse=True):
        is_smallest = len(label_set.frame) == min(len(other.frame) for other in label_sets)
        say_or_refuse(
            len(label_set.frame) - len(frame),
            len(label_set.frame),
            f"rows of the label set {label_set.name} share no subject and prediction time with a row of every other one ({sizes}; "
            f"joined: {len(frame):,}), so they cannot be predicted together, and are left out",
            remedy="Type: task=multitask, where each label set keeps its own times.",
            refused_from=NEARLY_ALL if is_smallest else ONLY_SAID,
        )
    name = "+".join(label_set.name for label_set in label_sets)
    return LabelSet(name, frame.sort(keys), "boolean_value")
