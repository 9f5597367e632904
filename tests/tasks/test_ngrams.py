"""Counts of tokens and pairs: in bounded memory, on one rank, kept with the store; scored without a distribution per token."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehr_embed.core.errors import UserError
from ehr_embed.data.store import STATIC_TIME, SplitEvents, build_store
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.sources.meds import MedsSource
from ehr_embed.tasks.masked_event import MaskedEvent
from ehr_embed.tasks.next_event import NextEvent
from ehr_embed.tasks.ngrams import NgramCounts, count_distinct
from tests.helpers.refusals import refused
from tests.helpers.small_meds import write_meds

TOP = (1, 5, 10)


def events_of(records: list[list[tuple[int, bool]]]) -> SplitEvents:
    """Records of (token, is_static)."""
    flat = [event for record in records for event in record]
    n, none = len(records), np.full(len(records), STATIC_TIME)
    times = np.array([STATIC_TIME if is_static else 10 for _, is_static in flat], np.int64)
    offsets = np.cumsum([0, *map(len, records)])
    return SplitEvents(np.array([token for token, _ in flat], np.int32), times, None, np.arange(n), offsets, none)


def in_one_piece(events: SplitEvents, vocab_size: int) -> NgramCounts:
    """The counts as they follow from all events at once."""
    tokens = events.token_ids.astype(np.int64)
    is_predicted = (events.times != STATIC_TIME) & (tokens >= 2)
    has_previous = is_predicted.copy()
    has_previous[events.offsets[:-1][np.diff(events.offsets) > 0]] = False
    at = np.flatnonzero(has_previous)
    pairs, counts = np.unique(tokens[at - 1] * vocab_size + tokens[at], return_counts=True)
    return NgramCounts(np.bincount(tokens[is_predicted], minlength=vocab_size), pairs, counts)


def slow_score(ngrams: NgramCounts, previous: np.ndarray, targets: np.ndarray) -> dict[str, dict[str, float]]:
    """Score by the whole distribution after each token."""

    def summary(distributions: list[np.ndarray]) -> dict[str, float]:
        p = np.array([d[t] for d, t in zip(distributions, targets, strict=True)])
        rank = np.array([(d >= d[t]).sum() - 1 for d, t in zip(distributions, targets, strict=True)])
        loss = -np.log(p).mean()
        return {"loss": loss, "perplexity": np.exp(loss)} | {f"top{k}_accuracy": (rank < k).mean() for k in TOP}

    unigram = ngrams.unigram_probabilities
    return {
        "unigram": summary([unigram] * len(targets)),
        "bigram": summary([ngrams.bigram_probabilities(int(a)) for a in previous]),
    }


RECORDS = st.lists(st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=12), min_size=1, max_size=12)
ASKED = st.lists(st.tuples(st.integers(0, 8), st.integers(2, 8)), min_size=1, max_size=30)


@given(RECORDS, st.integers(1, 9))
def test_counts_in_chunks_are_those_in_one_piece(records, chunk_events):
    events = events_of([sorted(record, key=lambda event: not event[1]) for record in records])
    found, expected = NgramCounts.fit(events, 9, chunk_events=chunk_events), in_one_piece(events, 9)
    for name in ("unigrams", "pairs", "counts"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()


@given(RECORDS, ASKED)
def test_scores_are_those_of_whole_distributions(records, asked):
    """Ties and tokens without successors included."""
    ngrams = in_one_piece(events_of(records), 9)
    previous, targets = np.array(asked).T
    found = ngrams.score(*count_distinct([previous * 9 + targets]))
    expected = slow_score(ngrams, previous, targets)
    for name, metrics in expected.items():
        assert found[name] == pytest.approx(metrics)


def test_memory_does_not_grow_with_the_events():
    """A fortieth of what counting in one piece took, 41 bytes per event."""
    rng, n = np.random.default_rng(0), 2_000_000
    tokens, offsets = (rng.zipf(1.5, n) % 50 + 2).astype(np.int32), np.arange(0, n + 1, 100)
    subjects = np.arange(len(offsets) - 1)
    events = SplitEvents(tokens, np.ones(n, np.int64), None, subjects, offsets, subjects)
    tracemalloc.start()
    NgramCounts.fit(events, 52, chunk_events=20_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * n


@pytest.fixture
def store(tmp_path):
    events = {s: [(1000 * i + n, float(k), f"C{(n + k) % 5}", None) for n in range(6) for k in range(9)] for i, s in
              enumerate(("train", "tuning", "held_out"))}  # fmt: skip
    root = write_meds(tmp_path / "meds", events)
    return build_store(tmp_path / "store", MedsSource(root=str(root)), VocabularySettings(min_count=1))


@pytest.mark.parametrize("kind", [NextEvent, MaskedEvent])
def test_nothing_is_counted_before_the_results_are_written_and_once_per_store(store, kind, monkeypatch):
    """Every rank sets the task up and evaluates tuning; only the one that writes the results asks for baselines."""
    counted = []
    fit = NgramCounts.fit
    monkeypatch.setattr(NgramCounts, "fit", lambda *args: counted.append(1) or fit(*args))
    first, again = kind(), kind()
    for task in (first, again):
        task.setup(store, Path(), 8)
    assert not counted
    assert first.baselines("held_out")["bigram"]["loss"] > 0
    assert first.baselines("held_out") == again.baselines("held_out")
    assert len(counted) == 1, "the second task found the counts with the store"


def test_counts_that_were_changed_are_refused(store):
    NgramCounts.of(store)
    (kept,) = store.folder.glob("ngrams-*")
    counts = np.load(kept / "counts.npy")
    np.save(kept / "counts.npy", counts + 1)
    with refused("counts.npy", "changed", "Remove the folder"):
        NgramCounts.of(store)


def test_a_store_that_cannot_be_written_to_is_counted_each_time(store, monkeypatch):
    expected = NgramCounts.fit(store.split("train"), len(store.vocabulary))

    def refuse(*_):
        raise UserError("read-only")

    monkeypatch.setattr("ehr_embed.data.kept.locked", refuse)
    assert NgramCounts.of(store).counts.tolist() == expected.counts.tolist()
    assert not list(store.folder.glob("ngrams-*"))
