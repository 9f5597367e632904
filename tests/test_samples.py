"""No event after the prediction time is ever visible: checked against a naive oracle."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehr_embed.batches import MICROSECONDS_PER_DAY, BatchDataset
from ehr_embed.errors import UserError
from ehr_embed.samples import build_samples
from ehr_embed.store import STATIC_TIME, SplitEvents

subjects = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(-5, 20), max_size=12)).filter(lambda s: s[0] + len(s[1]) > 0),
    min_size=1,
    max_size=5,
)


def make_events(records: list[tuple[int, list[int]]]) -> tuple[SplitEvents, list[list[int]]]:
    """Events with distinct token ids; days of each record with STATIC_TIME for static ones. Subject ids descend."""
    times = [[STATIC_TIME] * n + [day * MICROSECONDS_PER_DAY for day in sorted(days)] for n, days in records]
    flat = np.array([time for record in times for time in record], np.int64)
    offsets = np.cumsum([0, *map(len, times)])
    ids = np.arange(len(records))[::-1].astype(np.int64) * 7
    return SplitEvents(np.arange(2, 2 + len(flat), dtype=np.int32), flat, None, ids, offsets), times


def label_frame(events: SplitEvents, rows: list[int], days: list[float]) -> pl.DataFrame:
    times = pl.Series([int(day * MICROSECONDS_PER_DAY) for day in days], dtype=pl.Int64).cast(pl.Datetime("us"))
    return pl.DataFrame({"subject_id": events.subject_ids[rows], "prediction_time": times})


@given(subjects, st.data(), st.integers(1, 10))
def test_visible_events_equal_the_naive_oracle(records, data, max_length):
    events, times = make_events(records)
    rows = data.draw(st.lists(st.integers(0, len(records) - 1), min_size=1, max_size=6))
    days = data.draw(st.lists(st.integers(-6, 21), min_size=len(rows), max_size=len(rows)))
    visible = []
    for row, day in zip(rows, days, strict=True):
        ids = range(2 + events.offsets[row], 2 + events.offsets[row + 1])
        pairs = list(zip(ids, times[row], strict=True))
        static = [i for i, time in pairs if time == STATIC_TIME][:max_length]
        timed = [i for i, time in pairs if time != STATIC_TIME and time <= day * MICROSECONDS_PER_DAY]
        room = max_length - len(static)
        visible.append(static + (timed[-room:] if room else []))
    labels = label_frame(events, rows, [float(day) for day in days])
    if not all(visible):
        with pytest.raises(UserError, match="lies before the subject's first event"):
            build_samples(events, labels, np.zeros(len(rows), np.int64), max_length=max_length)
        return
    samples = build_samples(events, labels, np.zeros(len(rows), np.int64), max_length=max_length)
    batch = BatchDataset(events, samples)[np.arange(len(rows))]
    for i, expected in enumerate(visible):
        seen = batch.token_ids[i][batch.is_event[i]]
        assert seen.tolist() == expected
        assert (batch.token_ids[i][~batch.is_event[i]] == 0).all()
        assert (batch.days[i] >= 0).all()
        assert samples.lengths[i] == len(expected)


def test_the_boundary_is_inclusive_and_a_microsecond_matters():
    events, _ = make_events([(0, [1, 2])])
    for microseconds, n in ((0, 2), (-1, 1)):
        time = pl.Series([2 * MICROSECONDS_PER_DAY + microseconds]).cast(pl.Datetime("us"))
        labels = pl.DataFrame({"subject_id": [0], "prediction_time": time})
        assert build_samples(events, labels, np.zeros(1, np.int64), max_length=9).lengths.tolist() == [n]


def test_a_subject_may_have_several_prediction_times():
    events, _ = make_events([(1, [0, 5, 9])])
    labels = label_frame(events, [0, 0, 0], [0.0, 5.0, 30.0])
    assert build_samples(events, labels, np.zeros(3, np.int64), max_length=9).lengths.tolist() == [2, 3, 4]
