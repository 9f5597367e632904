"""Builds sparse features of each code at each prediction time, and measures how well each alone ranks a class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ehr_embed.data.batches import MICROSECONDS_PER_DAY
from ehr_embed.data.samples import Samples, ragged_arange
from ehr_embed.data.store import SplitEvents
from ehr_embed.data.vocabulary import Vocabulary

MIN_PER_CLASS = 20
MAX_SAMPLES = 100_000
"""Largest number of samples that are screened, drawn at random; more are not needed to see an AUROC of 0.98."""
CHUNK_EVENTS = 2_000_000
COUNT, PRESENCE, AT_PREDICTION, LAST_VALUE = "count", "presence", "presence at the prediction time", "last value"
RECORD = "record"
RECORD_NAMES = (
    "number of visible events",
    "days from the first visible event to the prediction time",
    "days from the last visible event to the prediction time",
)


@dataclass(frozen=True)
class Entries:
    """The filled cells of a (samples, columns) table.

    Attributes:
        row, column: (m,) sample and column of each cell.
        value: (m,) number in each cell.
        n_columns: number of columns of the table.
        empty_is_zero: whether an empty cell counts as a number below all others; otherwise its sample is left out of
            the column.
    """

    row: npt.NDArray[np.int64]
    column: npt.NDArray[np.int64]
    value: npt.NDArray[np.float64]
    n_columns: int
    empty_is_zero: bool


@dataclass(frozen=True)
class SampleFeatures:
    """Tables of features of the screened samples.

    Attributes:
        rows: (n,) indices of the screened samples among all samples.
        entries: tables by name: `COUNT`, `PRESENCE`, `AT_PREDICTION` and `LAST_VALUE` with one column per code, and
            `RECORD` with the columns of `record_names`.
        record_names: names of the columns of `RECORD`.
    """

    rows: npt.NDArray[np.int64]
    entries: dict[str, Entries]
    record_names: tuple[str, ...] = RECORD_NAMES


def code_groups(vocabulary: Vocabulary) -> tuple[npt.NDArray[np.int64], list[str], npt.NDArray[np.int64]]:
    """Group the tokens by code, so that all value bins of a code form one group.

    Returns:
        The group of each token (V,), the name of each group, and the plain token (without a value bin) of each group.
    """
    tokens, groups = np.unique(vocabulary.plain_tokens, return_inverse=True)
    strings = vocabulary.strings
    return groups.astype(np.int64), [strings[token] for token in tokens], tokens


def sample_features(vocabulary: Vocabulary, events: SplitEvents, samples: Samples, *, seed: int = 0) -> SampleFeatures:
    """Build the features of each code: count, presence, presence at the prediction time, and last value.

    Only events that the model sees count, the events of the sample. A value is the numeric value of the event, or the
    value bin of its token if events carry no values. `CHUNK_EVENTS`, and `MAX_SAMPLES` times the codes per sample,
    bound the memory.
    """
    groups, names, tokens = code_groups(vocabulary)
    n_codes = len(names)
    rows = np.arange(len(samples))
    if len(rows) > MAX_SAMPLES:
        rows = np.sort(np.random.default_rng(seed).permutation(len(samples))[:MAX_SAMPLES])
    chosen = samples.take(rows)
    counted, at_prediction, valued = [], [], []
    for row, event in visible_events(chosen):
        token = events.token_ids[event]
        code = groups[token]
        key = row * n_codes + code
        counted.append(np.unique(key, return_counts=True))
        at_prediction.append(np.unique(key[events.times[event] == chosen.prediction_times[row]]))
        if events.values is not None:
            value = events.values[event].astype(np.float64)
        else:
            value = np.where(token != tokens[code], token, np.nan)
        valued.append(last_of_each(key[~np.isnan(value)], value[~np.isnan(value)]))

    def entries(key: npt.NDArray[np.int64], value: npt.NDArray[np.float64], *, empty_is_zero: bool = True) -> Entries:
        return Entries(key // n_codes, key % n_codes, value, n_codes, empty_is_zero)

    key, count = (np.concatenate(part) for part in zip(*counted, strict=True))
    at = np.concatenate(at_prediction)
    value_key, value = (np.concatenate(part) for part in zip(*valued, strict=True))
    return SampleFeatures(
        rows,
        {
            COUNT: entries(key, count.astype(np.float64)),
            PRESENCE: entries(key, np.ones(len(key))),
            AT_PREDICTION: entries(at, np.ones(len(at))),
            LAST_VALUE: entries(value_key, value, empty_is_zero=False),
            RECORD: record_entries(events, chosen),
        },
    )


def record_entries(events: SplitEvents, samples: Samples) -> Entries:
    """Build the columns of `RECORD_NAMES`; samples without a timed event have no entry in the last two columns."""
    timed = np.flatnonzero(samples.start < samples.stop)
    first, last = events.times[samples.start[timed]], events.times[samples.stop[timed] - 1]
    times = samples.prediction_times[timed]
    parts = [
        (np.arange(len(samples)), samples.lengths),
        (timed, (times - first) / MICROSECONDS_PER_DAY),
        (timed, (times - last) / MICROSECONDS_PER_DAY),
    ]
    row = np.concatenate([part[0] for part in parts])
    column = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
    value = np.concatenate([part[1].astype(np.float64) for part in parts])
    return Entries(row, column, value, len(parts), False)


def visible_events(samples: Samples) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield, in chunks of whole samples, the sample index (N,) and the event index (N,) of each visible event.

    The events of a sample are in the order of its record.
    """
    for begin, end in chunks(samples.lengths, CHUNK_EVENTS):
        part, index = samples.take(np.arange(begin, end)), np.arange(begin, end)
        n_static, n_timed = part.static_stop - part.static_start, part.stop - part.start
        row = np.concatenate([np.repeat(index, n_static), np.repeat(index, n_timed)])
        yield row, np.concatenate([ragged_arange(part.static_start, n_static), ragged_arange(part.start, n_timed)])


