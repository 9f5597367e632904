"""Builds and checks the samples of a task, and checks its datasets; whoever needs either asks this module."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from inspect import getattr_static
from pathlib import Path

import numpy as np

from ehr_embed.core.errors import UserError
from ehr_embed.data.batches import EventDataset
from ehr_embed.data.boundary import check_boundary, say_unseen
from ehr_embed.data.checked import checked_dataset
from ehr_embed.data.samples import Samples
from ehr_embed.data.store import EventStore
from ehr_embed.evaluation.metric import metric_named
from ehr_embed.tasks.classification import Classification, refuse_missing_classes
from ehr_embed.tasks.protocol import HasUnlabelled, Task

log = logging.getLogger(__name__)


BEFORE_SETUP = (
    *("metrics", "monitor", "is_higher_better", "needs_causal", "is_trained"),
    *("setup", "dataset", "step", "fit_thresholds", "evaluate", "write_predictions", "curves"),
)
"""The attributes and methods that a task must have before `setup`."""
AFTER_SETUP = ("sizes", "class_names", "n_outputs", "samples")
"""The attributes that a task must have after `setup` at the latest."""
WHAT_FOR = {
    "fit_thresholds": "which may do nothing",
    "curves": "which may return {}",
    "class_names": "an empty list for numbers",
}


def check_task(task: Task) -> None:
    """Refuse a task that lacks what would be asked of it hours later, or whose monitored metric is not among its metrics.

    Raises:
        UserError: names what is missing and how it may be given.
    """
    name = type(task).__name__
    refuse_lacking(task, BEFORE_SETUP)
    by_name = {metric.name: metric for metric in task.metrics}
    if task.monitor not in by_name:
        raise UserError(
            f"{name}.monitor={task.monitor!r} is not among the task's metrics ({', '.join(by_name)}): no checkpoint could be "
            f"chosen. Declare the metric in {name}.metrics, or let monitor be one of these"
        )
    if (declared := by_name[task.monitor].is_higher_better) != task.is_higher_better:
        raise UserError(
            f"{name}.is_higher_better={task.is_higher_better}, but {name}.metrics declares is_higher_better={declared} for "
            f"{task.monitor}: the worst checkpoint would be chosen. Let both say the same"
        )


def refuse_lacking(task: Task, names: Sequence[str]) -> None:
    """Refuse a task that lacks one of `names`; a property is not evaluated.

    Raises:
        UserError: names all that are missing.
    """
    nothing = object()
    if lacking := [name for name in names if getattr_static(task, name, nothing) is nothing]:
        told = ", ".join(name + (f" ({WHAT_FOR[name]})" if name in WHAT_FOR else "") for name in lacking)
        raise UserError(
            f"{type(task).__name__} has no {told}: a run asks every task for it, after hours of training in some cases. Add it as "
            "ehr_embed/tasks/protocol.py describes it, or extend a task that has it, such as ehr_embed.api.Classification"
        )


def refuse_one_class(task: Task) -> None:
    """Refuse a split in which a class has no sample, where a task has one class per sample and metrics that need all classes.

    These are the tasks that extend `Classification` and those whose monitored metric is a ranking. A negative label is no class.
    """
    is_ranked = metric_named(task.monitor, task.metrics).is_ranking
    if len(task.class_names) < 2 or not (is_ranked or isinstance(task, Classification)):
        return
    for split, samples in task.samples.items():
        labels = samples.labels
        if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
            codes = labels[labels >= 0].astype(np.int64)
            refuse_missing_classes(codes, task.class_names, type(task).__name__, split, what="task")


def set_up(task: Task, store: EventStore, labels_dir: Path, max_length: int) -> None:
    """Let a task build the samples of all splits, and check the samples.

    A sample that holds events after its prediction time is refused, and so is a split whose samples hold (nearly) no
    timed events. Samples that a task draws anew for each epoch are checked when they enter a `BatchDataset` or
    `PackedDataset`.

    Args:
        task: a task whose `setup` has not been called.
        store: store of the events and the vocabulary.
        labels_dir: folder of the source's label sets.
        max_length: largest number of events per sample.

    Raises:
        UserError: the task lacks something, or `check_boundary` or `say_unseen` refuses the samples, or a split lacks a class.
    """
    check_task(task)
    task.setup(store, labels_dir, max_length)
    refuse_lacking(task, AFTER_SETUP)
    for split, samples in task.samples.items():
        events, where = store.split(split), f"{type(task).__name__}, split {split}"
        check_boundary(events, samples, where=where)
        say_unseen(events, samples, where=where)
    refuse_one_class(task)
    if task.needs_causal is None:  # windows of whole records, as of pretraining, are cut on purpose
        say_cut(task.samples, max_length)


def dataset_of(task: Task, split: str, rng: np.random.Generator | None = None) -> EventDataset:
    """Return the task's dataset of a split, of which no batch shows an event later than its prediction time.

    Args:
        task: after `set_up`.
        split: name of the split.
        rng: draws what the task draws anew for an epoch; None = evaluation.

    Raises:
        UserError: `checked_dataset` refuses the dataset.
    """
    return checked_dataset(task.dataset(split, rng), where=f"{type(task).__name__}, split {split}")


def records_of(task: Task) -> EventDataset:
    """Return train's records at their prediction times, for what needs no labels: those of all train's samples."""
    if not isinstance(task, HasUnlabelled):
        return dataset_of(task, "train")
    return checked_dataset(task.records(), where=f"{type(task).__name__}, records of train")


def say_cut(samples: Mapping[str, Samples], max_length: int) -> None:
    """Log which share of each split's samples have older events than the model reads, if any."""
    shares = {split: float(np.mean(own.start > own.static_stop)) for split, own in samples.items() if len(own)}
    if any(shares.values()):
        log.info(
            "model.max_length=%d: samples with older events, which the model does not read: %s",
            max_length, ", ".join(f"{100 * share:.1f}% of {split}" for split, share in shares.items()),
        )  # fmt: skip
