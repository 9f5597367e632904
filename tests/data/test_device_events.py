"""Batches gathered where the events are: every field as by hand, no event after the prediction time, nothing read back."""

from __future__ import annotations

import gc
import pickle
import weakref
from dataclasses import fields

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ehr_embed.core.errors import UserError
from ehr_embed.data import device_events as module
from ehr_embed.data.batches import HOST, MICROSECONDS_PER_DAY, Batch, BatchDataset, PackedDataset, batch_loader
from ehr_embed.data.bucket_sampler import BucketSampler
from ehr_embed.data.device_events import GIB, event_tensors, is_gathered_there
from ehr_embed.data.samples import Samples, build_samples, packed_samples, window_samples
from ehr_embed.data.store import STATIC_TIME, SplitEvents
from ehr_embed.embedding.event_embedding import EventEmbedding
from tests.helpers.planted import planted, train, without_times  # noqa: F401
from tests.helpers.refusals import refused

YEAR = 366 * MICROSECONDS_PER_DAY
GPU = torch.device("cuda", 0)

records = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.lists(st.integers(-60 * YEAR, 60 * YEAR), min_size=1, max_size=20),
        st.one_of(st.just(STATIC_TIME), st.integers(-90 * YEAR, 10 * YEAR)),
    ),
    min_size=1,
    max_size=5,
)
"""Each subject's number of static events, times of the other events, and birth."""


def make_events(subjects: list[tuple[int, list[int], int]], *, has_values: bool = True) -> SplitEvents:
    """Token ids are distinct; every third event has no value."""
    times = np.array([t for n, timed, _ in subjects for t in [STATIC_TIME] * n + sorted(timed)], np.int64)
    offsets = np.cumsum([0, *(n + len(timed) for n, timed, _ in subjects)])
    index = np.arange(len(times))
    values = np.where(index % 3, index / 7, np.nan).astype(np.float32)
    births = np.array([birth for *_, birth in subjects], np.int64)
    return SplitEvents(
        (index + 2).astype(np.int32), times, values if has_values else None, np.arange(len(subjects)), offsets, births
    )


def visible(events: SplitEvents, time: int, *, max_length: int) -> Samples:
    """A sample of each subject who has an event by then."""
    last = np.array([events.times[first] <= time for first in events.offsets[:-1]])
    subjects = events.subject_ids[last]
    frame = pl.DataFrame({"subject_id": subjects, "prediction_time": pl.Series([time] * len(subjects), dtype=pl.Int64)})
    frame = frame.with_columns(pl.col("prediction_time").cast(pl.Datetime("us")))
    return build_samples(events, frame, np.arange(len(subjects)), max_length=max_length)


def held_batches(dataset: BatchDataset | PackedDataset, *, batch_size: int = 3) -> list[Batch]:
    """Return the batches of an epoch with trainer.data_device=device."""
    sampler = BucketSampler(dataset.lengths, batch_size=batch_size, batch_tokens=1000, shuffle=True)
    return list(batch_loader(dataset, sampler, device=HOST, data_device="device"))


def days(microseconds: int) -> float:
    return float(np.float32(float(microseconds) / float(MICROSECONDS_PER_DAY)))


