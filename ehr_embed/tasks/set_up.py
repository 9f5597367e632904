"""The one way in which a task gets its samples: they are built, and then checked, whatever the task is."""

from __future__ import annotations

from pathlib import Path

from ehr_embed.data.boundary import check_boundary
from ehr_embed.data.store import EventStore
from ehr_embed.tasks.protocol import Task


def set_up(task: Task, store: EventStore, labels_dir: Path, max_length: int) -> None:
    """Let a task build the samples of all splits, and refuse them if one reaches past its prediction time.

    Samples that a task draws anew for each epoch are checked as they enter a `BatchDataset` or `PackedDataset`.

    Args:
        task: before `setup`.
        store: events and vocabulary.
        labels_dir: the source's label sets.
        max_length: events a sample may have.

    Raises:
        UserError: what the task refuses; the splits' samples break the boundary, see `check_boundary`.
    """
    task.setup(store, labels_dir, max_length)
    for split, samples in task.samples.items():
        check_boundary(store.split(split), samples, where=f"{type(task).__name__}, split {split}")
