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

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.intp]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Ranking:
    """Samples sorted by descending score, and where the ties that hold a positive begin and end. n samples,
    m positives, g distinct scores among the positives; only at these do the two areas gain anything."""

    order: Integers  # (n,) sorted position -> sample
    positive_at: Integers  # (m,) sorted positions of the positives
    tie_start: Integers  # (g,) samples ranked strictly above the tie
    tie_stop: Integers  # (g,) the same, and the tie itself
    positive_start: Integers  # (g,) as tie_start, counting positives only
    positive_stop: Integers  # (g,)

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
        return cls(order, np.flatnonzero(y), starts, stops, positives[starts], positives[stops])

    def areas(self, weights: Floats) -> tuple[Floats, Floats]:
        """AUROC and average precision under `weights` (b, n), which are in the order of the ranking.

        Ties count half in the AUROC and are one threshold in the average precision, as in scikit-learn.

        Returns:
            Two (b,) arrays; NaN where all the weight lies on one class.
        """
        everyone = _cumulative(weights)
        positive = _cumulative(weights[:, self.positive_at])
        n_positive, n_negative = positive[:, -1], everyone[:, -1] - positive[:, -1]
        tp_start, tp = positive[:, self.positive_start], positive[:, self.positive_stop]
        predicted = everyone[:, self.tie_stop]
        false_positive = (everyone[:, self.tie_start] - tp_start + predicted - tp) / 2
        gain = tp - tp_start
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


@dataclass(frozen=True)
class SubjectBootstrap:
    """Draws of subjects with replacement. Replicate 0 is the data as it is; 1 ... n_bootstrap are the draws.
    The same seed gives the same draws, so replicates of several classes or labels can be averaged."""

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
        return cls(subject.astype(np.intp), len(unique), n_bootstrap, seed)

    def weights(self) -> Iterator[Floats]:
        """Yield chunks (b, n_subjects) of how often each subject is drawn, 1 + n_bootstrap rows in all."""
        rng = np.random.default_rng(self.seed)
        n_rows = max(1, _CHUNK_ENTRIES // len(self.subject))
        n_done = 0
        while n_done <= self.n_bootstrap:
            chunk = np.ones((min(n_rows, 1 + self.n_bootstrap - n_done), self.n_subjects))
            for row in range(n_done == 0, len(chunk)):
                drawn = rng.integers(self.n_subjects, size=self.n_subjects)
                chunk[row] = np.bincount(drawn, minlength=self.n_subjects)
            n_done += len(chunk)
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
        cell = self.subject * N_CALIBRATION_BINS + calibration_bin(probabilities)
        size = self.n_subjects * N_CALIBRATION_BINS
        totals: Any = np.bincount(cell, weights=probabilities - outcomes, minlength=size)
        return np.asarray(totals, dtype=np.float64).reshape(-1, N_CALIBRATION_BINS)


def calibration_bin(probabilities: Floats) -> Integers:
    """The bin of each probability among 10 of equal width; the last one includes 1.

    >>> calibration_bin(np.array([0.0, 0.09, 0.1, 0.95, 1.0])).tolist()
    [0, 0, 1, 9, 9]
    """
    return np.minimum((probabilities * N_CALIBRATION_BINS).astype(np.intp), N_CALIBRATION_BINS - 1)
