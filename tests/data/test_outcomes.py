"""Times to outcomes equal a naive oracle, censoring, competing events and the boundary included."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ehr_embed.data.outcomes import (
    CENSORED,
    COMPETING,
    EVENT,
    EXCLUDED,
    TokenPlaces,
    drawn_times,
    follow_up,
)
from ehr_embed.data.samples import build_samples
from ehr_embed.data.store import MICROSECONDS_PER_DAY, STATIC_TIME, SplitEvents
from tests.helpers.ragged_events import label_frame

TOKENS = st.integers(2, 7)
records = st.lists(
    st.tuples(
        st.lists(TOKENS, max_size=2),
        st.lists(st.tuples(st.integers(0, 8), TOKENS), max_size=9),
    ).filter(lambda record: record[0] or record[1]),
    min_size=1,
    max_size=4,
)
sets = st.lists(TOKENS, max_size=3, unique=True)


def as_events(records: list[tuple[list[int], list[tuple[int, int]]]]) -> tuple[SplitEvents, list[list[tuple]]]:
    """Return the arrays of records, and for each record its (day or None, token) pairs in order."""
    pairs = [[(None, token) for token in static] + sorted(timed, key=lambda e: e[0]) for static, timed in records]
    flat = [event for record in pairs for event in record]
    times = np.array([STATIC_TIME if day is None else day * MICROSECONDS_PER_DAY for day, _ in flat], np.int64)
    ids = np.arange(len(records), dtype=np.int64)[::-1] * 3
    return SplitEvents(
        np.array([token for _, token in flat], np.int32),
        times,
        None,
        ids,
        np.cumsum([0, *map(len, pairs)]),
        np.full(len(ids), STATIC_TIME),
    ), pairs


def naive(record, day, outcome, competing, end, excludes_prior):
    """Return (days, status, has_prior) of one sample, event by event."""
    before = [token for when, token in record if when is None or when <= day]
    after = [(when, token) for when, token in record if when is not None and when > day]
    prior = any(token in outcome for token in before)
    rivals = set(competing) - set(outcome)
    if not after or any(token in end for token in before) or any(token in rivals for token in before):
        return np.nan, EXCLUDED, prior
    if prior and excludes_prior:
        return np.nan, EXCLUDED, prior
    until = min([when for when, token in after if token in end] or [after[-1][0]])
    for kind, tokens in ((EVENT, outcome), (COMPETING, rivals)):
        when = min([when for when, token in after if token in tokens and when <= until] or [np.inf])
        other = min([when for when, token in after if token in rivals] or [np.inf])
        if when < np.inf and (kind == COMPETING or when <= other):
            return when - day, kind, prior
    return until - day, CENSORED, prior


@given(records, st.data(), st.lists(sets, min_size=1, max_size=3), sets, sets, st.booleans())
def test_times_equal_the_naive_oracle(records, data, outcomes, competing, end, excludes_prior):
    events, pairs = as_events(records)
    day_of_first = [min((9 if day is None else day) for day, _ in record) for record in pairs]
    rows = data.draw(st.lists(st.integers(0, len(records) - 1), min_size=1, max_size=5))
    days = []
    for row in rows:
        has_static = any(day is None for day, _ in pairs[row])
        days.append(data.draw(st.integers(-1 if has_static else day_of_first[row], 9)))
    frame = label_frame(events, rows, [float(day) for day in days])
    samples = build_samples(events, frame, np.zeros(len(rows), np.int64), max_length=4)
    found = follow_up(
        events,
        samples,
        outcomes,
        places=TokenPlaces(events, 8),
        competing=competing,
        end=end,
        excludes_prior=excludes_prior,
    )
    for i, (row, day) in enumerate(zip(rows, days, strict=True)):
        for k, outcome in enumerate(outcomes):
            expected = naive(pairs[row], day, outcome, competing, end, excludes_prior)
            assert (found.status[i, k], found.has_prior[i, k]) == expected[1:]
            np.testing.assert_equal(found.days[i, k], expected[0])


def test_an_event_at_the_prediction_time_is_prior_and_a_microsecond_later_it_is_an_outcome():
    events, _ = as_events([([], [(0, 2), (5, 3), (9, 2)])])
    for day, expected in ((5.0, EXCLUDED), (5.0 - 1 / MICROSECONDS_PER_DAY, EVENT)):
        samples = build_samples(events, label_frame(events, [0], [day]), np.zeros(1, np.int64), max_length=9)
        found = follow_up(events, samples, [[3]], places=TokenPlaces(events, 8))
        assert found.status.tolist() == [[expected]]


def test_death_before_the_outcome_competes_and_death_itself_is_an_outcome():
    events, _ = as_events([([], [(0, 2), (3, 7), (3, 4)]), ([], [(0, 2), (3, 7), (4, 5)])])
    samples = build_samples(events, label_frame(events, [0, 1], [0.0, 0.0]), np.zeros(2, np.int64), max_length=9)
    found = follow_up(events, samples, [[4], [5], [7]], places=TokenPlaces(events, 8), competing=[7])
    assert found.status.tolist() == [[EVENT, COMPETING, EVENT], [COMPETING, COMPETING, EVENT]]
    assert np.nanmax(found.days) == 3


@given(records, st.integers(1, 3), st.integers(0, 5))
def test_drawn_times_are_those_of_events_before_the_last_one(records, per_record, seed):
    events, pairs = as_events(records)
    subjects, times = drawn_times(events, per_record=per_record, rng=np.random.default_rng(seed))
    for subject, record in zip(events.subject_ids, pairs, strict=True):
        days = {day for day, _ in record if day is not None}
        possible = days - {max(days)} if days else set()
        found = (times[subjects == subject] / MICROSECONDS_PER_DAY).tolist()
        assert len(found) == min(per_record, len(possible)) == len(set(found))
        assert set(found) <= possible
