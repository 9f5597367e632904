"""Prefixes: a naive oracle finds the same events, none later than the moved prediction time; evaluation is never cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ehr_embed.core.errors import UserError
from ehr_embed.data.boundary import check_boundary
from ehr_embed.data.prefixes import MICROSECONDS_PER_HOUR, Prefixes, cut
from ehr_embed.data.samples import build_samples
from ehr_embed.data.store import STATIC_TIME, SplitEvents, build_store
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.sources.meds import MedsSource
from ehr_embed.tasks.classification import Classification

record = st.lists(st.none() | st.integers(0, 60), min_size=1, max_size=9)


def events_of(records: list[list[int | None]]) -> SplitEvents:
    """Events at whole hours, None = static; a record has one at hour 0 at least."""
    times = [
        sorted([STATIC_TIME if h is None else h * MICROSECONDS_PER_HOUR for h in hours] + [0]) for hours in records
    ]
    n = [len(row) for row in times]
    return SplitEvents(
        token_ids=np.arange(sum(n), dtype=np.int32),
        times=np.array([t for row in times for t in row], np.int64),
        values=None,
        subject_ids=np.arange(len(n))[::-1].copy() + 5,
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(n)]),
        birth_times=np.full(len(n), STATIC_TIME),
    )


@settings(max_examples=80, deadline=None)
@given(st.lists(record, min_size=1, max_size=4), st.integers(3, 8), st.integers(0, 50), st.randoms())
def test_a_cut_sample_is_that_of_an_earlier_prediction_time(records, max_length, at, random):
    events = events_of(records)
    subjects = events.subject_ids
    labels = pl.DataFrame(
        {"subject_id": subjects, "prediction_time": np.full(len(subjects), at * MICROSECONDS_PER_HOUR)}
    )
    samples = build_samples(events, labels, np.zeros(len(subjects), np.int64), max_length=max_length)
    hours = np.array([random.choice([0.0, 6.0, 24.0]) for _ in subjects])
    found = cut(events, samples, hours, max_length=max_length)
    check_boundary(events, found)
    for i, back in enumerate(hours):
        moved = (at - back) * MICROSECONDS_PER_HOUR
        first, last = events.offsets[i : i + 2]
        own = events.times[first:last]
        has_timed = ((own != STATIC_TIME) & (own <= moved)).any()
        time = moved if has_timed else at * MICROSECONDS_PER_HOUR
        assert found.prediction_times[i] == time
        static = [first + j for j, t in enumerate(own) if t == STATIC_TIME][:max_length]
        timed = [first + j for j, t in enumerate(own) if t != STATIC_TIME and t <= time]
        kept = timed[len(timed) - min(len(timed), max_length - len(static)) :]
        seen = [*range(found.static_start[i], found.static_stop[i]), *range(found.start[i], found.stop[i])]
        assert seen == static + kept


def test_shares_are_kept_and_the_draw_is_the_seeds():
    events = events_of([[20, 40, 50]] * 400)
    times = np.full(400, 50 * MICROSECONDS_PER_HOUR)
    labels = pl.DataFrame({"subject_id": events.subject_ids, "prediction_time": times})
    samples = build_samples(events, labels, np.zeros(400, np.int64), max_length=9)
    prefixes = Prefixes(hours=[12, 24], shares=[0.2, 0.3])
    first, again = (prefixes.draw(events, samples, np.random.default_rng(1), max_length=9) for _ in range(2))
    assert np.array_equal(first.prediction_times, again.prediction_times)
    back = (times - first.prediction_times) / MICROSECONDS_PER_HOUR
    assert {hours: round((back == hours).mean(), 1) for hours in (0, 12, 24)} == {0: 0.5, 12: 0.2, 24: 0.3}


def test_only_training_is_cut(tiny: Path, tmp_path: Path):
    store = build_store(tmp_path / "store", MedsSource(root=str(tiny)), VocabularySettings(min_count=1))
    task = Classification(prefixes={"hours": [30], "shares": [1.0]})
    task.setup(store, tiny / "labels", 16)
    assert task.dataset("train").lengths.tolist() == [4, 4, 4], "sex, two of day 1, one of day 0"
    assert task.dataset("train", np.random.default_rng(0)).lengths.tolist() == [2, 2, 2], "sex, and day 0"


@pytest.mark.parametrize(
    "options", [{"hours": [1], "shares": []}, {"hours": [0], "shares": [0.1]}, {"shares": [0.8, 0.3]}]
)
def test_wrong_prefixes_are_refused(options):
    with pytest.raises(UserError, match=r"task\.prefixes"):
        Classification(prefixes=options)
