"""Builds and checks the samples of a task, and checks its datasets; whoever needs either asks this module."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ehr_embed.data.batches import EventDataset
from ehr_embed.data.boundary import check_boundary, say_unseen
from ehr_embed.data.checked import checked_dataset
from ehr_embed.data.samples import Samples
from ehr_embed.data.store import EventStore
from ehr_embed.tasks.protocol import HasUnlabelled, Task

log = logging.getLogger(__name__)


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
        UserError: the task, `check_boundary` or `say_unseen` refuses the samples.
    """
    task.setup(store, labels_dir, max_length)
    for split, samples in task.samples.items():
        events, where = store.split(split), f"{type(task).__name__}, split {split}"
        check_boundary(events, samples, where=where)
        say_unseen(events, samples, where=where)
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
