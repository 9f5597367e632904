"""Bootstrap of many samples: samples that count alike in every metric form a cell, and a replicate weighs cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ehr_embed.evaluation.bootstrap import (
    Booleans,
    Floats,
    Integers,
    Ranking,
    SubjectBootstrap,
    calibration_totals,
    chunk_rows,
)

MANY_SAMPLES = 2**17
"""Number of samples above which replicates weigh cells. Fewer samples are weighed one by one, so that a given seed
keeps its intervals."""
N_GROUPS = 2**14
"""Largest number of distinct scores of positives. If there are more, neighbouring scores become ties, which changes
AUROC and AUPRC by less than 1e-4."""


@dataclass(frozen=True)
class Cells:
    """Samples grouped into cells: a cell has one label, one prediction, and scores in one segment of a `Ranking`.

    The metrics of the data themselves are exact. In a replicate each sample counts with the mean of its cell, and with
    more than `N_GROUPS` distinct scores among the positives, AUROC and average precision are approximate.
    """

    cell: Integers  # (n,) cell of each sample; cells are numbered by descending score
    size: Integers  # (c,) number of samples per cell
    ranking: Ranking  # ranking of the cells
    of_data: tuple[float, float]  # AUROC and average precision of the samples themselves

    @classmethod
    def fit(cls, labels: Booleans, scores: Floats, predicted: Booleans | None = None) -> Cells:
        """Build the cells of `labels` and `scores` (n,); `predicted` (n,) marks the samples predicted positive."""
        own = Ranking.fit(labels, scores)
        n, n_positive = len(labels), len(own.positive_at)
        edges = own.segment_start
        if len(own.tie_start) > N_GROUPS:
            is_first = np.r_[True, np.diff(own.positive_start * N_GROUPS // n_positive) > 0]
            is_last = np.r_[is_first[1:], True]
            ends = np.r_[own.segment_start, n]
            edges = np.unique(np.r_[0, ends[own.tie_start[is_first]], ends[own.tie_stop[is_last]]])
            edges = edges[edges < n]
        segment = np.empty(n, np.intp)
        segment[own.order] = np.repeat(np.arange(len(edges)), np.diff(np.r_[edges, n]))
        marks = labels * 2 + (0 if predicted is None else predicted)
        keys, cell, size = np.unique(segment * 4 + marks, return_inverse=True, return_counts=True)
        auroc, auprc = own.areas(np.ones((1, n)))
        ranking = Ranking.fit((keys & 2) > 0, -(keys // 4).astype(np.float64))
        return cls(cell, size, ranking, (float(auroc[0]), float(auprc[0])))

    def mean(self, values: Booleans | Floats) -> Floats:
        """Return the mean of `values` (n,) over the samples of each cell, (c,)."""
        return np.bincount(self.cell, weights=values, minlength=len(self.size)) / self.size

    def calibration_means(self, probabilities: Floats, outcomes: Booleans) -> Floats:
        """Return the sum of probability minus outcome per cell and calibration bin over the cell's size, (c, 10)."""
        return calibration_totals(self.cell, len(self.size), probabilities, outcomes) / self.size[:, None]

    def weights(self, bootstrap: SubjectBootstrap) -> Iterator[Floats]:
        """Yield chunks (b, c) of the weight of each cell, 1 + n_bootstrap rows in all, under the draws of `bootstrap`."""
        order = np.argsort(self.cell, kind="stable")
        subject, first = bootstrap.subject[order], np.r_[0, np.cumsum(self.size)[:-1]]
        for weights in bootstrap.weights():
            yield np.add.reduceat(np.take(weights, subject, axis=1), first, axis=1)

    def own_weights(self, bootstrap: SubjectBootstrap) -> Iterator[Floats]:
        """Yield chunks as `weights` does, for metrics that need not share their draws with others.

        If each subject has one sample, the numbers of draws per cell are multinomial and are drawn directly.
        """
        if bootstrap.n_subjects < len(self.cell):
            yield from self.weights(bootstrap)
            return
        rng, n = np.random.default_rng(bootstrap.seed), len(self.cell)
        yield self.size[None].astype(np.float64)
        for n_rows in chunk_rows(bootstrap.n_bootstrap, len(self.size)):
            yield rng.multinomial(n, self.size / n, size=n_rows).astype(np.float64)


@dataclass(frozen=True)
class SampleAreas:
    """Computes AUROC and average precision of samples under the weights of their subjects."""

    ranking: Ranking
    subject: Integers  # (n,) subject of each sample, in the order of the ranking, or of the cells
    first: Integers | None  # (c,) index at which each cell begins; None = samples are weighed one by one
    of_data: tuple[float, float] | None  # exact AUROC and average precision of the samples, if they are in cells

    @classmethod
    def fit(cls, bootstrap: SubjectBootstrap, labels: Booleans, scores: Floats) -> SampleAreas:
        """Sort the samples of `labels` and `scores` (n,), and group them into cells if there are many."""
        if len(labels) <= MANY_SAMPLES:
            ranking = Ranking.fit(labels, scores)
            return cls(ranking, bootstrap.subject[ranking.order], None, None)
        cells = Cells.fit(labels, scores)
        order = np.argsort(cells.cell, kind="stable")
        first = np.r_[0, np.cumsum(cells.size)[:-1]]
        return cls(cells.ranking, bootstrap.subject[order], first, cells.of_data)

    def of(self, weights: Floats, *, is_first: bool) -> tuple[Floats, Floats]:
        """Return AUROC and average precision (b,) under weights (b, n_subjects).

        Args:
            weights: weight of each subject in each replicate.
            is_first: whether the first row is the data themselves, for which the exact values are known.
        """
        own = np.take(weights, self.subject, axis=1)
        if self.first is not None:
            own = np.add.reduceat(own, self.first, axis=1)
        areas = self.ranking.areas(own)
        if is_first and self.of_data is not None:
            for area, exact in zip(areas, self.of_data, strict=True):
                area[0] = exact
        return areas