def chunks(sizes: npt.NDArray[np.int64], limit: int) -> Iterator[tuple[int, int]]:
    """Yield consecutive ranges of items whose sizes add up to at most `limit`; a larger item is a range by itself.

    >>> list(chunks(np.array([3, 3, 9, 1]), 6))
    [(0, 2), (2, 3), (3, 4)]
    """
    ends, begin = np.cumsum(sizes), 0
    while begin < len(sizes):
        before = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + limit, side="right")))
        yield begin, end
        begin = end


def last_of_each(
    key: npt.NDArray[np.int64], value: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the distinct keys in ascending order, and the last value of each.

    >>> [part.tolist() for part in last_of_each(np.array([2, 1, 2]), np.array([5.0, 6.0, 7.0]))]
    [[1, 2], [6.0, 7.0]]
    """
    distinct, first_from_the_end = np.unique(key[::-1], return_index=True)
    return distinct, value[::-1][first_from_the_end]


def aurocs(entries: Entries, is_class: npt.NDArray[np.bool_], *, min_per_class: int = MIN_PER_CLASS) -> npt.NDArray:
    """Return the AUROC of each column as a score of the class, with ties counting half.

    The AUROC is NaN for a column with fewer than `min_per_class` samples with or without the class.

    Args:
        entries: table of n samples.
        is_class: (n,) whether each sample has the class.
        min_per_class: least number of samples with, and without, the class.

    >>> cells = Entries(np.array([0, 1, 3]), np.array([0, 0, 1]), np.array([1.0, 2.0, 1.0]), 2, True)
    >>> aurocs(cells, np.array([False, True, False, True]), min_per_class=1).tolist()
    [0.625, 0.75]
    """
    m, n_columns = len(entries.row), entries.n_columns
    order = np.lexsort((entries.value, entries.column))
    column, value, y = entries.column[order], entries.value[order], is_class[entries.row[order]]
    filled = np.bincount(column, minlength=n_columns)
    filled_class = np.bincount(column, weights=y, minlength=n_columns)
    if entries.empty_is_zero:
        n, n_class = np.full(n_columns, len(is_class)), np.full(n_columns, int(is_class.sum()))
    else:
        n, n_class = filled, filled_class
    empty_class, empty_other = n_class - filled_class, n - filled - (n_class - filled_class)
    u = empty_class * empty_other / 2.0
    if m:
        start = np.flatnonzero(np.r_[True, (column[1:] != column[:-1]) | (value[1:] != value[:-1])])
        stop = np.r_[start[1:], m]
        others = np.r_[0, np.cumsum(~y)]
        column_start = np.r_[0, np.cumsum(filled)][column[start]]
        tie_others = others[stop] - others[start]
        tie_class = (stop - start) - tie_others
        below = others[start] - others[column_start] + empty_other[column[start]]
        u += np.bincount(column[start], weights=tie_class * (below + tie_others / 2), minlength=n_columns)
    with np.errstate(invalid="ignore", divide="ignore"):
        result = u / (n_class * (n - n_class))
    return np.where(np.minimum(n_class, n - n_class) >= min_per_class, result, np.nan)
