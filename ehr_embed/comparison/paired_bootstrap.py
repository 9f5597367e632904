"""Paired bootstrap: judge runs on the same draws of the same subjects, so that the difficulty of a draw cancels out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ehr_embed.evaluation.bootstrap import Floats, SubjectBootstrap
from ehr_embed.evaluation.cells import SampleAreas
from ehr_embed.evaluation.predictions import Predictions, read_predictions
from ehr_embed.evaluation.regression import REGRESSION_METRICS, regression_replicates
from ehr_embed.run_folder.layout import predictions_file

METRICS = ("auroc", "auprc", "brier")
NUMBER_METRICS = tuple(metric.name for metric in REGRESSION_METRICS)


def replicates(predictions: Predictions, *, n_bootstrap: int, seed: int = 0) -> dict[str, Floats]:
    """Return the bootstrap replicates of one run, as `paired_replicates` does for several."""
    return paired_replicates([predictions], n_bootstrap=n_bootstrap, seed=seed)[0]


def paired_replicates(runs: Sequence[Predictions], *, n_bootstrap: int, seed: int = 0) -> list[dict[str, Floats]]:
    """Return, for each run, every metric of `METRICS`, or for numbers of `NUMBER_METRICS`, on the data and on `n_bootstrap` draws
    of subjects: (1 + n_bootstrap,).

    With several classes or labels, AUROC and AUPRC are means of the one-versus-rest areas, and the Brier score sums the squared
    errors. All runs must predict for the same samples and are judged on the same draws; a later call with the same subjects and
    seed uses these draws again. A metric is NaN where a draw lacks a class.
    """
    n, n_classes = runs[0].labels.shape
    subjects = runs[0].keys["subject_id"].to_numpy()
    bootstrap = SubjectBootstrap.of(subjects, n_samples=n, n_bootstrap=n_bootstrap, seed=seed)
    if runs[0].are_numbers:
        labels = runs[0].labels[:, 0].astype(np.float64)
        return regression_replicates(bootstrap, labels, [run.probabilities[:, 0] for run in runs])
    areas = [
        [SampleAreas.fit(bootstrap, run.labels[:, c].astype(bool), run.probabilities[:, c]) for c in range(n_classes)]
        for run in runs
    ]
    columns = [((run.probabilities - run.labels) ** 2).sum(axis=1) for run in runs]
    table = np.column_stack([bootstrap.totals(column) for column in (np.ones(n), *columns)])
    parts: list[dict[str, list[Floats]]] = [{metric: [] for metric in METRICS} for _ in runs]
    is_first = True
    for weights in bootstrap.weights():
        size, *errors = (weights @ table).T
        for part, own, error in zip(parts, areas, errors, strict=True):
            found = [of_class.of(weights, is_first=is_first) for of_class in own]
            part["auroc"].append(np.mean([auroc for auroc, _ in found], axis=0))
            part["auprc"].append(np.mean([auprc for _, auprc in found], axis=0))
            part["brier"].append(error / size)
        is_first = False
    return [{metric: np.concatenate(chunks) for metric, chunks in part.items()} for part in parts]


def ensemble(runs: Sequence[Path], split: str) -> dict[str, float]:
    """Return each metric for the mean of the runs' probabilities, or numbers, on a split.

    Raises:
        UserError: the runs predict for different subjects, times or labels.
    """
    members = [read_predictions(predictions_file(run, split)) for run in runs]
    for run, member in zip(runs, members, strict=True):
        members[0].refuse_other_samples(member, str(runs[0]), str(run))
    mean = np.mean([member.probabilities for member in members], axis=0)
    together = Predictions(members[0].keys, members[0].labels, mean)
    return {name: float(values[0]) for name, values in replicates(together, n_bootstrap=0).items()}


LEAST_P = 0.01
"""The number of replicates is chosen so that the adjusted p can get this small: a fifth of the usual 0.05."""
FEWEST_REPLICATES = 1000


def replicates_needed(n_comparisons: int) -> int:
    """Return the number of replicates with which the smallest adjusted p-value is `LEAST_P`, at least 1,000.

    With B replicates no p is below 2 / (B + 1), and Holm multiplies the smallest by the number of comparisons.

    >>> replicates_needed(1), replicates_needed(7), replicates_needed(19)
    (1000, 1399, 3799)
    """
    return max(FEWEST_REPLICATES, math.ceil(2 * n_comparisons / LEAST_P) - 1)


def least_p(n_comparisons: int, n_bootstrap: int) -> float:
    """Return the smallest adjusted p-value that `n_bootstrap` replicates can give.

    >>> least_p(19, 1000), least_p(19, 3799)
    (0.03796203796203796, 0.01)
    """
    return min(1.0, 2 * n_comparisons / (n_bootstrap + 1))


@dataclass(frozen=True)
class Difference:
    """Difference between two runs in one metric.

    Attributes:
        difference: the metric of the first run minus that of the second, on the data.
        low, high: 95 % bootstrap interval of the difference.
        p: two-sided p-value.

    Interval and p are NaN where no draw is informative: the metric is undefined in all draws, or there is a single subject,
    whose every draw equals the data.
    """

    difference: float
    low: float
    high: float
    p: float


def difference(one: Floats, other: Floats) -> Difference:
    """Compare the replicates of two runs, each (1 + n_bootstrap,); the first replicate is the metric on the data.

    p is twice the smaller share of draws on one side of zero. The data count as one draw, so that p is never 0 (Davison
    and Hinkley 1997, section 4.2). Draws in which a metric is undefined are left out.

    >>> difference(np.array([1.0, 0.75, 1.0, 0.75]), np.array([0.5, 0.5, 0.5, 0.5]))
    Difference(difference=0.5, low=0.25, high=0.4875, p=0.5)
    """
    gaps = one - other
    draws = gaps[1:][np.isfinite(gaps[1:])]
    if not len(draws):
        return Difference(float(gaps[0]), float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(draws, [0.025, 0.975])
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1.0, 2 * (tail + 1) / (len(draws) + 1))
    return Difference(float(gaps[0]), float(low), float(high), float(p))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's step-down adjustment (Holm 1979); NaN stays NaN and is not counted as a test.

    >>> holm([0.01, 0.04, 0.03]), holm([0.01, float("nan"), 0.04])
    ([0.03, 0.06, 0.06], [0.02, nan, 0.04])
    """
    order = [int(index) for index in np.argsort(p_values) if not math.isnan(p_values[index])]
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
