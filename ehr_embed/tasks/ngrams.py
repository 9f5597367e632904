"""Unigram and bigram counts as baselines for tasks that predict events: what a model must beat to have learned anything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ehr_embed.data.store import STATIC_TIME, SplitEvents
from ehr_embed.data.vocabulary import FIRST_TOKEN

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NgramCounts:
    """Counts of tokens and of pairs of successive tokens in train.

    Attributes:
        unigrams: (V,) timed events of each token.
        previous, following, counts: (P,) int64, the distinct pairs sorted by `previous`, and how often each occurs.
    """

    unigrams: Integers
    previous: Integers
    following: Integers
    counts: Integers

    @classmethod
    def fit(cls, events: SplitEvents, vocab_size: int) -> NgramCounts:
        """Count the timed events of train, and each with the event before it in the same record."""
        tokens = events.token_ids.astype(np.int64)
        is_predicted = (np.asarray(events.times) != STATIC_TIME) & (tokens >= FIRST_TOKEN)
        unigrams = np.bincount(tokens[is_predicted], minlength=vocab_size)
        has_previous = is_predicted.copy()
        has_previous[events.offsets[:-1][np.diff(events.offsets) > 0]] = False
        following = np.flatnonzero(has_previous)
        pairs, counts = np.unique(tokens[following - 1] * vocab_size + tokens[following], return_counts=True)
        return cls(unigrams, pairs // vocab_size, pairs % vocab_size, counts)

    @property
    def unigram_probabilities(self) -> npt.NDArray[np.float64]:
        """(V,) with one added to each count (Laplace); padding and unknown have none."""
        smoothed = self.unigrams + 1.0
        smoothed[:FIRST_TOKEN] = 0
        return smoothed / smoothed.sum()

    def bigram_probabilities(self, previous: int) -> npt.NDArray[np.float64]:
        """(V,) of what follows a token: its counts, backed off to the unigrams by Witten and Bell's estimate, in which a
        token with n successors of t kinds gives them t / (n + t) (IEEE Trans. Inf. Theory 1991;37:1085-1094)."""
        low, high = np.searchsorted(self.previous, [previous, previous + 1])
        kinds, n = high - low, self.counts[low:high].sum()
        if not kinds:
            return self.unigram_probabilities
        probabilities = self.unigram_probabilities * kinds / (n + kinds)
        probabilities[self.following[low:high]] += self.counts[low:high] / (n + kinds)
        return probabilities

    def score(self, previous: Integers, targets: Integers) -> dict[str, dict[str, float]]:
        """Loss, perplexity and top-k accuracy of both baselines on events with the tokens before them, (N,) each.

        A tie counts against the target, as it does for a model.
        """
        nll, rank = np.empty(len(targets)), np.empty(len(targets), np.int64)
        order = np.argsort(previous, kind="stable")
        starts = np.flatnonzero(np.diff(previous[order], prepend=-1))
        for part in np.split(order, starts[1:]):
            nll[part], rank[part] = _score(self.bigram_probabilities(int(previous[part[0]])), targets[part])
        return {"unigram": _summary(*_score(self.unigram_probabilities, targets)), "bigram": _summary(nll, rank)}


def _score(probabilities: npt.NDArray[np.float64], targets: Integers) -> tuple[npt.NDArray[np.float64], Integers]:
    """Negative log likelihood and rank of targets under one distribution."""
    at_target = probabilities[targets]
    n_below = np.searchsorted(np.sort(probabilities), at_target, side="left")
    return -np.log(at_target), len(probabilities) - n_below - 1


def _summary(nll: npt.NDArray[np.float64], rank: Integers) -> dict[str, float]:
    loss = float(nll.mean())
    accuracy = {f"top{k}_accuracy": float((rank < k).mean()) for k in (1, 5, 10)}
    return {"loss": loss, "perplexity": float(np.exp(loss))} | accuracy
