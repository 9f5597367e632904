"""Prediction of a number at each prediction time, such as a length of stay or a later laboratory value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ehr_embed.core.settings import DrawSeed, OneOf, Told, checked
from ehr_embed.data.batches import Batch, BatchDataset
from ehr_embed.data.labels import LabelSet
from ehr_embed.data.prefixes import Prefixes, drawn
from ehr_embed.data.samples import Samples, build_samples
from ehr_embed.data.store import EventStore
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.evaluation.metric import Metric, metric_named
from ehr_embed.evaluation.plots import plot_numbers
from ehr_embed.evaluation.predictions import write_number_predictions
from ehr_embed.evaluation.regression import REGRESSION_METRICS, regression_metrics
from ehr_embed.models.label_outputs import LABEL_OUTPUTS, NUMBER, LabelOutputs, OutputGroup, label_outputs_of
from ehr_embed.models.members import loss_over_members
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.tasks.classification import draw_subjects, split_labels
from ehr_embed.tasks.numbers import numbers_in, read_numbers
from ehr_embed.tasks.protocol import Curves, Outputs, StepResult, check_losses, logits_of

LOSSES = ("squared", "absolute", "huber")
Loss = Annotated[str, OneOf(*LOSSES)]


def number_loss(kind: str, predicted: Tensor, target: Tensor) -> Tensor:
    """Return the loss (B,) of predictions and targets (B,), both in standard deviations of train.

    `huber` is squared up to one standard deviation and linear beyond.

    >>> import torch
    >>> [number_loss(kind, torch.tensor([3.0]), torch.tensor([0.0])).item() for kind in LOSSES]
    [9.0, 3.0, 2.5]
    """
    if kind == "huber":
        return F.huber_loss(predicted.float(), target, reduction="none")
    error = predicted.float() - target
    return error.square() if kind == "squared" else error.abs()


class Regression:
    """Predicts the numbers of a MEDS label set (`float_value` or `integer_value`).

    A model's logit is the number in standard deviations of train from its mean.

    Args:
        labels: name or path of a label set; None = the only label set of the dataset.
        loss: `squared`, `absolute`, or `huber`, of the error in standard deviations of train.
        monitor: metric on tuning that chooses the best checkpoint.
        shuffle_labels: seed with which the labels are permuted within each split, to check for leaks; None = off.
        label_fraction: share of the labelled subjects of train that are used, in (0, 1]; tuning and held_out stay whole.
        fraction_seed: seed that draws those subjects.
        prefixes: `hours` and `shares` of `Prefixes`: how often a record is cut before the prediction time when it is trained
            on; None = never.
    """

    is_trained = True
    needs_causal: bool | None = None
    metrics: Sequence[Metric] = REGRESSION_METRICS
    predicts_number = True
    num_classes = n_outputs = 1

    @checked("task")
    def __init__(
        self,
        *,
        labels: str | None = None,
        loss: Loss = "squared",
        monitor: str = "rmse",
        shuffle_labels: DrawSeed | None = None,
        label_fraction: Annotated[float, Field(gt=0, le=1), Told("a share of train's subjects in (0, 1]")] = 1.0,
        fraction_seed: DrawSeed = 0,
        prefixes: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.labels, self.kind_of_loss, self.monitor = labels, loss, monitor
        self.is_higher_better = metric_named(monitor, self.metrics).is_higher_better
        self.shuffle_labels = shuffle_labels
        self.label_fraction, self.fraction_seed = label_fraction, fraction_seed
        self.prefixes = None if prefixes is None else Prefixes(**prefixes)
        self.samples: dict[str, Samples] = {}
        self.group: OutputGroup | None = None

    @property
    def class_names(self) -> list[str]:
        return [] if self.group is None else self.group.names

    @property
    def sizes(self) -> dict[str, Any]:
        return {"num_classes": 1, LABEL_OUTPUTS: [] if self.group is None else [self.group.plain()]}

    def label_sets(self, labels_dir: Path) -> list[LabelSet]:
        """Return the label set."""
        return [read_numbers(self.labels, labels_dir)]

    def setup(self, store: EventStore, labels_dir: Path, max_length: int) -> None:
        self._max_length = max_length
        (label_set,) = self.label_sets(labels_dir)
        splits = split_labels(label_set, {split: store.split(split) for split in SPLITS})
        self._events = {split: events for split, (events, _) in splits.items()}
        train_events, train_labels = splits["train"]
        splits["train"] = train_events, draw_subjects(train_labels, self.label_fraction, self.fraction_seed)
        for split, (events, frame) in splits.items():
            numbers = numbers_in(frame["value"], label_set.name, split)
            if self.shuffle_labels is not None:
                numbers = np.random.default_rng(self.shuffle_labels).permutation(numbers)
            self.samples[split] = build_samples(events, frame, numbers, max_length=max_length)
        own = self.samples["train"].labels
        self.group = OutputGroup(name=label_set.name, kind=NUMBER, mean=float(own.mean()), sd=float(own.std()))

    def dataset(self, split: str, rng: np.random.Generator | None = None) -> BatchDataset:
        samples = drawn(self.prefixes, self._events[split], self.samples[split], rng, max_length=self._max_length)
        return BatchDataset(self._events[split], samples)

    def step(self, model: nn.Module, embedding: EventEmbedding, batch: Batch) -> StepResult:
        """Return the sum of the samples' losses, their number, and the predicted numbers, (B, 1), in the labels' unit."""
        logits, scale = logits_of(model, embedding.inputs(batch)), label_outputs_of(model)
        assert isinstance(scale, LabelOutputs)
        target_B = scale.standard(batch.labels)
        loss_B = loss_over_members(self.loss, logits, target_B)
        check_losses(self, loss_B, target_B.shape, "sample")
        return StepResult(loss_B.sum(), len(loss_B), scale.decode(logits))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each sample, (B,), from logits (B, 1) and labels (B,) in standard deviations of train."""
        return number_loss(self.kind_of_loss, logits[:, 0], target)

    def fit_thresholds(self, outputs: Outputs) -> None:
        """Do nothing: numbers have no decision thresholds."""

    def evaluate(self, split: str, outputs: Outputs, *, n_bootstrap: int) -> dict[str, Any]:
        samples = self.samples[split]
        return regression_metrics(
            samples.labels,
            outputs[:, 0],
            subject_ids=samples.subject_ids,
            n_bootstrap=n_bootstrap,
            split_name=split,
        )

    def write_predictions(self, path: Path, split: str, outputs: Outputs) -> None:
        samples = self.samples[split]
        write_number_predictions(
            path,
            subject_ids=samples.subject_ids,
            prediction_times=samples.prediction_times.astype("datetime64[us]"),
            labels=samples.labels,
            predicted=outputs[:, 0],
        )

    def curves(self, outputs: dict[str, Outputs]) -> Curves:
        return {}

    def plots(self, outputs: dict[str, Outputs]) -> dict[str, Callable[[Path], None]]:
        """Return the plot of labels against predictions of held_out."""
        labels, title = self.samples["held_out"].labels, f"{self.class_names[0]}, held out"
        return {"predicted": partial(plot_numbers, labels=labels, predicted=outputs["held_out"][:, 0], title=title)}
