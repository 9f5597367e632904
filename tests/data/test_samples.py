"""No event after the prediction time is ever visible: checked against a naive oracle."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehr_embed.core.errors import UserError
from ehr_embed.data.batches import MICROSECONDS_PER_DAY, BatchDataset, PackedDataset
from ehr_embed.data.samples import build_samples, packed_samples, window_samples
from ehr_embed.data.store import STATIC_TIME, SplitEvents
from tests.helpers.ragged_events import label_frame, make_events, subjects


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
        with pytest.raises(
            UserError, match=r"subject \d+: prediction_time \d\S+ .*Remove those rows from the label set"
        ):
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


record_strategy = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(-5, 20), min_size=1, max_size=30)), min_size=1, max_size=5
)


def predicted(dataset: BatchDataset | PackedDataset) -> list[tuple[int, int]]:
    """(event before, event) token ids of every event a batch marks as the next one of its predecessor."""
    batch = dataset[np.arange(len(dataset))]
    rows, places = batch.is_next.nonzero(as_tuple=True)
    return [(int(batch.token_ids[r, t - 1]), int(batch.token_ids[r, t])) for r, t in zip(rows, places, strict=True)]


def successors(events: SplitEvents, *, keep: set[int]) -> list[tuple[int, int]]:
    """The same by brute force: neighbours in a record whose second one is timed and one of `keep`."""
    pairs = []
    for first, last in zip(events.offsets[:-1], events.offsets[1:], strict=True):
        pairs += [(i + 1, i + 2) for i in range(first + 1, last) if events.times[i] != STATIC_TIME and i + 2 in keep]
    return pairs


@given(record_strategy, st.integers(6, 14), st.integers(0, 5), st.booleans())
def test_windows_predict_every_event_once(records, max_length, seed, is_random):
    events, _ = make_events(records)
    if np.diff(events.offsets).max() < 2:
        return
    rng = np.random.default_rng(seed) if is_random else None
    samples = window_samples(events, max_length=max_length, which="all", rng=rng)
    assert samples.lengths.max() <= max_length
    assert samples.lengths.min() >= 2
    everything = set(range(2, 2 + len(events.token_ids)))
    assert sorted(predicted(BatchDataset(events, samples))) == sorted(successors(events, keep=everything))
    assert (BatchDataset(events, samples)[np.arange(len(samples))].days >= 0).all()


@pytest.mark.parametrize("which", ["all", "last"])
def test_no_window_begins_among_static_events_that_do_not_fit(which):
    events, _ = make_events([(10, list(range(20)))])
    samples = window_samples(events, max_length=6, which=which)
    assert samples.lengths.max() <= 6
    batch = BatchDataset(events, samples)[np.arange(len(samples))]
    assert batch.is_static.sum(1).tolist() == [4] * len(samples)
    assert (samples.prediction_times > STATIC_TIME).all()
    assert batch.days.min() >= 0
    assert len(predicted(BatchDataset(events, samples))) == (19 if which == "all" else 1)


def test_the_last_window_holds_static_events_and_the_last_ones():
    events, _ = make_events([(2, list(range(20))), (0, [1])])
    samples = window_samples(events, max_length=8, which="last")
    batch = BatchDataset(events, samples)[np.array([0])]
    assert len(samples) == 1, "a record of one event predicts nothing"
    assert batch.token_ids[0].tolist() == [2, 3, *range(18, 24)]
    assert batch.is_next[0].tolist() == [False, False, False, True, True, True, True, True]
    with pytest.raises(UserError, match="Use a dataset with longer records"):
        window_samples(make_events([(0, [1])])[0], max_length=8, which="last")


def test_random_windows_differ_from_epoch_to_epoch():
    events, _ = make_events([(0, list(range(50)))])
    cuts = {
        tuple(window_samples(events, max_length=9, which="all", rng=np.random.default_rng(s)).start) for s in range(9)
    }
    assert len(cuts) > 3


@given(record_strategy, st.integers(3, 14), st.integers(0, 5))
def test_packed_rows_hold_every_event_once(records, max_length, seed):
    events, _ = make_events(records)
    samples, row = packed_samples(events, max_length=max_length, rng=np.random.default_rng(seed))
    dataset = PackedDataset(events, samples, row)
    batch = dataset[np.arange(len(dataset))]
    assert sorted(batch.token_ids[batch.is_event].tolist()) == sorted(events.token_ids.tolist())
    assert (dataset.lengths[:-1] == max_length).all(), "only the last row may have room"
    assert batch.segments is not None
    record_of = np.repeat(np.arange(len(records)), np.diff(events.offsets))
    for tokens, segments in zip(batch.token_ids.tolist(), batch.segments.tolist(), strict=True):
        seen: dict[int, list[int]] = {}
        for token, segment in zip(tokens, segments, strict=True):
            assert (token == 0) == (segment == 0)
            if token:
                seen.setdefault(segment, []).append(token)
        for sequence in seen.values():
            assert len({record_of[token - 2] for token in sequence}) == 1, "a sequence holds one subject"
            assert sequence == list(range(sequence[0], sequence[0] + len(sequence)))
    # The predicted event is the one that follows within a sequence.
    pairs = predicted(dataset)
    assert all(after == before + 1 and record_of[before - 2] == record_of[after - 2] for before, after in pairs)
    assert not batch.is_next[:, 0].any()
