"""Hold every dataset to the time boundary, also one whose class or samples are a task's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.data.batches import Batch, BatchDataset, EventDataset, PackedDataset
from ehr_embed.data.boundary import REMEDY, check_boundary
from ehr_embed.data.samples import Samples

GATHERS = (BatchDataset.__getitem__, BatchDataset.on)
NEEDED = ("events", "lengths", "on", "__len__", "__getitem__")


def checked_dataset(dataset: EventDataset, *, where: str) -> EventDataset:
    """Return a dataset of which no batch shows an event later than its prediction time.

    `BatchDataset` and `PackedDataset` check their samples when they are built, and are returned as they are. Of a dataset of any
    other class, such as a subclass with a constructor of its own, the samples are checked here, if it has any, and each batch when
    it is read, unless it gathers its batches from these samples as `BatchDataset` does. Reading a batch's days makes the host wait
    for the device.

    Args:
        dataset: what a task returned.
        where: the task and the split, for the message.

    Raises:
        UserError: a sample shows a later event or one of another record, or the object is no dataset of events.
    """
    if missing := [name for name in NEEDED if not hasattr(dataset, name)]:
        raise UserError(
            f"{where}: dataset() returned a {type(dataset).__name__} without {', '.join(missing)}. Expected an EventDataset "
            "(ehr_embed/data/batches.py). Return ehr_embed.api.BatchDataset(events, samples)"
        )
    kind, samples = type(dataset), getattr(dataset, "samples", None)
    if isinstance(samples, Samples) and samples is not getattr(dataset, "checked_samples", None):
        check_boundary(dataset.events, samples, where=where)
    if kind in (BatchDataset, PackedDataset):
        return dataset
    gathers_as_own = isinstance(dataset, BatchDataset) and (kind.__getitem__, kind.on) == GATHERS
    # A property could give other samples later.
    are_checked = gathers_as_own and isinstance(vars(dataset).get("samples"), Samples)
    return dataset if are_checked else _CheckedBatches(dataset, where)


class _CheckedBatches:
    """A dataset whose batches are checked when they are read."""

    def __init__(self, dataset: EventDataset, where: str) -> None:
        self._dataset, self._where = dataset, where
        self.events = dataset.events
        if isinstance(samples := getattr(dataset, "samples", None), Samples):
            self.samples = samples

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return self._dataset.lengths

    def on(self, device: torch.device) -> _CheckedBatches:
        return _CheckedBatches(self._dataset.on(device), self._where)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: npt.NDArray[np.int64]) -> Batch:
        batch: Any = self._dataset[index]
        if not isinstance(batch, Batch):
            raise UserError(
                f"{self._where}: the dataset returned a {type(batch).__name__}, expected a Batch. Return "
                "ehr_embed.api.BatchDataset(events, samples), or let your class extend it"
            )
        is_late = batch.is_event & (batch.days < 0)
        if bool(is_late.any()):
            days = -float(batch.days.masked_fill(~is_late, 0).min())
            raise UserError(
                f"{self._where}: a batch shows events up to {days:.4g} days after their prediction time (Batch.days is negative "
                f"there): metrics of a model that sees later events would be meaningless. {REMEDY}."
            )
        return batch
