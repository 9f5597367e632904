"""Subject-level bootstrap as weights, and metrics under many weightings of the same samples at once.

A subject's samples are not independent, so the bootstrap redraws subjects and lets all their samples move together.
A replicate is a vector of weights (how often each subject was drawn), and every metric is computed from weights:
the scores are sorted once, and whatever is a sum over samples becomes a matrix product with per-subject sums.
Replicate 0 has weight one everywhere and is the point estimate, so value and interval share one code path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ehr_embed.core.errors import UserError

N_CALIBRATION_BINS = 10
# Entries of one (replicates, samples) float64 chunk: 32 MiB, and a handful of such arrays are alive at once.
_CHUNK_ENTRIES = 2**22
MANY_SUBJECTS = 2**17
"""Above, a draw goes block by block; at and below, all at once, so that a seed gives the intervals that it always gave."""
_BLOCK = 2**16  # a uint16 numbers the subjects of a block, and their counts fit into a core's cache

NO_INTERVAL = "no interval: one subject"
"""Said in the place of an interval where all draws are the data themselves."""

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.intp]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Ranking:
    """Samples sorted by descending score, cut into segments where the ties that hold a positive begin and end.

    n samples, m positives, g distinct scores among the positives, s <= 2g + 1 segments. Only at a positive's score do the two
    areas gain anything, so that the sum of the weights in each segment is all that they need: one pass over the samples per
    weighting, without a cumulative sum of n numbers.
    """

    order: Integers  # (n,) sorted position -> sample
    positive_at: Integers  # (m,) sorted positions of the positives
    segment_start: Integers  # (s,) sorted position at which each segment begins
    tie_start: Integers  # (g,) segments ranked strictly above the tie
    tie_stop: Integers  # (g,) the same, and the tie itself
    positive_start: Integers  # (g,) positives ranked strictly above the tie

    @classmethod
    def fit(cls, labels: Booleans, scores: Floats) -> Ranking:
        """Sort `scores` (n,) once, for any number of weightings."""
        order = np.argsort(-scores, kind="stable")
        y = labels[order]
        starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
        stops = np.r_[starts[1:], len(order)]
        positives = np.r_[0, np.cumsum(y)]
        has_positive = positives[stops] > positives[starts]
        starts, stops = starts[has_positive], stops[has_positive]
        edges = np.unique(np.r_[0, starts, stops, len(order)])
        # Typed as a single number by NumPy's stubs.
        tie_start, tie_stop = (np.asarray(np.searchsorted(edges, places)) for places in (starts, stops))
        return cls(order, np.flatnonzero(y), edges[:-1], tie_start, tie_stop, positives[starts])

    def areas(self, weights: Floats) -> tuple[Floats, Floats]:
        """AUROC and average precision under `weights` (b, n), which are in the order of the ranking.

        Ties count half in the AUROC and are one threshold in the average precision, as in scikit-learn.

        Returns:
            Two (b,) arrays; NaN where all the weight lies on one class.
        """
        if not len(self.positive_at):
            return np.full(len(weights), np.nan), np.full(len(weights), np.nan)
        everyone = _cumulative(np.add.reduceat(weights, self.segment_start, axis=1))
        gain = np.add.reduceat(weights[:, self.positive_at], self.positive_start, axis=1)
        positive = _cumulative(gain)
        n_positive, n_negative = positive[:, -1], everyone[:, -1] - positive[:, -1]
        tp_start, tp = positive[:, :-1], positive[:, 1:]
        predicted = everyone[:, self.tie_stop]
        false_positive = (everyone[:, self.tie_start] - tp_start + predicted - tp) / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            auroc = 1 - (gain * false_positive).sum(axis=1) / (n_positive * n_negative)
            precision = np.divide(tp, predicted, out=np.zeros_like(tp), where=predicted > 0)
            auprc = (gain * precision).sum(axis=1) / n_positive
        one_class = (n_positive <= 0) | (n_negative <= 0)
        return np.where(one_class, np.nan, auroc), np.where(one_class, np.nan, auprc)


def _cumulative(weights: Floats) -> Floats:
    """(b, n) -> (b, n + 1) sums of the first 0, 1, ..., n columns."""
    sums = np.zeros((weights.shape[0], weights.shape[1] + 1))
    np.cumsum(weights, axis=1, out=sums[:, 1:])
    return sums


def weighted_areas(labels: npt.ArrayLike, scores: npt.ArrayLike, weights: npt.ArrayLike) -> tuple[Floats, Floats]:
    """AUROC and average precision for many weightings of the same samples at once.

    Args:
        labels: (n,) 0/1.
        scores: (n,) any finite numbers.
        weights: (b, n) non-negative.

    Returns:
        AUROC (b,) and average precision (b,), NaN where all the weight lies on one class.

    >>> auroc, auprc = weighted_areas([0, 1, 0, 1], [0.1, 0.4, 0.4, 0.8], [[1, 1, 1, 1], [1, 0, 1, 2]])
    >>> auroc.tolist(), auprc.round(3).tolist()
    ([0.875, 1.0], [0.833, 1.0])
    """
    ranking = Ranking.fit(np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64))
    return ranking.areas(np.asarray(weights, dtype=np.float64)[:, ranking.order])


def chunk_rows(n_rows: int, n_columns: int) -> Iterator[int]:
    """Rows of each chunk into which (n_rows, n_columns) are cut, so that memory stays bounded.

    >>> list(chunk_rows(5, 2**21))
    [2, 2, 1]
    """
    most = max(1, _CHUNK_ENTRIES // n_columns)
    for first in range(0, n_rows, most):
        yield min(most, n_rows - first)


def draw_counts(n_subjects: int, rng: np.random.Generator) -> Integers:
    """How often each of n subjects occurs among n draws with replacement, (n_subjects,).

    Many subjects are drawn in two steps, which together have the same multinomial distribution: how many draws fall into each
    block of subjects, then which subjects of the block. Counting within a block stays in cache, which is 3 times as fast.

    >>> draw_counts(5, np.random.default_rng(0)).tolist(), draw_counts(200_000, np.random.default_rng(0)).sum().item()
    ([0, 2, 1, 1, 1], 200000)
    """
    if n_subjects <= MANY_SUBJECTS:
        return np.bincount(rng.integers(n_subjects, size=n_subjects), minlength=n_subjects)
    sizes = np.diff(np.r_[0:n_subjects:_BLOCK, n_subjects])
    n_drawn = rng.multinomial(n_subjects, sizes / n_subjects)
    counts = [
        np.bincount(rng.integers(size, size=n, dtype=np.uint16), minlength=size)
        for size, n in zip(sizes.tolist(), n_drawn.tolist(), strict=True)
    ]
    return np.concatenate(counts)


@dataclass(frozen=True)
class SubjectBootstrap:
    """Draws of subjects with replacement. Replicate 0 is the data as it is; 1 ... n_bootstrap are the draws.

    The same seed gives the same draws, so replicates of several classes or labels can be averaged. Of one subject there are no
    draws: each would be the data themselves, and an interval of no width would look like certainty.
    """

    subject: Integers  # (n,) index in 0 ... n_subjects - 1 of each sample's subject
    n_subjects: int
    n_bootstrap: int
    seed: int

    @classmethod
    def of(cls, subject_ids: npt.ArrayLike, *, n_samples: int, n_bootstrap: int, seed: int) -> SubjectBootstrap:
        """Number the subjects of `subject_ids` (n,)."""
        ids = np.asarray(subject_ids)
        if ids.shape != (n_samples,):
            raise UserError(
                f"expected one subject_id for each of {n_samples} samples, got an array of shape {ids.shape}."
            )
        if n_bootstrap < 0:
            raise UserError(f"n_bootstrap must be 0 (no interval) or more, got {n_bootstrap}.")
        unique, subject = np.unique(ids, return_inverse=True)
        return cls(subject.astype(np.intp), len(unique), n_bootstrap if len(unique) > 1 else 0, seed)

    def weights(self) -> Iterator[Floats]:
        """Yield chunks (b, n_subjects) of how often each subject is drawn, 1 + n_bootstrap rows in all."""
        rng = np.random.default_rng(self.seed)
        is_first = True
        for n_rows in chunk_rows(1 + self.n_bootstrap, len(self.subject)):
            chunk = np.ones((n_rows, self.n_subjects))
            for row in range(is_first, n_rows):
                chunk[row] = draw_counts(self.n_subjects, rng)
            is_first = False
            yield chunk

    def totals(self, values: npt.NDArray[Any]) -> Floats:
        """Sum `values` (n,) over each subject's samples: (n_subjects,)."""
        # Typed as integers by NumPy's stubs, which overlook that weights make the counts floats.
        totals: Any = np.bincount(self.subject, weights=values, minlength=self.n_subjects)
        return np.asarray(totals, dtype=np.float64)

    def calibration_totals(self, probabilities: Floats, outcomes: Booleans) -> Floats:
        """Sums of probability minus outcome over each subject's samples in each bin: (n_subjects, 10).

        The expected calibration error is the sum over bins of their absolute totals, divided by the samples.
        """
        return calibration_totals(self.subject, self.n_subjects, probabilities, outcomes)


def calibration_totals(member: Integers, n_members: int, probabilities: Floats, outcomes: Booleans) -> Floats:
    """Sums of probability minus outcome (n,) over the samples of each member and calibration bin: (n_members, 10)."""
    cell = member * N_CALIBRATION_BINS + calibration_bin(probabilities)
    totals: Any = np.bincount(cell, weights=probabilities - outcomes, minlength=n_members * N_CALIBRATION_BINS)
    return np.asarray(totals, dtype=np.float64).reshape(-1, N_CALIBRATION_BINS)


def calibration_bin(probabilities: Floats) -> Integers:
    """The bin of each probability among 10 of equal width; the last one includes 1.

    >>> calibration_bin(np.array([0.0, 0.09, 0.1, 0.95, 1.0])).tolist()
    [0, 0, 1, 9, 9]
    """
    return np.minimum((probabilities * N_CALIBRATION_BINS).astype(np.intp), N_CALIBRATION_BINS - 1)
