"""The one way in which a task gets its samples: they are built, and then checked, whatever the task is."""

from __future__ import annotations

from pathlib import Path

from ehr_embed.data.boundary import check_boundary, say_unseen
from ehr_embed.data.store import EventStore
from ehr_embed.tasks.protocol import Task


def set_up(task: Task, store: EventStore, labels_dir: Path, max_length: int) -> None:
    """Let a task build the samples of all splits, and check them.

    Samples that reach past their prediction time are refused, and so are splits that see (nearly) nothing but static events.
    Samples that a task draws anew for each epoch are checked as they enter a `BatchDataset` or `PackedDataset`.

    Args:
        task: before `setup`.
        store: events and vocabulary.
        labels_dir: the source's label sets.
        max_length: events a sample may have.

    Raises:
        UserError: what the task, `check_boundary` or `say_unseen` refuses.
    """
    task.setup(store, labels_dir, max_length)
    for split, samples in task.samples.items():
        events, where = store.split(split), f"{type(task).__name__}, split {split}"
        check_boundary(events, samples, where=where)
        say_unseen(events, samples, where=where)
