"""Unigram and bigram counts as baselines for tasks that predict events; a useful model must beat them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ehr_embed.data.kept import kept_arrays
from ehr_embed.data.store import STATIC_TIME, EventStore, SplitEvents
from ehr_embed.data.vocabulary import FIRST_TOKEN
from ehr_embed.evaluation.code_screening import CHUNK_EVENTS, chunks
from ehr_embed.tasks.event_outputs import TOP

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
FORMAT = 1


@dataclass(frozen=True)
class NgramCounts:
    """Counts of tokens and of pairs of successive tokens in train.

    Attributes:
        unigrams: (V,) int64, number of timed events of each token.
        pairs: (P,) int64, ascending, the distinct pairs as numbers `previous * V + following`.
        counts: (P,) int64, number of times that each pair occurs.
    """

    unigrams: Integers
    pairs: Integers
    counts: Integers

    @classmethod
    def of(cls, store: EventStore) -> NgramCounts:
        """Return the counts of a store's train split.

        The counts are cached in the store's folder and computed only if they are missing.
        """

        def count() -> dict[str, npt.NDArray[np.int64]]:
            found = cls.fit(store.split("train"), len(store.vocabulary))
            return {"unigrams": found.unigrams, "pairs": found.pairs, "counts": found.counts}

        return cls(**kept_arrays(store, "ngrams", {"format": FORMAT}, count))

    @classmethod
    def fit(cls, events: SplitEvents, vocab_size: int, *, chunk_events: int = CHUNK_EVENTS) -> NgramCounts:
        """Count the tokens of the timed events, and their pairs with the previous event of the same record.

        `chunk_events` and the number of distinct pairs bound the memory.
        """
        unigrams = np.zeros(vocab_size, np.int64)
        record_starts = events.offsets[:-1][np.diff(events.offsets) > 0]

        def pairs() -> Iterable[Integers]:
            for begin in range(0, len(events.token_ids), chunk_events):
                end = min(begin + chunk_events, len(events.token_ids))
                tokens = events.token_ids[begin:end].astype(np.int64)
                previous = events.token_ids[max(begin - 1, 0) : end - 1].astype(np.int64)
                is_predicted = (np.asarray(events.times[begin:end]) != STATIC_TIME) & (tokens >= FIRST_TOKEN)
                unigrams[:] += np.bincount(tokens[is_predicted], minlength=vocab_size)
                low, high = np.searchsorted(record_starts, [begin, end])
                is_predicted[record_starts[low:high] - begin] = False
                following = np.flatnonzero(is_predicted)
                # In the first chunk, `previous` has no entry for the first event, so it is shifted by one place. That
                # event begins a record and has no predecessor.
                yield previous[following - (begin == 0)] * vocab_size + tokens[following]

        return cls(unigrams, *count_distinct(pairs()))

    @property
    def unigram_probabilities(self) -> Floats:
        """Return token probabilities (V,) with Laplace smoothing, one added per count; special tokens have none."""
        smoothed = self.unigrams + 1.0
        smoothed[:FIRST_TOKEN] = 0
        return smoothed / smoothed.sum()

    def bigram_probabilities(self, previous: int) -> Floats:
        """Return the probabilities (V,) of the token after `previous`.

        They are bigram counts with Witten-Bell back-off to the unigrams.
        A token with n successors of t kinds gives the unigrams a share of t / (n + t) of the probability (Witten and
        Bell, IEEE Trans. Inf. Theory 1991;37:1085-1094).
        """
        n_tokens = len(self.unigrams)
        low, high = np.searchsorted(self.pairs, [previous * n_tokens, (previous + 1) * n_tokens])
        kinds, n = high - low, self.counts[low:high].sum()
        if not kinds:
            return self.unigram_probabilities
        probabilities = self.unigram_probabilities * kinds / (n + kinds)
        probabilities[self.pairs[low:high] % n_tokens] += self.counts[low:high] / (n + kinds)
        return probabilities

    def score(self, pairs: Integers, counts: Integers) -> dict[str, dict[str, float]]:
        """Return the loss, perplexity and top-k accuracy of both baselines.

        A tie counts against the target, as in the evaluation of a model.

        Args:
            pairs: (D,) ascending, the distinct pairs of a predicted event and the event before it, as in the attribute
                `pairs`.
            counts: (D,) number of times that each pair is predicted.
        """
        n_tokens, unigram = len(self.unigrams), self.unigram_probabilities
        ascending = np.sort(unigram)
        at_target = unigram[pairs % n_tokens]
        ranks = n_tokens - np.searchsorted(ascending, at_target, side="left") - 1
        nll, rank = np.empty(len(pairs)), np.empty(len(pairs), np.int64)
        asked, first = np.unique(pairs // n_tokens, return_index=True)
        first = np.append(first, len(pairs))
        low, high = (np.searchsorted(self.pairs, edge * n_tokens) for edge in (asked, asked + 1))
        for begin, end in chunks(np.diff(first) + high - low, CHUNK_EVENTS):
            part = slice(first[begin], first[end])
            known = slice(low[begin], high[end - 1])
            nll[part], rank[part] = _score_bigrams(
                pairs[part], self.pairs[known], self.counts[known], unigram, ascending
            )
        return {"unigram": _summary(-np.log(at_target), ranks, counts), "bigram": _summary(nll, rank, counts)}


def count_distinct(parts: Iterable[Integers]) -> tuple[Integers, Integers]:
    """Return the distinct numbers of all parts, ascending, and how often each occurs.

    Parts of similar size are merged with each other, as in a merge sort, so that each number moves at most log(parts)
    times.

    >>> [found.tolist() for found in count_distinct([np.array([3, 1]), np.array([3]), np.array([2, 3])])]
    [[1, 2, 3], [1, 1, 3]]
    """
    stack: list[tuple[Integers, Integers]] = []
    for part in parts:
        stack.append(np.unique(part, return_counts=True))
        while len(stack) > 1 and len(stack[-2][0]) < 2 * len(stack[-1][0]):
            stack.append(_merged(stack.pop(), stack.pop()))
    while len(stack) > 1:
        stack.append(_merged(stack.pop(), stack.pop()))
    return stack[0] if stack else (np.empty(0, np.int64), np.empty(0, np.int64))


def _merged(one: tuple[Integers, Integers], other: tuple[Integers, Integers]) -> tuple[Integers, Integers]:
    numbers = np.concatenate([one[0], other[0]])
    order = np.argsort(numbers, kind="stable")  # a stable sort merges the two ascending runs in linear time
    numbers, counts = numbers[order], np.concatenate([one[1], other[1]])[order]
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    return numbers[starts], np.add.reduceat(counts, starts) if len(starts) else counts


def _score_bigrams(
    asked: Integers, known: Integers, counts: Integers, unigram: Floats, ascending: Floats
) -> tuple[Floats, Integers]:
    """Return the negative log likelihood and rank of each pair in `asked`, (D,), without a (V,) distribution per token.

    After a given token, every probability is the unigram probability times one factor, except that the token's
    successors in train have more. The rank therefore comes from the unigram probabilities, which are sorted once: count
    the tokens that are at least as probable as the target there, and correct the count for the successors.

    Args:
        asked: (D,) ascending, pairs of a target and the token before it.
        known, counts: pairs in train of these previous tokens, and possibly of tokens between them.
        unigram, ascending: (V,) unigram probabilities in token order, and sorted.
    """
    n_tokens = len(unigram)
    low, high = (np.searchsorted(known, (asked // n_tokens + step) * n_tokens) for step in (0, 1))
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    # For a token without successors `kinds` is 1, so that the factor kinds / total is 1 and the unigrams stay as they
    # are.
    kinds = np.maximum(high - low, 1)
    total = ends[high] - ends[low] + kinds
    place = np.minimum(np.searchsorted(known, asked), max(len(known) - 1, 0))
    own = np.where(known[place] == asked, counts[place], 0) if len(known) else np.zeros(len(asked), np.int64)
    p = unigram[asked % n_tokens] * kinds / total + own / total

    of_known = known // n_tokens
    group_low, group_high = (np.searchsorted(known, (of_known + step) * n_tokens) for step in (0, 1))
    group_kinds = group_high - group_low
    group_total = ends[group_high] - ends[group_low] + group_kinds
    base = unigram[known % n_tokens] * group_kinds / group_total
    by_base = base[np.lexsort((base, of_known))]
    moved = base + counts / group_total
    by_probability = moved[np.lexsort((moved, of_known))]

    everywhere = np.zeros_like(asked), np.full_like(asked, n_tokens)
    n_unigrams = n_tokens - _first_at_least(
        lambda at, row: ascending[at] * kinds[row] / total[row] >= p[row], *everywhere
    )
    n_base = high - _first_at_least(lambda at, row: by_base[at] >= p[row], low, high)
    n_moved = high - _first_at_least(lambda at, row: by_probability[at] >= p[row], low, high)
    return -np.log(p), n_unigrams - n_base + n_moved - 1


def _first_at_least(
    is_reached: Callable[[Integers, Integers], npt.NDArray[np.bool_]], low: Integers, high: Integers
) -> Integers:
    """Return per row the first place in [low, high) where `is_reached(place, row)` is true, by binary search.

    `is_reached` must stay true after that place; a row without such a place gets `high`.
    """
    low, high = low.copy(), high.copy()
    while (rows := np.flatnonzero(low < high)).size:
        middle = (low[rows] + high[rows]) // 2
        reached = is_reached(middle, rows)
        high[rows[reached]] = middle[reached]
        low[rows[~reached]] = middle[~reached] + 1
    return low


def _summary(nll: Floats, rank: Integers, counts: Integers) -> dict[str, float]:
    """Return the metrics of one baseline, means over pairs (D,) weighted by `counts`."""
    n = counts.sum()
    loss = float(nll @ counts / n)
    accuracy = {f"top{k}_accuracy": float(counts[rank < k].sum() / n) for k in TOP}
    return {"loss": loss, "perplexity": float(np.exp(loss))} | accuracy
