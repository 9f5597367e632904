"""Build samples: the events of a subject visible at a prediction time, or windows of a record for pretraining."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ehr_embed.core.errors import UserError
from ehr_embed.data.store import STATIC_TIME, SplitEvents


@dataclass(frozen=True)
class Samples:
    """Samples of one split: the events that the model may see, as indices into the split's arrays, and the labels.

    The sequence of a sample is the static events [static_start, static_stop) followed by the events [start, stop).

    Attributes:
        subject_ids: (n,) int64.
        prediction_times: (n,) int64, microseconds since 1970-01-01.
        birth_times: (n,) int64, microseconds since 1970-01-01, `STATIC_TIME` where unknown.
        static_start, static_stop, start, stop: (n,) int64.
        labels: (n,) int64, (n,) float64 for a task that predicts numbers, or (n, L) float32 for several labels.
    """

    subject_ids: npt.NDArray[np.int64]
    prediction_times: npt.NDArray[np.int64]
    birth_times: npt.NDArray[np.int64]
    static_start: npt.NDArray[np.int64]
    static_stop: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    stop: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | npt.NDArray[np.float32] | npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.subject_ids)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of events of each sample, (n,)."""
        return self.static_stop - self.static_start + self.stop - self.start

    @property
    def meds_keys(self) -> dict[str, npt.NDArray[Any]]:
        """Return the columns subject_id and prediction_time (microseconds since 1970-01-01) of a file with a row per sample."""
        return {"subject_id": self.subject_ids, "prediction_time": self.prediction_times.astype("datetime64[us]")}

    def take(self, index: npt.NDArray[np.int64]) -> Samples:
        """Return the samples at `index`, (m,)."""
        return Samples(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def sharing_rows(samples: Samples) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the samples that are no beginning of another one, (m,), and which of them each sample begins, (n,) from 0 to m - 1.

    A causal model answers for a sample at the place of its last event in the row that it begins, as if the row ended there: the
    samples of one subject at several prediction times cost one pass. Samples that a largest length cut at different events stay
    apart, and so do those without timed events, whose static events have the prediction time for want of another.

    >>> def sample(start, stop):
    ...     return [7, stop, 0, 0, 1, start, stop, 0]
    >>> own, row = sharing_rows(Samples(*np.array([sample(1, 3), sample(1, 5), sample(2, 6), sample(1, 1)]).T))
    >>> own[row].tolist()
    [1, 1, 2, 3]
    """
    has_times = samples.stop > samples.start
    keys = np.stack(
        [samples.static_start, samples.static_stop, samples.start, np.where(has_times, -1, np.arange(len(samples)))]
    )
    row = np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)
    order = np.lexsort((samples.stop, row))
    is_last = np.append(row[order][1:] != row[order][:-1], True)
    return order[is_last], row


def samples_digest(samples: Mapping[str, Samples]) -> str:
    """Return a digest of the subjects, prediction times, visible events and labels of all splits."""
    total = hashlib.sha256()
    for split in sorted(samples):
        total.update(split.encode())
        for array in vars(samples[split]).values():
            total.update(np.ascontiguousarray(array).view(np.uint8).data)
    return total.hexdigest()


def ragged_searchsorted(
    values: npt.NDArray[np.int64],
    low: npt.NDArray[np.int64],
    high: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Return per range the first index in [low, high) whose value exceeds the target; `high` if none does.

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
    """Return one sample per label: the events with time <= prediction_time, of which at most `max_length` are kept.

    Static events are always visible and come first; the most recent timed events fill the rest of the sequence.

    Args:
        events: the split's events.
        labels: subject_id, prediction_time; every subject is in the split.
        values: (n,) or (n, L) encoded labels, in the order of `labels`.
        max_length: largest number of events of a sample.

    Raises:
        UserError: a prediction time lies before the subject's first event, so that no event is visible.
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
    birth_times = events.birth_times[rows]
    return Samples(subject_ids, times, birth_times, first, static_stop, start, np.maximum(stop, start), values)


def ragged_arange(start: npt.NDArray[np.int64], count: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the count[0] numbers from start[0] on, followed by the count[1] numbers from start[1] on, and so on.

    >>> ragged_arange(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    ends = np.cumsum(count)
    return np.arange(int(count.sum())) + np.repeat(start - (ends - count), count)


def window_samples(
    events: SplitEvents, *, max_length: int, which: str, rng: np.random.Generator | None = None
) -> Samples:
    """Cut records into windows, each preceded by its subject's static events, as samples without labels.

    Windows overlap by one event, so that every event but the first of a record is the target of a next-event prediction
    in exactly one window. The exception is the first timed event where some static events had to be left out, as in
    `build_samples`: it is no target. The prediction time of a window is the time of its last event. Windows of a single
    event are left out.

    Args:
        events: the split's events.
        max_length: largest number of events of a window, static ones included.
        which: `all` windows of a record, or only the `last`.
        rng: draws the place of the first cut of a long record; None = windows begin at the beginning of the record.

    Raises:
        UserError: no record has two events.
    """
    first, last = events.offsets[:-1], events.offsets[1:]
    first_timed = ragged_searchsorted(events.times, first, last, np.full_like(first, STATIC_TIME))
    # Beside the static events a window needs room for an event and the next one.
    static_stop = np.minimum(first_timed, first + max_length - 2)
    stride = max_length - (static_stop - first) - 1
    n_timed = last - first_timed
    if which == "last":
        start, stop, row = np.maximum(first_timed, last - stride - 1), last, np.arange(len(first))
    else:
        is_long = n_timed > stride + 1
        phase = np.where(is_long, 0 if rng is None else rng.integers(0, stride), 0)
        count = np.maximum(1, -(-(n_timed - 1 + phase) // stride))
        row = np.repeat(np.arange(len(first)), count)
        origin = first_timed[row] - phase[row] + ragged_arange(np.zeros_like(count), count) * stride[row]
        start = np.maximum(origin, first_timed[row])
        stop = np.minimum(origin + stride[row] + 1, last[row])
    keep = (stop - start >= 1) & (stop - start + static_stop[row] - first[row] >= 2)
    row, start, stop = row[keep], start[keep], stop[keep]
    if not len(row):
        raise UserError(
            "no record has two events, so no next event can be predicted. Use a dataset with longer records."
        )
    labels = np.zeros(len(row), np.int64)
    return Samples(
        events.subject_ids[row],
        events.times[stop - 1],
        events.birth_times[row],
        first[row],
        static_stop[row],
        start,
        stop,
        labels,
    )


def packed_samples(
    events: SplitEvents, *, max_length: int, rng: np.random.Generator
) -> tuple[Samples, npt.NDArray[np.int64]]:
    """Write whole records in random order, one after the other, into rows of `max_length` events.

    A record that does not fit into the rest of a row continues in the next row, where its static events are not
    repeated.

    Returns:
        The pieces of records, as samples without labels, and the row of each piece, ascending.
    """
    order = rng.permutation(len(events.subject_ids))
    length = np.diff(events.offsets)[order]
    record_stop = np.cumsum(length)
    # The concatenated records are cut wherever a record or a row ends.
    row_stops = np.arange(max_length, record_stop[-1], max_length)
    stop = np.union1d(record_stop, row_stops)
    start = np.concatenate([np.zeros(1, np.int64), stop[:-1]])
    record = np.searchsorted(record_stop, start, side="right")
    shift = events.offsets[:-1][order][record] - (record_stop - length)[record]
    start, stop, row = start + shift, stop + shift, start // max_length
    static_stop = ragged_searchsorted(events.times, start, stop, np.full_like(start, STATIC_TIME))
    times = np.where(stop > static_stop, events.times[stop - 1], 0)
    labels = np.zeros(len(row), np.int64)
    subjects, births = events.subject_ids[order][record], events.birth_times[order][record]
    samples = Samples(subjects, times, births, start, static_stop, static_stop, stop, labels)
    return samples, row