def by_hand(events: SplitEvents, samples: Samples, rows: list[list[int]], *, is_packed: bool) -> dict[str, list]:
    """Every field of the batch whose row b holds the sequences `rows[b]`, one event after the other."""
    width = -(-max(int(samples.lengths[row].sum()) for row in rows) // 8) * 8
    padding = {"token_ids": 0, "days": 0, "gap_days": 0, "elapsed_days": 0, "age_days": None, "values": None}
    padding |= {"is_event": False, "is_static": False, "is_next": False, "segments": 0, "event_index": 0}
    found: dict[str, list] = {name: [] for name in [*padding, "places"]}
    starts, segment = [0], 0
    for b, sequences in enumerate(rows):
        places = []
        for s in sequences:
            static = range(samples.static_start[s], samples.static_stop[s])
            timed = range(samples.start[s], samples.stop[s])
            prediction, birth = int(samples.prediction_times[s]), int(samples.birth_times[s])
            first = int(events.times[timed.start]) if len(timed) else prediction
            before, segment = None, segment + 1
            for index, e in enumerate([*static, *timed]):
                is_static = events.times[e] == STATIC_TIME
                time = first if is_static else int(events.times[e])
                value = None if events.values is None or np.isnan(events.values[e]) else float(events.values[e])
                places.append(
                    {
                        "token_ids": int(events.token_ids[e]),
                        "days": days(prediction - time),
                        "gap_days": 0 if before is None else days(time - before[1]),
                        "elapsed_days": days(time - first),
                        "age_days": days(time - birth) if birth != STATIC_TIME and time >= birth else None,
                        "values": value,
                        "is_event": True,
                        "is_static": bool(is_static),
                        "is_next": before is not None and not is_static and before[0] == e - 1,
                        "segments": segment,
                        "event_index": index,
                    }
                )
                before = (e, time)
            starts.append(starts[-1] + len(static) + len(timed))
        found["places"] += [b * width + t for t in range(len(places))]
        places += [padding] * (width - len(places))
        for name in padding:
            found[name].append([place[name] for place in places])
    found["sequence_starts"] = starts
    if not is_packed:
        del found["segments"], found["event_index"]
    if events.values is None:
        del found["values"]
    return found


def same(batch: Batch, expected: dict[str, list]) -> None:
    for name in ("segments", "event_index", "values"):
        assert (getattr(batch, name) is None) == (name not in expected), name
    for name, value in expected.items():
        found = getattr(batch, name)
        numbers = torch.tensor([[float("nan") if x is None else x for x in row] for row in value], dtype=found.dtype) \
            if found.ndim == 2 else torch.tensor(value, dtype=found.dtype)  # fmt: skip
        torch.testing.assert_close(
            found, numbers, rtol=0, atol=0, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )
    lengths = np.diff(expected["sequence_starts"])
    assert (batch.n_events, batch.n_pairs) == (lengths.sum(), (lengths**2).sum())


@given(records, st.integers(-60 * YEAR, 60 * YEAR), st.integers(1, 12), st.booleans())
def test_every_field_is_what_it_is_by_hand(subjects, time, max_length, has_values):
    events = make_events(subjects, has_values=has_values)
    samples = visible(events, time, max_length=max_length)
    if not len(samples):
        return
    dataset = BatchDataset(events, samples)
    index = np.arange(len(samples))[::-1].copy()
    same(dataset[index], by_hand(events, samples, [[i] for i in index], is_packed=False))
    for batch in held_batches(dataset):
        same(batch, by_hand(events, samples, [[i] for i in batch.sample.tolist()], is_packed=False))
        assert batch.labels.tolist() == batch.sample.tolist()


@given(records, st.integers(3, 12), st.integers(0, 5))
def test_every_field_of_packed_rows_is_what_it_is_by_hand(subjects, max_length, seed):
    events = make_events(subjects)
    samples, row = packed_samples(events, max_length=max_length, rng=np.random.default_rng(seed))
    for batch in held_batches(PackedDataset(events, samples, row)):
        rows = [np.flatnonzero(row == b).tolist() for b in batch.sample.tolist()]
        same(batch, by_hand(events, samples, rows, is_packed=True))


@given(records, st.integers(3, 12), st.integers(0, 5))
def test_every_field_of_windows_is_what_it_is_by_hand(subjects, max_length, seed):
    events = make_events(subjects)
    try:
        samples = window_samples(events, max_length=max_length, which="all", rng=np.random.default_rng(seed))
    except UserError:  # no record has two events
        return
    for batch in held_batches(BatchDataset(events, samples)):
        same(batch, by_hand(events, samples, [[i] for i in batch.sample.tolist()], is_packed=False))


@given(records, st.integers(-60 * YEAR, 60 * YEAR), st.integers(1, 12))
def test_what_comes_after_the_prediction_time_changes_nothing(subjects, time, max_length):
    """The sin of sins, where the events are held: other tokens, values and times after it, the same batches."""
    events = make_events(subjects)
    is_future = events.times > time
    other = SplitEvents(
        np.where(is_future, 999_999, events.token_ids).astype(np.int32),
        np.where(is_future, 100 * YEAR, events.times),
        np.where(is_future, -1e30, events.values).astype(np.float32),
        events.subject_ids,
        events.offsets,
        events.birth_times,
    )
    if not len(samples := visible(events, time, max_length=max_length)):
        return
    pairs = zip(
        *(held_batches(BatchDataset(e, visible(e, time, max_length=max_length))) for e in (events, other)), strict=True
    )
    seen = set()
    for batch, changed in pairs:
        for field in fields(Batch):
            a, b = getattr(batch, field.name), getattr(changed, field.name)
            assert a is b is None or (
                torch.equal(a.nan_to_num(-5e9), b.nan_to_num(-5e9)) if isinstance(a, torch.Tensor) else a == b
            )
        assert (batch.days >= 0).all()
        seen |= set((batch.token_ids[batch.is_event] - 2).tolist())
    assert not is_future[sorted(seen)].any()
    assert len(seen) == samples.lengths.sum()


class OnOneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, but for copies."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        devices = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        assert len(devices) < 2 or "copy" in str(function), function
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("n_rows", [1, 4])
def test_nothing_is_read_back_from_the_device(n_rows):
    """Tensors of torch's device `meta` have no numbers: whoever asks for one, as a GPU would wait for, gets an error."""
    meta = torch.device("meta")
    events = make_events([(2, [0, YEAR, 2 * YEAR], -YEAR), (0, list(range(30)), STATIC_TIME)])
    packed = packed_samples(events, max_length=9, rng=np.random.default_rng(0))
    for dataset in (
        BatchDataset(events, window_samples(events, max_length=9, which="all")),
        PackedDataset(events, *packed),
    ):
        index = np.arange(n_rows)
        with OnOneDevice():
            batch = dataset.on(meta)[index]
        for field in fields(Batch):
            found, real = getattr(batch, field.name), getattr(dataset[index], field.name)
            if isinstance(real, torch.Tensor):
                assert (found.device, found.shape, found.dtype) == (meta, real.shape, real.dtype), field.name
            else:
                assert found == real
        # Fewer places than tokens, and more.
        for embedding in (EventEmbedding(torch.zeros(999, 2)).to(meta), EventEmbedding(torch.zeros(3, 2)).to(meta)):
            inputs = embedding.inputs(batch)
            assert inputs["rows"].shape[1] == 2
            assert inputs["row_ids"].shape == batch.token_ids.shape
        with pytest.raises(RuntimeError, match="meta"):
            batch.is_event.sum().item()


def test_a_models_inputs_say_where_the_events_are():
    events = make_events([(0, [0, 1, 2], STATIC_TIME), (0, [0], STATIC_TIME)])
    batch = BatchDataset(events, visible(events, 5, max_length=8))[np.array([0, 1])]
    inputs = EventEmbedding(torch.zeros(9, 2)).inputs(batch)
    assert inputs["places"].tolist() == [0, 1, 2, 8]
    assert inputs["sequence_starts"].tolist() == [0, 3, 4]
    assert inputs["sequence_starts"].dtype == torch.int32
    moved = batch.to(HOST)
    assert (moved.n_events, moved.n_pairs) == (4, 10)


def test_events_are_held_once_and_let_go_with_their_split(tmp_path):
    path = tmp_path / "times.bin"
    np.arange(5, dtype=np.int64).tofile(path)
    times = np.memmap(path, dtype=np.int64, mode="r")
    zeros = np.zeros(1, np.int64)
    events = SplitEvents(np.arange(5, dtype=np.int32), times, None, zeros, np.array([0, 5]), zeros)
    with torch.inference_mode():  # as evaluation may be the first to ask
        tensors = event_tensors(events, HOST)
    assert event_tensors(events, HOST) is tensors
    assert tensors.times.data_ptr() == times.ctypes.data, "the map itself, no copy of it"
    assert not tensors.times.is_inference()
    assert events in module._held
    dataset = BatchDataset(events, window_samples(events, max_length=3, which="all")).on(torch.device("meta"))
    assert "meta" not in repr(vars(pickle.loads(pickle.dumps(dataset.events)))), "a worker is not sent what is held"
    gone = weakref.ref(tensors)
    del events, tensors, dataset
    gc.collect()
    assert gone() is None


def test_where_they_are_held_this_process_makes_the_batches():
    events = make_events([(0, [0, 1, 2], STATIC_TIME)])
    dataset = BatchDataset(events, visible(events, 5, max_length=8))
    sampler = BucketSampler(dataset.lengths, batch_size=2, batch_tokens=64, shuffle=False)
    for wanted, expected in (("device", 0), ("host", 2), ("auto", 2)):
        assert batch_loader(dataset, sampler, num_workers=2, data_device=wanted).num_workers == expected
    assert dataset.device == HOST


def test_auto_holds_events_on_a_gpu_with_room_for_them(monkeypatch):
    events, others = (make_events([(0, list(range(100)), STATIC_TIME)]) for _ in range(2))
    size = module.n_bytes(events)
    assert size == 100 * 16
    free = size * 4
    monkeypatch.setattr(module, "free_bytes", lambda device: free)
    assert is_gathered_there(events, GPU, "auto")
    assert not is_gathered_there(events, GPU, "host")
    free -= 1
    assert not is_gathered_there(events, GPU, "auto")
    assert is_gathered_there(events, GPU, "device")
    free = size * 4
    monkeypatch.setitem(module._held, others, {GPU: event_tensors(others, HOST)})
    assert not is_gathered_there(events, GPU, "auto"), "both together would take more than a quarter"
    assert is_gathered_there(others, GPU, "auto"), "which are there already"
    free = size * 7
    assert is_gathered_there(events, GPU, "auto")


def test_where_events_cannot_be_held_is_said(monkeypatch):
    events = make_events([(0, list(range(10)), STATIC_TIME)])
    monkeypatch.setattr(module, "free_bytes", lambda device: GIB)
    monkeypatch.setattr(module, "n_bytes", lambda events: 3 * GIB)
    with refused("3.00 GiB", "1.00 GiB of cuda:0", "data_device=auto"):
        is_gathered_there(events, GPU, "device")
    mps = torch.device("mps")
    assert not is_gathered_there(events, mps, "auto")
    with pytest.raises(UserError, match=r"data_device=device: mps .*float64.*Type: trainer\.data_device=host"):
        is_gathered_there(events, mps, "device")


def test_a_run_is_the_same_wherever_its_events_are(planted, tmp_path):
    runs = {
        where: train(planted, tmp_path / where, epochs=2, data_device=where, num_workers=n)
        for where, n in (("host", 0), ("device", 1), ("auto", 1))
    }
    rows = [without_times(run[1]) for run in runs.values()]
    assert rows[0] == rows[1] == rows[2]
    assert [runs[where][2].loader("train", 1).num_workers for where in ("device", "auto")] == [0, 1]
    with refused("trainer.data_device 'gpu'", "Valid: auto, device, host"):
        train(planted, tmp_path / "bad", data_device="gpu")
