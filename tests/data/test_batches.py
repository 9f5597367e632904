"""Batches: collated by hand, every sample once, similar lengths together."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ehr_embed.data.batches import MICROSECONDS_PER_DAY, BatchDataset, batch_loader
from ehr_embed.data.bucket_sampler import BucketSampler
from ehr_embed.data.samples import build_samples
from ehr_embed.data.store import STATIC_TIME, SplitEvents
from tests.helpers.refusals import refused

DAY = MICROSECONDS_PER_DAY


@pytest.fixture
def dataset() -> BatchDataset:
    """Subject 1: one static event and days 0, 2. Subject 2: day 1 only. Predictions at day 3."""
    times = np.array([STATIC_TIME, 0, 2 * DAY, DAY], np.int64)
    values = np.array([np.nan, 1.5, np.nan, -2.0], np.float32)
    births = np.array([-10 * DAY, STATIC_TIME])
    events = SplitEvents(np.array([5, 6, 7, 8], np.int32), times, values, np.array([1, 2]), np.array([0, 3, 4]), births)
    labels = pl.DataFrame({"subject_id": [1, 2], "prediction_time": pl.Series([3 * DAY] * 2).cast(pl.Datetime("us"))})
    return BatchDataset(events, build_samples(events, labels, np.array([0, 1]), max_length=16))


def test_collate_by_hand(dataset):
    batch = dataset[np.array([1, 0])]
    pad = [0] * 5
    assert batch.token_ids.tolist() == [[8, 0, 0, *pad], [5, 6, 7, *pad]]
    assert batch.is_event.int().tolist() == [[1, 0, 0, *pad], [1, 1, 1, *pad]]
    assert batch.days.tolist() == [[2, 0, 0, *pad], [3, 3, 1, *pad]]
    assert batch.labels.tolist() == [1, 0]
    assert batch.sample.tolist() == [1, 0]
    assert batch.values is not None
    assert batch.values[1, 1] == 1.5
    assert batch.values.isnan().sum() == 14
    assert batch.token_ids.dtype == torch.int32
    assert batch.age_days[1, :3].tolist() == [10, 10, 12], "a static event has the time of the first timed one"
    assert batch.age_days.isnan().sum() == 13, "padding, and the subject whose birth is not known"


def test_gaps_keep_their_minutes_however_long_the_record():
    """Days before the end are float32 and would lose them: a five-minute gap, eighty years before the prediction."""
    start, gap = -40 * 366 * DAY, 5 * DAY // 1440
    times = np.array([STATIC_TIME, start, start + gap, start + gap, 40 * 366 * DAY], np.int64)
    events = SplitEvents(
        np.arange(2, 7, dtype=np.int32), times, None, np.array([1]), np.array([0, 5]), np.array([STATIC_TIME])
    )
    labels = pl.DataFrame({"subject_id": [1], "prediction_time": pl.Series([41 * 366 * DAY]).cast(pl.Datetime("us"))})
    batch = BatchDataset(events, build_samples(events, labels, np.array([0]), max_length=16))[np.array([0])]
    assert (batch.gap_days[0, :4] * 1440).tolist() == pytest.approx([0, 0, 5, 0], rel=1e-5)
    assert batch.elapsed_days[0, 2].item() * 1440 == pytest.approx(5, rel=1e-5)
    assert batch.gap_days[0, 4].item() == pytest.approx(80 * 366, rel=1e-6)
    assert batch.elapsed_days[0, 4].item() == pytest.approx(80 * 366, rel=1e-6)
    assert not batch.gap_days[0, 5:].any()
    assert not batch.elapsed_days[0, 5:].any()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_yields_whole_batches(dataset, num_workers):
    sampler = BucketSampler(dataset.samples.lengths, batch_size=2, batch_tokens=64, shuffle=False)
    batches = list(batch_loader(dataset, sampler, num_workers=num_workers))
    assert [batch.sample.tolist() for batch in batches] == [[0, 1]]


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=200),
    st.integers(1, 20),
    st.integers(104, 500),
    st.booleans(),
    st.integers(1, 3),
)
def test_every_sample_once_within_the_budget(lengths, batch_size, batch_tokens, shuffle, world_size):
    array = np.array(lengths)
    samplers = [
        BucketSampler(
            array, batch_size=batch_size, batch_tokens=batch_tokens, shuffle=shuffle, rank=r, world_size=world_size
        )
        for r in range(world_size)
    ]
    batches = [batch for sampler in samplers for batch in list(sampler)[: sampler.n_own]]
    seen = np.concatenate([np.empty(0, int), *batches])
    assert len(seen) == len(set(seen))
    if not shuffle or world_size == 1:
        assert sorted(seen) == list(range(len(array)))
    # Each rank waits for the others in every batch.
    assert len({len(list(sampler)) for sampler in samplers}) == 1
    assert {len(sampler) for sampler in samplers} == {len(list(samplers[0]))}
    for batch in batches:
        assert len(batch) <= batch_size
        assert len(batch) * (-(-array[batch].max() // 8) * 8) <= batch_tokens


def cut_sample_by_sample(sampler: BucketSampler, order: np.ndarray) -> list[np.ndarray]:
    """The rule of `BucketSampler._cut` as a loop over samples: a batch is closed where the next sample would not fit."""
    batches, start = [], 0
    for stop in range(1, len(order) + 1):
        full = stop - start == sampler.batch_size or stop == len(order)
        if full or (stop - start + 1) * sampler.padded[order[stop]] > sampler.batch_tokens:
            batches.append(order[start:stop])
            start = stop
    return batches


@given(
    st.lists(st.integers(1, 100), max_size=200),
    st.integers(1, 20),
    st.integers(104, 500),
    st.booleans(),
    st.integers(0, 3),
)
def test_batches_are_those_of_a_loop_over_samples(lengths, batch_size, batch_tokens, shuffle, epoch):
    fast, slow = (
        BucketSampler(np.array(lengths, np.int64), batch_size=batch_size, batch_tokens=batch_tokens, shuffle=shuffle)
        for _ in range(2)
    )
    slow._cut = lambda order: cut_sample_by_sample(slow, order)
    for sampler in (fast, slow):
        sampler.set_epoch(epoch)
    assert [batch.tolist() for batch in fast.batches()] == [batch.tolist() for batch in slow.batches()]


def test_epochs_differ_and_seeds_repeat():
    lengths = np.random.default_rng(0).integers(1, 50, 500)

    def order(seed: int, epoch: int) -> list[int]:
        sampler = BucketSampler(lengths, batch_size=8, batch_tokens=1000, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return np.concatenate(list(sampler)).tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


def test_bucketing_saves_padding():
    lengths = np.random.default_rng(0).lognormal(4, 1, 4000).astype(int).clip(1, 512)
    sampler = BucketSampler(lengths, batch_size=32, batch_tokens=16384, shuffle=True)
    padded = sum(len(batch) * lengths[batch].max() for batch in sampler)
    assert lengths.sum() / padded > 0.9


def test_random_batches_do_not_depend_on_length():
    """Sorted together, all samples of a batch have nearly one length; drawn at random, a batch is a small copy of train."""
    lengths = np.random.default_rng(0).lognormal(4, 1, 4000).astype(int).clip(1, 512)

    def spread(n: int) -> float:
        sampler = BucketSampler(lengths, batch_size=100, batch_tokens=100 * 512, shuffle=True, bucket_batches=n)
        batches = list(sampler)
        assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(4000))
        return float(np.std([lengths[batch].mean() for batch in batches]) / lengths.std())

    assert spread(64) > 0.9
    assert spread(1) < 0.2, "about one tenth, the standard error of a mean of a hundred"
    assert spread(1) < spread(8) < spread(64)


def test_events_alone_bound_a_batch_and_fill_it():
    """32 samples of short records fill a fifth of the budget, so the events of a step would differ by as much."""
    lengths = np.random.default_rng(0).lognormal(4, 1, 4000).astype(int).clip(1, 512)
    filling = {}
    for batch_size in (32, None):
        sampler = BucketSampler(lengths, batch_size=batch_size, batch_tokens=4096, shuffle=True)
        batches = list(sampler)
        assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(4000))
        assert max(len(batch) * sampler.padded[batch].max() for batch in batches) <= 4096
        filling[batch_size] = lengths.sum() / len(batches) / 4096
    assert filling[None] > 0.88
    assert filling[32] < 0.7
    assert list(BucketSampler(lengths[:0], batch_size=None, batch_tokens=4096, shuffle=True)) == []


def test_a_sample_over_the_budget_is_refused():
    with refused("trainer.batch_tokens=64", "104 events"):
        BucketSampler(np.array([100]), batch_size=2, batch_tokens=64, shuffle=True)


def test_weights_draw_samples_with_replacement():
    weights = np.r_[np.full(90, 0.5), np.full(10, 5.5)]
    sampler = BucketSampler(np.full(100, 8), batch_size=10, batch_tokens=1000, shuffle=True, weights=weights, seed=1)
    drawn = []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        rows = np.concatenate(list(sampler))
        assert len(rows) == 100
        drawn.append(rows)
    share = float((np.concatenate(drawn) >= 90).mean())
    assert 0.5 < share < 0.6, "5.5 of 10 by weight"
