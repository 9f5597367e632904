"""Classification with one label per prediction time, which is binary or one of several classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.lost_data import ONLY_SAID, say_or_refuse
from ehr_embed.core.settings import DrawSeed, ShareBelow1, Told, checked
from ehr_embed.core.transfer import kept_on
from ehr_embed.data.batches import Batch, BatchDataset
from ehr_embed.data.labels import LabelSet, read_labels
from ehr_embed.data.pool import Pool
from ehr_embed.data.prefixes import Prefixes, drawn
from ehr_embed.data.samples import Samples, build_samples
from ehr_embed.data.store import EventStore, SplitEvents
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.evaluation.metric import Metric, metric_named
from ehr_embed.evaluation.metrics import CLASS_METRICS, binary_metrics, choose_threshold, multiclass_metrics
from ehr_embed.evaluation.predictions import write_multiclass_predictions, write_predictions
from ehr_embed.models.members import loss_over_members, over_members
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.tasks.protocol import (
    Curves,
    Outputs,
    StepResult,
    as_tensor,
    check_class_weights,
    check_losses,
    logits_of,
)

Fraction = Annotated[float, Field(gt=0, le=1), Told("a share of train's subjects in (0, 1]")]


class Classification:
    """Predicts the classes of a MEDS label set; two classes are evaluated as a binary task.

    Args:
        labels: name or path of a label set; None = the only label set of the dataset.
        class_weights: None, "balanced" (inverse frequency in train), or one weight per class. Weights are scaled to a
            mean of 1 over the samples of train.
        label_smoothing: share of the target probability that is spread over all classes, in [0, 1).
        monitor: metric on tuning that chooses the best checkpoint; with more than two classes, its mean over classes.
        shuffle_labels: seed with which the labels are permuted within each split, to check for leaks; None = off.
        label_fraction: share of the labelled subjects of train that are used, in (0, 1]; tuning and held_out stay
            whole. A list gives one share for each dataset of data.roots.
        fraction_seed: seed that draws those subjects.
        prefixes: `hours` and `shares` of `Prefixes`: how often a record is cut before the prediction time when it is trained
            on; None = never.
    """

    @checked("task")
    def __init__(
        self,
        *,
        labels: str | None = None,
        class_weights: str | Sequence[float] | None = None,
        label_smoothing: ShareBelow1 = 0.0,
        monitor: str = "auroc",
        shuffle_labels: DrawSeed | None = None,
        label_fraction: Fraction | Sequence[Fraction] = 1.0,
        fraction_seed: DrawSeed = 0,
        prefixes: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.labels, self.class_weights, self.monitor = labels, class_weights, monitor
        self.is_higher_better = metric_named(monitor, self.metrics).is_higher_better
        self.shuffle_labels = shuffle_labels
        self.label_smoothing = label_smoothing
        check_class_weights(class_weights)
        self.label_fraction, self.fraction_seed = label_fraction, fraction_seed
        self.prefixes = None if prefixes is None else Prefixes(**prefixes)
        self.samples: dict[str, Samples] = {}
        self.class_names: list[str] = []
        self.threshold = 0.5

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def sizes(self) -> dict[str, int]:
        return {"num_classes": self.num_classes}

    @property
    def n_outputs(self) -> int:
        return self.num_classes

    is_trained = True
    needs_causal: bool | None = None
    metrics: Sequence[Metric] = CLASS_METRICS

    def label_sets(self, labels_dir: Path) -> list[LabelSet]:
        """Return the label set.

        Raises:
            UserError: its values are numbers with fractions, which are no classes.
        """
        found = read_labels(self.labels, labels_dir)
        if found.value_column == "float_value":
            raise UserError(f"label set {found.name} has float_value: numbers are no classes. Type: task=regression")
        return [found]

    def label_set(self, store: EventStore, labels_dir: Path) -> LabelSet:
        """Return the labels of all splits; `ClassesFromRecords` computes them from the records of `store`."""
        (found,) = self.label_sets(labels_dir)
        return found

    def setup(self, store: EventStore, labels_dir: Path, max_length: int) -> None:
        self._max_length = max_length
        label_set = self.label_set(store, labels_dir)
        splits = split_labels(label_set, {split: store.split(split) for split in SPLITS})
        self._events = {split: events for split, (events, _) in splits.items()}
        train_events, train_labels = splits["train"]
        none = np.zeros(len(train_labels), np.int64)
        self._records = build_samples(train_events, train_labels, none, max_length=max_length)
        splits["train"] = train_events, self._drawn(train_labels, Pool.of(store.manifest))
        self.class_names = class_names(label_set, splits["train"][1])
        for split, (events, frame) in splits.items():
            codes = encode_classes(frame["value"], self.class_names, f"{label_set.name}, split {split}")
            refuse_missing_classes(codes, self.class_names, label_set.name, split)
            if self.shuffle_labels is not None:
                codes = np.random.default_rng(self.shuffle_labels).permutation(codes)
            self.samples[split] = build_samples(events, frame, codes, max_length=max_length)
        self._weights = self._fit_weights(self.samples["train"].labels)

    def _drawn(self, labels: pl.DataFrame, pool: Pool | None) -> pl.DataFrame:
        """Return the label rows of the share of train's subjects that are used; of a pool, of each dataset's own."""
        if not isinstance(self.label_fraction, Sequence):
            return draw_subjects(labels, self.label_fraction, self.fraction_seed)
        if pool is None or len(self.label_fraction) != len(pool.names):
            raise UserError(
                f"task.label_fraction={list(self.label_fraction)}: expected one share, or with data=pooled one for each dataset of "
                f"data.roots{'' if pool is None else f' ({len(pool.names)})'}. Type: task.label_fraction=0.1"
            )
        number = pl.Series(pool.of_subjects(labels["subject_id"].to_numpy()))
        parts = [labels.filter(number == n) for n in range(len(pool.names))]
        return pl.concat(
            draw_subjects(part, share, self.fraction_seed) if len(part) else part
            for part, share in zip(parts, self.label_fraction, strict=True)
        )

    def _fit_weights(self, labels: npt.NDArray) -> Tensor | None:
        if self.class_weights is None:
            return None
        if isinstance(self.class_weights, str):
            if self.class_weights != "balanced":
                raise UserError(
                    f"task.class_weights={self.class_weights}: expected null, balanced, or one number per class."
                )
            return _of_mean_one(1 / np.bincount(labels, minlength=self.num_classes), labels)
        if len(self.class_weights) != self.num_classes:
            raise UserError(
                f"task.class_weights has {len(self.class_weights)} numbers, but there are {self.num_classes} classes: "
                f"{', '.join(self.class_names)}. Give one weight per class, in this order."
            )
        return _of_mean_one(np.array(self.class_weights, np.float64), labels)

    def sample_weights(self, split: str) -> npt.NDArray[np.float64]:
        """Return the weight of each sample's class, (n,)."""
        labels = self.samples[split].labels
        return np.ones(len(labels)) if self._weights is None else self._weights.double().numpy()[labels]

    def dataset(self, split: str, rng: np.random.Generator | None = None) -> BatchDataset:
        samples = drawn(self.prefixes, self._events[split], self.samples[split], rng, max_length=self._max_length)
        return BatchDataset(self._events[split], samples)

    def records(self) -> BatchDataset:
        """Return train's records, with those of the subjects that `label_fraction` leaves out; all labels are 0."""
        return BatchDataset(self._events["train"], self._records)

    def step(self, model: nn.Module, embedding: EventEmbedding, batch: Batch) -> StepResult:
        """Return the sum of the samples' losses, their number, and the probabilities of the classes, whose rows sum to one."""
        logits = logits_of(model, embedding.inputs(batch))
        loss_B = loss_over_members(self.loss, logits, batch.labels)
        example = ', as in: F.cross_entropy(logits, labels, reduction="none")'
        check_losses(self, loss_B, batch.labels.shape[:1], "sample", example)
        return StepResult(loss_B.sum(), len(loss_B), self.probabilities(logits))

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        """Return the probabilities of the classes, (B, C) float64, from a model's logits (B, C), or (B, M, C) of M members."""
        return over_members(logits.detach().double().softmax(-1))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of each sample times the weight of its class, (B,), from logits (B, C) and classes (B,), or the
        classes' probabilities (B, C) where a teacher speaks.

        The weight of the sample's class multiplies the whole loss, its label-smoothing part included. torch's `weight`
        argument would use the weights of all classes in the smoothing part, where the weight of a rare class may
        dominate.
        """
        loss_B = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing, reduction="none")
        if self._weights is None:
            return loss_B
        weights_C = kept_on(labels.device, self._weights)
        return loss_B * (labels @ weights_C if labels.is_floating_point() else weights_C[labels])

    def fit_thresholds(self, outputs: Outputs) -> None:
        if self.num_classes == 2:
            self.threshold = choose_threshold(self.samples["tuning"].labels, outputs[:, 1])

    def evaluate(self, split: str, outputs: Outputs, *, n_bootstrap: int) -> dict[str, Any]:
        samples = self.samples[split]
        if self.num_classes == 2:
            return binary_metrics(
                samples.labels,
                outputs[:, 1],
                threshold=self.threshold,
                subject_ids=samples.subject_ids,
                n_bootstrap=n_bootstrap,
                split_name=split,
            )
        return multiclass_metrics(
            samples.labels,
            outputs,
            class_names=self.class_names,
            subject_ids=samples.subject_ids,
            n_bootstrap=n_bootstrap,
            split_name=split,
        )

    def write_predictions(self, path: Path, split: str, outputs: Outputs) -> None:
        samples = self.samples[split]
        times = samples.prediction_times.astype("datetime64[us]")
        if self.num_classes == 2:
            write_predictions(
                path,
                subject_ids=samples.subject_ids,
                prediction_times=times,
                labels=samples.labels,
                probabilities=outputs[:, 1],
                threshold=self.threshold,
            )
        else:
            write_multiclass_predictions(
                path,
                subject_ids=samples.subject_ids,
                prediction_times=times,
                labels=samples.labels,
                probabilities=outputs,
                class_names=self.class_names,
            )

    def curves(self, outputs: dict[str, Outputs]) -> Curves:
        if self.num_classes != 2:
            return {}
        return {split: (self.samples[split].labels, p[:, 1]) for split, p in outputs.items()}


def _of_mean_one(weights: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> Tensor:
    """Return class weights (C,) scaled to a mean of 1 over the samples with classes `labels` (n,).

    >>> _of_mean_one(np.array([1.0, 3.0]), np.array([0, 0, 0, 1])).tolist()
    [0.6666666865348816, 2.0]
    """
    return as_tensor(weights / weights[labels].mean())


def split_labels(labels: LabelSet, events: dict[str, SplitEvents]) -> dict[str, tuple[SplitEvents, pl.DataFrame]]:
    """Return the events of each split with the label rows of its subjects.

    Raises:
        UserError: no labelled subject has events, or a split has no labels.
    """
    parts = {}
    known = pl.concat([pl.Series(split.subject_ids) for split in events.values()])
    absent = labels.frame.filter(~pl.col("subject_id").is_in(known.implode()))["subject_id"].unique().sort()
    if len(absent) == labels.frame["subject_id"].n_unique():
        raise UserError(
            f"label set {labels.name}: none of its {len(absent)} subjects (such as {absent[0]}) has events in the dataset. "
            "Point task.labels and data.root at the same dataset."
        )
    if len(absent):
        say_or_refuse(
            len(absent),
            labels.frame["subject_id"].n_unique(),
            f"subjects of the label set {labels.name} (such as {absent[0]}) have no events in any split; their labels are "
            "left out",
            remedy="Point task.labels and data.root at the same dataset, or look at its splits.",
            refused_from=ONLY_SAID,  # a user's splits file may name a small part of the labelled subjects
        )
    for split, arrays in events.items():
        frame = labels.frame.filter(pl.col("subject_id").is_in(pl.Series(arrays.subject_ids).implode()))
        refuse_no_labels(frame, labels.name, split)
        parts[split] = (arrays, frame)
    return parts


def refuse_no_labels(rows: pl.DataFrame | pl.Series, name: str, split: str) -> None:
    """Refuse a split for which a label set has no rows.

    Raises:
        UserError: names the label set and the split.
    """
    if not len(rows):
        raise UserError(
            f"label set {name}: no labels for the {split} split; expected some in each of {', '.join(SPLITS)}."
        )


def draw_subjects(labels: pl.DataFrame, fraction: float, seed: int) -> pl.DataFrame:
    """Return the label rows of a random share of the subjects, of at least one subject.

    >>> labels = pl.DataFrame({"subject_id": [1, 1, 2, 3, 4]})
    >>> len(draw_subjects(labels, 0.5, 0)["subject_id"].unique()), len(draw_subjects(labels, 1.0, 0))
    (2, 5)
    """
    subjects = labels["subject_id"].unique().sort().to_numpy()
    n_drawn = max(1, round(fraction * len(subjects)))
    drawn = np.random.default_rng(seed).permutation(subjects)[:n_drawn]
    return labels.filter(pl.col("subject_id").is_in(pl.Series(drawn).implode()))


def check_boolean(task: Classification, name: str) -> None:
    """Refuse a label set whose values are no booleans.

    Args:
        task: a task that was set up.
        name: its name in `task=NAME`.

    Raises:
        UserError: names the classes.
    """
    if task.class_names != ["false", "true"]:
        raise UserError(f"task={name} takes boolean labels, got classes {', '.join(task.class_names)}.")


def class_names(labels: LabelSet, train: pl.DataFrame) -> list[str]:
    """Return the class names in the order of their indices.

    Booleans are in the order false, true, integers in numeric order, and other classes in alphabetical order.
    """
    if labels.is_boolean:
        return ["false", "true"]
    found = train["value"].unique().to_list()
    return sorted(found, key=int) if labels.value_column == "integer_value" else sorted(found)


def encode_classes(values: pl.Series, names: list[str], where: str) -> npt.NDArray[np.int64]:
    """Return the class index of each value, (n,).

    Raises:
        UserError: a class does not occur in train.
    """
    index = {name: i for i, name in enumerate(names)}
    if strangers := sorted(set(values.unique()) - set(index)):
        raise UserError(
            f"{where}: classes {', '.join(strangers)} do not occur in train ({', '.join(names)}), so none can be learned."
        )
    return np.array([index[value] for value in values.to_list()], dtype=np.int64)


def refuse_missing_classes(
    codes: npt.NDArray[np.int64], names: list[str], of: str, split: str, *, what: str = "label set"
) -> None:
    """Refuse a split without samples of some class, or with one class in all, because its metrics would be undefined.

    Args:
        codes: (n,) the class of each sample.
        names: names of the classes.
        of: name of the label set or task.
        split: name of the split.
        what: what `of` names.

    Raises:
        UserError: a class is missing; the message names the split and the count of each class.
    """
    counts = np.bincount(codes, minlength=max(2, len(names)))
    missing = [name for name, n in zip(names, counts, strict=False) if n == 0]
    if missing or len(names) < 2:
        have = ", ".join(f"{name}: {n}" for name, n in zip(names, counts, strict=False))
        raise UserError(
            f"{what} {of}, split {split}: only one class, or a class is missing ({have}). AUROC and the threshold would be "
            "undefined. Choose other labels, or splits in which every class occurs."
        )
