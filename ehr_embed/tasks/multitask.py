"""Prediction of several label sets by one model, each with its own subjects, prediction times and kind of label."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.files import atomic_path
from ehr_embed.core.settings import check_setting, checked
from ehr_embed.core.transfer import kept_on
from ehr_embed.data.batches import Batch, BatchDataset
from ehr_embed.data.labels import LabelSet, available_labels, read_labels
from ehr_embed.data.prefixes import Prefixes, drawn
from ehr_embed.data.samples import Samples, build_samples
from ehr_embed.data.store import EventStore
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.evaluation.metric import Metric, metric_named
from ehr_embed.evaluation.metric_entries import values_of
from ehr_embed.evaluation.metrics import (
    CLASS_METRICS,
    binary_metrics,
    choose_threshold,
    multiclass_metrics,
    summaries,
)
from ehr_embed.evaluation.plots import plot_numbers
from ehr_embed.evaluation.regression import REGRESSION_METRICS, regression_metrics
from ehr_embed.models.label_outputs import (
    BINARY,
    CLASSES,
    LABEL_OUTPUTS,
    NUMBER,
    Kind,
    LabelOutputs,
    OutputGroup,
    label_outputs_of,
)
from ehr_embed.models.members import loss_over_members
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.tasks.classification import (
    class_names,
    encode_classes,
    refuse_missing_classes,
    refuse_no_labels,
    split_labels,
)
from ehr_embed.tasks.numbers import as_numbers, numbers_in
from ehr_embed.tasks.protocol import Curves, Outputs, StepResult, logits_of
from ehr_embed.tasks.regression import Loss, number_loss

log = logging.getLogger(__name__)
KIND_OF_COLUMN = {"boolean_value": BINARY, "categorical_value": CLASSES, "float_value": NUMBER, "integer_value": NUMBER}
BALANCED = "balanced"


class Multitask:
    """Predicts several label sets with one body and one head.

    A sample is a prediction time of any of the label sets. A label set without a label there has no loss for the sample and is not
    judged on it, so no row is lost because another label set lacks it.

    Args:
        labels: names or paths of label sets; None = all label sets of the dataset.
        kinds: label set -> `binary`, `classes` or `number`; None or a missing name = by the column of the values: booleans are
            binary, strings are classes, and integers and floats are numbers.
        weights: None (each label counts the same), `balanced` (each label set counts the same), or label set -> weight of its
            labels (1 where missing). Weights are scaled to a mean of 1 over the labels of train.
        main: label set whose metrics are those of the run; None = their unweighted means over the label sets that have them.
        loss: `squared`, `absolute` or `huber`, of numbers in standard deviations of train.
        monitor: metric on tuning that chooses the best checkpoint.
        prefixes: `hours` and `shares` of `Prefixes`: how often a record is cut before the prediction time when it is trained
            on; None = never.
    """

    is_trained = True
    needs_causal: bool | None = None
    metrics: Sequence[Metric] = (*CLASS_METRICS, *REGRESSION_METRICS)

    @checked("task")
    def __init__(
        self,
        *,
        labels: Sequence[str] | None = None,
        kinds: Mapping[str, str] | None = None,
        weights: str | Mapping[str, float] | None = None,
        main: str | None = None,
        loss: Loss = "squared",
        monitor: str = "loss",
        prefixes: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.labels, self.main, self.kind_of_loss, self.monitor = labels, main, loss, monitor
        self.kinds, self.weights = dict(kinds or {}), weights if isinstance(weights, str) else dict(weights or {})
        for name, kind in self.kinds.items():
            check_setting(f"task.kinds.{name}", kind, Kind)
        if isinstance(self.weights, str) and self.weights != BALANCED:
            raise unknown_name("task.weights", self.weights, [BALANCED])
        if isinstance(self.weights, dict) and (wrong := [name for name, own in self.weights.items() if not own > 0]):
            raise UserError(
                f"task.weights.{wrong[0]}={self.weights[wrong[0]]}: expected a number above 0. Leave a label set out that is not "
                "to be learned: task.labels=[NAME,NAME]"
            )
        self.is_higher_better = metric_named(monitor, self.metrics).is_higher_better
        self.prefixes = None if prefixes is None else Prefixes(**prefixes)
        self.samples: dict[str, Samples] = {}
        self.groups: list[OutputGroup] = []

    @property
    def class_names(self) -> list[str]:
        return [name for group in self.groups for name in group.names]

    @property
    def n_outputs(self) -> int:
        return len(self.class_names)

    @property
    def sizes(self) -> dict[str, Any]:
        return {"num_classes": self.n_outputs, LABEL_OUTPUTS: [group.plain() for group in self.groups]}

    def label_sets(self, labels_dir: Path) -> list[LabelSet]:
        """Return the label sets.

        Raises:
            UserError: there are fewer than two, a name in `kinds`, `weights` or `main` is none of theirs, the kind does not suit
                the values, or no label set has the monitored metric.
        """
        names = available_labels(labels_dir) if self.labels is None else list(self.labels)
        if len(names) < 2:
            raise UserError(
                f"task=multitask needs two label sets or more, got {names}. Type: task.labels=[NAME,NAME], or task=classification"
            )
        found = [read_labels(name, labels_dir) for name in names]
        known = [label_set.name for label_set in found]
        if repeated := sorted({name for name in known if known.count(name) > 1}):
            raise UserError(
                f"task.labels: two label sets have the name {repeated[0]}, and each names columns. Rename one."
            )
        asked = {
            "task.kinds": list(self.kinds),
            "task.weights": list(self.weights) if isinstance(self.weights, dict) else [],
            "task.main": [] if self.main is None else [self.main],
        }
        for key, names in asked.items():
            for name in names:
                if name not in known:
                    raise unknown_name(key, name, known)
        found = [as_numbers(own) if self._kind_of(own) == NUMBER else own for own in found]
        for own in found:
            if (self._kind_of(own) == BINARY) != own.is_boolean or (
                self._kind_of(own) == CLASSES and own.value_column == "float_value"
            ):
                raise UserError(
                    f"task.kinds.{own.name}={self._kind_of(own)}: its values are {own.value_column}. Type: "
                    f"task.kinds.{own.name}={KIND_OF_COLUMN[str(own.value_column)]}"
                )
        judged = [own for own in found if self.main in (None, own.name)]
        if not any(self.monitor in _metrics_of(self._kind_of(own)) for own in judged):
            raise UserError(
                f"task.monitor={self.monitor}: {', '.join(own.name for own in judged)} has no such metric. Type: task.monitor=loss"
            )
        return found

    def _kind_of(self, label_set: LabelSet) -> str:
        return self.kinds.get(label_set.name, KIND_OF_COLUMN[str(label_set.value_column)])

    def setup(self, store: EventStore, labels_dir: Path, max_length: int) -> None:
        self._max_length = max_length
        label_sets = self.label_sets(labels_dir)
        self._events = {split: store.split(split) for split in SPLITS}
        splits = split_labels(joined_labels(label_sets), self._events)
        self.groups = [self._group(own, splits["train"][1][own.name].drop_nulls()) for own in label_sets]
        for split, (events, frame) in splits.items():
            values = np.stack([self._encoded(group, frame[group.name], split) for group in self.groups], axis=1)
            self.samples[split] = build_samples(events, frame, values, max_length=max_length)
            counts = (~np.isnan(self.samples[split].labels)).sum(0).tolist()
            told = ", ".join(f"{group.name} {n:,}" for group, n in zip(self.groups, counts, strict=True))
            log.info("%s: %d samples with labels of %s", split, len(frame), told)
        self._weights_T = self._fit_weights()
        self.thresholds = {group.name: 0.5 for group in self.groups if group.kind == BINARY}

    def _group(self, label_set: LabelSet, values: pl.Series) -> OutputGroup:
        """Return the outputs of a label set, given its values in train."""
        refuse_no_labels(values, label_set.name, "train")
        kind = self._kind_of(label_set)
        if kind == NUMBER:
            numbers = numbers_in(values, label_set.name, "train")
            return OutputGroup(name=label_set.name, kind=kind, mean=float(numbers.mean()), sd=float(numbers.std()))
        names = class_names(label_set, pl.DataFrame({"value": values}))
        return OutputGroup(name=label_set.name, kind=kind, classes=tuple(names))

    def _encoded(self, group: OutputGroup, values: pl.Series, split: str) -> npt.NDArray[np.float64]:
        """Return the labels of one label set, (n,): classes by their index, numbers as they are, NaN where there is none."""
        found, is_known = np.full(len(values), np.nan), values.is_not_null().to_numpy()
        known = values.drop_nulls()
        refuse_no_labels(known, group.name, split)
        if group.kind == NUMBER:
            found[is_known] = numbers_in(known, group.name, split)
        else:
            codes = encode_classes(known, list(group.classes), f"{group.name}, split {split}")
            refuse_missing_classes(codes, list(group.classes), group.name, split)
            found[is_known] = codes
        return found

    def _fit_weights(self) -> Tensor:
        """Return the weight of each label set's labels, (T,), with a mean of 1 over the labels of train."""
        n_T = (~np.isnan(self.samples["train"].labels)).sum(0).astype(np.float64)
        if isinstance(self.weights, str):
            weights_T = 1 / n_T
        else:
            weights_T = np.array([float(self.weights.get(group.name, 1.0)) for group in self.groups])
        return torch.from_numpy(weights_T * n_T.sum() / (weights_T * n_T).sum()).float()

    def dataset(self, split: str, rng: np.random.Generator | None = None) -> BatchDataset:
        samples = drawn(self.prefixes, self._events[split], self.samples[split], rng, max_length=self._max_length)
        return BatchDataset(self._events[split], samples)

    def step(self, model: nn.Module, embedding: EventEmbedding, batch: Batch) -> StepResult:
        """Return the sum of the losses of all labels that are there, their number, and the predictions (B, C)."""
        logits, outputs = logits_of(model, embedding.inputs(batch)), label_outputs_of(model)
        assert isinstance(outputs, LabelOutputs)
        targets_BT = torch.stack(
            [
                outputs.standard(batch.labels[:, t], t) if group.kind == NUMBER else batch.labels[:, t].float()
                for t, group in enumerate(self.groups)
            ],
            dim=1,
        )
        loss_BT = loss_over_members(self.loss, logits, targets_BT)
        return StepResult(loss_BT.sum(), (~targets_BT.isnan()).sum(), outputs.decode(logits))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted loss of each label, (B, T), 0 where there is none, from logits (B, C) and targets (B, T): classes by
        their index, numbers in standard deviations of train, NaN where there is no label."""
        losses, start = [], 0
        for t, group in enumerate(self.groups):
            own, is_known = logits[:, start : start + group.width].float(), ~targets[:, t].isnan()
            start += group.width
            target = targets[:, t].nan_to_num()
            if group.kind == BINARY:
                found = F.binary_cross_entropy_with_logits(own[:, 0], target, reduction="none")
            elif group.kind == CLASSES:
                found = F.cross_entropy(own, target.long(), reduction="none")
            else:
                found = number_loss(self.kind_of_loss, own[:, 0], target)
            losses.append(found * is_known)
        return torch.stack(losses, dim=1) * kept_on(logits.device, self._weights_T)

    def _known(
        self, split: str, outputs: Outputs
    ) -> list[tuple[OutputGroup, npt.NDArray[np.intp], npt.NDArray, Outputs]]:
        """Return per label set its outputs, the samples that have a label, their labels (m,) and predictions (m, width)."""
        parts, start = [], 0
        for t, group in enumerate(self.groups):
            labels = self.samples[split].labels[:, t]
            rows = np.flatnonzero(~np.isnan(labels))
            parts.append((group, rows, labels[rows], outputs[rows, start : start + group.width]))
            start += group.width
        return parts

    def fit_thresholds(self, outputs: Outputs) -> None:
        for group, _, labels, predicted in self._known("tuning", outputs):
            if group.kind == BINARY:
                self.thresholds[group.name] = choose_threshold(labels.astype(np.int64), predicted[:, 0])

    def evaluate(self, split: str, outputs: Outputs, *, n_bootstrap: int) -> dict[str, Any]:
        """Return the metrics of the main label set, or else their means, and under `per_label` those of each."""
        samples = self.samples[split]
        per_label: dict[str, dict[str, Any]] = {}
        for group, rows, labels, predicted in self._known(split, outputs):
            given: dict[str, Any] = {
                "subject_ids": samples.subject_ids[rows],
                "n_bootstrap": n_bootstrap,
                "split_name": f"{split}, {group.name}",
            }
            if group.kind == BINARY:
                threshold = self.thresholds[group.name]
                found = binary_metrics(labels.astype(np.int64), predicted[:, 0], threshold=threshold, **given)
            elif group.kind == CLASSES:
                found = multiclass_metrics(labels.astype(np.int64), predicted, class_names=group.classes, **given)
            else:
                found = regression_metrics(labels, predicted[:, 0], **given)
                standard = torch.from_numpy((predicted[:, 0] - labels) / group.sd)
                loss = number_loss(self.kind_of_loss, standard, torch.zeros(len(labels))).double().mean()
                found |= summaries({"loss": np.array([float(loss)])}, 0.95)
            per_label[group.name] = found
        facts = {"n": len(samples), "n_subjects": len(np.unique(samples.subject_ids)), "per_label": per_label}
        if self.main is not None:
            return per_label[self.main] | {"per_label": per_label}
        by_name: dict[str, list[float]] = {}
        for found in per_label.values():
            for name, value in values_of(found).items():
                by_name.setdefault(name, []).append(value)
        return summaries({name: np.array([np.mean(values)]) for name, values in by_name.items()}, 0.95) | facts

    def write_predictions(self, path: Path, split: str, outputs: Outputs) -> None:
        """Write one row per sample: subject_id, prediction_time, and per label set NAME/label (null where there is none),
        NAME/predicted, and NAME/probability of a binary one or NAME/probability_<class> of each class."""
        samples = self.samples[split]
        columns: dict[str, Any] = dict(samples.meds_keys)
        start = 0
        for t, group in enumerate(self.groups):
            own, labels = outputs[:, start : start + group.width].astype(np.float64), samples.labels[:, t]
            start += group.width
            shown = pl.Series(labels).fill_nan(None)
            if group.kind == NUMBER:
                columns |= {f"{group.name}/label": shown, f"{group.name}/predicted": own[:, 0]}
            elif group.kind == BINARY:
                columns[f"{group.name}/label"] = shown.cast(pl.Boolean)
                columns[f"{group.name}/predicted"] = own[:, 0] >= self.thresholds[group.name]
                columns[f"{group.name}/probability"] = own[:, 0]
            else:
                names = dict(enumerate(group.classes))
                columns[f"{group.name}/label"] = shown.cast(pl.Int64).replace_strict(names, return_dtype=pl.String)
                columns[f"{group.name}/predicted"] = [names[int(best)] for best in own.argmax(1)]
                columns |= {f"{group.name}/probability_{name}": own[:, at] for at, name in names.items()}
        with atomic_path(path) as temporary:
            pl.DataFrame(columns).write_parquet(temporary)

    def curves(self, outputs: dict[str, Outputs]) -> Curves:
        return {
            f"{split}, {group.name}": (labels, predicted[:, 0])
            for split, own in outputs.items()
            for group, _, labels, predicted in self._known(split, own)
            if group.kind == BINARY
        }

    def plots(self, outputs: dict[str, Outputs]) -> dict[str, Callable[[Path], None]]:
        """Return per label set of numbers the plot of labels against predictions of held_out."""
        return {
            f"predicted_{group.name.replace('/', '_')}": partial(
                plot_numbers, labels=labels, predicted=predicted[:, 0], title=f"{group.name}, held out"
            )
            for group, _, labels, predicted in self._known("held_out", outputs["held_out"])
            if group.kind == NUMBER
        }


def _metrics_of(kind: str) -> list[str]:
    """Return the names of the metrics that a label set of a kind has."""
    return ["loss", *(metric.name for metric in (REGRESSION_METRICS if kind == NUMBER else CLASS_METRICS))]


def joined_labels(label_sets: Sequence[LabelSet]) -> LabelSet:
    """Join label sets on subject and prediction time, with one value column per set, null where a set has no label.

    >>> one = LabelSet("a", pl.DataFrame({"subject_id": [1, 2], "prediction_time": [5, 5], "value": ["true", "false"]}), None)
    >>> other = LabelSet("b", pl.DataFrame({"subject_id": [2, 3], "prediction_time": [5, 5], "value": ["0.5", "1"]}), None)
    >>> joined_labels([one, other]).frame.rows()
    [(1, 5, 'true', None), (2, 5, 'false', '0.5'), (3, 5, None, '1')]
    """
    keys = ["subject_id", "prediction_time"]
    frame = label_sets[0].frame.rename({"value": label_sets[0].name})
    for other in label_sets[1:]:
        frame = frame.join(other.frame.rename({"value": other.name}), on=keys, how="full", coalesce=True)
    return LabelSet("+".join(own.name for own in label_sets), frame.sort(keys), label_sets[0].value_column)
