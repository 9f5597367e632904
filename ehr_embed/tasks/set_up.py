"""Builds and checks the samples of a task; every task gets its samples through this module."""

from __future__ import annotations

from pathlib import Path

from ehr_embed.data.boundary import check_boundary, say_unseen
from ehr_embed.data.store import EventStore
from ehr_embed.tasks.protocol import Task


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
