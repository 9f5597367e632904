"""Samples: which events of which subject are visible at a prediction time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from ehr_embed.errors import UserError
from ehr_embed.store import STATIC_TIME, SplitEvents


@dataclass(frozen=True)
class Samples:
    """What the model may see, as event indices into a split's arrays, and what it must say.

    A sample's sequence is the subject's static events [static_start, static_stop) followed by [start, stop).

    Attributes:
        subject_ids: (n,) int64.
        prediction_times: (n,) int64, microseconds since 1970-01-01.
        static_start, static_stop, start, stop: (n,) int64.
        labels: (n,) int64, or (n, L) float32 for multi-label tasks.
    """

    subject_ids: npt.NDArray[np.int64]
    prediction_times: npt.NDArray[np.int64]
    static_start: npt.NDArray[np.int64]
    static_stop: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    stop: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.subject_ids)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(n,) events in each sample."""
        return self.static_stop - self.static_start + self.stop - self.start

    def take(self, index: npt.NDArray[np.int64]) -> Samples:
        """The samples at `index`, (m,)."""
        return Samples(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def ragged_searchsorted(
    values: npt.NDArray[np.int64],
    low: npt.NDArray[np.int64],
    high: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """First index in [low, high) whose value is greater than the target, for many ranges at once; `high` if none.

    `values` must be sorted within every range.

    >>> ragged_searchsorted(np.array([1, 2, 2, 0, 5]), np.array([0, 3]), np.array([3, 5]), np.array([2, 4])).tolist()
    [3, 4]
    """
    low, high = low.copy(), high.copy()
    while (open_ranges := np.flatnonzero(low < high)).size:
        middle = (low[open_ranges] + high[open_ranges]) // 2
        visible = values[middle] <= targets[open_ranges]
        low[open_ranges[visible]] = middle[visible] + 1
        high[open_ranges[~visible]] = middle[~visible]
    return low


def build_samples(events: SplitEvents, labels: pl.DataFrame, values: npt.NDArray, *, max_length: int) -> Samples:
    """Visible events of every label: those with time <= prediction_time, the last `max_length` of them.

    Static events are always visible and are kept before the most recent timed ones.

    Args:
        events: the split's events.
        labels: subject_id, prediction_time; every subject is in the split.
        values: (n,) or (n, L) encoded labels, in the order of `labels`.
        max_length: events a sample may have.

    Raises:
        UserError: a label lies before the subject's first event, so that nothing is visible.
    """
    order = np.argsort(events.subject_ids, kind="stable")
    subject_ids = labels["subject_id"].to_numpy()
    rows = order[np.searchsorted(events.subject_ids, subject_ids, sorter=order)]
    first, last = events.offsets[rows], events.offsets[rows + 1]
    times = labels["prediction_time"].cast(pl.Int64).to_numpy()
    stop = ragged_searchsorted(events.times, first, last, times)
    static_stop = ragged_searchsorted(events.times, first, last, np.full_like(times, STATIC_TIME))
    empty = np.flatnonzero(stop == first)
    if len(empty):
        subject, time = labels.row(int(empty[0]))[:2]
        raise UserError(
            f"subject {subject}: prediction_time {time} lies before the subject's first event ({len(empty)} such labels), "
            "so there is nothing to predict from. Remove those rows from the label set."
        )
    static_stop = np.minimum(static_stop, first + max_length)
    start = np.maximum(static_stop, stop - (max_length - (static_stop - first)))
    return Samples(subject_ids, times, first, static_stop, start, np.maximum(stop, start), values)
