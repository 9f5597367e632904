"""Subject-level bootstrap by weights: metrics are computed for many weightings of the same samples at once.

The samples of a subject are not independent, so the bootstrap draws subjects, each with all its samples. A replicate is
a vector of weights, the number of times that each subject was drawn, and every metric is computed from these weights:
the scores are sorted once, and each sum over samples is a matrix product of the weights with sums per subject.
Replicate 0 has a weight of one everywhere and gives the point estimate, so that value and interval come from the same
code.
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
"""Number of subjects above which a draw is made in blocks. Smaller draws are made at once, so that a given seed keeps
its intervals."""
_BLOCK = 2**16  # a uint16 can number the subjects of a block, and their counts fit into a core's cache

NO_INTERVAL = "no interval: one subject"
"""Text in place of an interval if there is one subject, because every draw would be the data themselves."""

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.intp]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Ranking:
    """Samples sorted by descending score, and cut into segments at the start and end of each tie that holds a positive.

    There are n samples, m positives, g distinct scores among the positives, and s <= 2g + 1 segments. AUROC and average
    precision grow only at the scores of positives, so the sums of the weights per segment suffice to compute them. Each
    weighting then takes one pass over the samples, without a cumulative sum of n numbers.
    """

    order: Integers  # (n,) sorted position -> sample
    positive_at: Integers  # (m,) sorted positions of the positives
    segment_start: Integers  # (s,) sorted position at which each segment begins
    tie_start: Integers  # (g,) number of segments ranked strictly above the tie
    tie_stop: Integers  # (g,) number of segments ranked at or above the tie
    positive_start: Integers  # (g,) number of positives ranked strictly above the tie

    @classmethod
    def fit(cls, labels: Booleans, scores: Floats) -> Ranking:
        """Build the ranking of `scores` (n,), which serves any number of weightings."""
        order = np.argsort(-scores, kind="stable")
        y = labels[order]
        starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
        stops = np.r_[starts[1:], len(order)]
        positives = np.r_[0, np.cumsum(y)]
        has_positive = positives[stops] > positives[starts]
        starts, stops = starts[has_positive], stops[has_positive]
        edges = np.unique(np.r_[0, starts, stops, len(order)])
        # NumPy's stubs give the result of searchsorted the type of a single number.
        tie_start, tie_stop = (np.asarray(np.searchsorted(edges, places)) for places in (starts, stops))
        return cls(order, np.flatnonzero(y), edges[:-1], tie_start, tie_stop, positives[starts])

    def areas(self, weights: Floats) -> tuple[Floats, Floats]:
        """Return AUROC and average precision under `weights` (b, n), which are in the order of the ranking.

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
    """Return the sums of the first 0, 1, ..., n columns, (b, n) -> (b, n + 1)."""
    sums = np.zeros((weights.shape[0], weights.shape[1] + 1))
    np.cumsum(weights, axis=1, out=sums[:, 1:])
    return sums


def weighted_areas(labels: npt.ArrayLike, scores: npt.ArrayLike, weights: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Return AUROC and average precision for many weightings of the same samples at once.

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
    """Yield the numbers of rows of the chunks into which an (n_rows, n_columns) array is cut to bound the memory.

    >>> list(chunk_rows(5, 2**21))
    [2, 2, 1]
    """
    most = max(1, _CHUNK_ENTRIES // n_columns)
    for first in range(0, n_rows, most):
        yield min(most, n_rows - first)


def draw_counts(n_subjects: int, rng: np.random.Generator) -> Integers:
    """Draw n subjects out of n with replacement, and return how often each occurs, (n_subjects,).

    Many subjects are drawn in two steps, which together have the same multinomial distribution: first the number of
    draws per block of subjects, then the subjects within each block. The counts of a block fit into a core's cache,
    which makes the draw 3 times as fast.

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
    """Draws subjects with replacement; replicate 0 is the data themselves, and 1 ... n_bootstrap are the draws.

    The same seed gives the same draws, so replicates of several classes or labels can be averaged. With a single
    subject there are no draws: each would be the data themselves, and an interval of width zero would look like
    certainty.
    """

    subject: Integers  # (n,) index of each sample's subject, in 0 ... n_subjects - 1
    n_subjects: int
    n_bootstrap: int
    seed: int

    @classmethod
    def of(cls, subject_ids: npt.ArrayLike, *, n_samples: int, n_bootstrap: int, seed: int) -> SubjectBootstrap:
        """Build the bootstrap of samples whose subjects are `subject_ids` (n,).

        Raises:
            UserError: there is not one subject id per sample, or `n_bootstrap` is negative.
        """
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
        """Yield chunks (b, n_subjects) of the number of draws of each subject, 1 + n_bootstrap rows in all."""
        rng = np.random.default_rng(self.seed)
        is_first = True
        for n_rows in chunk_rows(1 + self.n_bootstrap, len(self.subject)):
            chunk = np.ones((n_rows, self.n_subjects))
            for row in range(is_first, n_rows):
                chunk[row] = draw_counts(self.n_subjects, rng)
            is_first = False
            yield chunk

    def totals(self, values: npt.NDArray[Any]) -> Floats:
        """Return the sums of `values` (n,) over the samples of each subject, (n_subjects,)."""
        # NumPy's stubs give bincount an integer type and overlook that weights make the counts floats.
        totals: Any = np.bincount(self.subject, weights=values, minlength=self.n_subjects)
        return np.asarray(totals, dtype=np.float64)

    def calibration_totals(self, probabilities: Floats, outcomes: Booleans) -> Floats:
        """Return the sums of probability minus outcome per subject and calibration bin, (n_subjects, 10).

        The expected calibration error is the sum of the bins' absolute totals, divided by the number of samples.
        """
        return calibration_totals(self.subject, self.n_subjects, probabilities, outcomes)


def calibration_totals(member: Integers, n_members: int, probabilities: Floats, outcomes: Booleans) -> Floats:
    """Return the sums of probability minus outcome per member and calibration bin, (n_members, 10).

    Args:
        member: (n,) index of the member, such as a subject or cell, that each sample belongs to.
        n_members: number of members.
        probabilities: (n,) in [0, 1].
        outcomes: (n,).
    """
    cell = member * N_CALIBRATION_BINS + calibration_bin(probabilities)
    totals: Any = np.bincount(cell, weights=probabilities - outcomes, minlength=n_members * N_CALIBRATION_BINS)
    return np.asarray(totals, dtype=np.float64).reshape(-1, N_CALIBRATION_BINS)


def calibration_bin(probabilities: Floats) -> Integers:
    """Return the index of each probability's bin among 10 bins of equal width; the last bin includes 1.

    >>> calibration_bin(np.array([0.0, 0.09, 0.1, 0.95, 1.0])).tolist()
    [0, 0, 1, 9, 9]
    """
    return np.minimum((probabilities * N_CALIBRATION_BINS).astype(np.intp), N_CALIBRATION_BINS - 1)
