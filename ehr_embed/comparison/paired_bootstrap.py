"""Paired bootstrap: two runs judged on the same draws of the same subjects, so that what is hard for both cancels out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ehr_embed.evaluation.bootstrap import Floats, Ranking, SubjectBootstrap
from ehr_embed.evaluation.predictions import Predictions, read_predictions
from ehr_embed.run_folder.layout import predictions_file

METRICS = ("auroc", "auprc", "brier")


def replicates(predictions: Predictions, *, n_bootstrap: int, seed: int = 0) -> dict[str, Floats]:
    """Each metric of `METRICS` on the data as they are and on `n_bootstrap` draws of subjects: (1 + n_bootstrap,).

    Several classes or labels: the mean of one-versus-rest areas, and the sum of squared errors. The same subjects and seed give
    the same draws, which is what makes two runs paired. NaN where a draw lacks a class.
    """
    n, n_classes = predictions.labels.shape
    subjects = predictions.keys["subject_id"].to_numpy()
    bootstrap = SubjectBootstrap.of(subjects, n_samples=n, n_bootstrap=n_bootstrap, seed=seed)
    rankings = [Ranking.fit(predictions.labels[:, c], predictions.probabilities[:, c]) for c in range(n_classes)]
    errors = ((predictions.probabilities - predictions.labels) ** 2).sum(axis=1)
    parts: dict[str, list[Floats]] = {metric: [] for metric in METRICS}
    for subject_weights in bootstrap.weights():
        weights = subject_weights[:, bootstrap.subject]
        areas = [ranking.areas(weights[:, ranking.order]) for ranking in rankings]
        parts["auroc"].append(np.mean([auroc for auroc, _ in areas], axis=0))
        parts["auprc"].append(np.mean([auprc for _, auprc in areas], axis=0))
        parts["brier"].append(weights @ errors / weights.sum(axis=1))
    return {metric: np.concatenate(chunks) for metric, chunks in parts.items()}


def ensemble(runs: Sequence[Path], split: str) -> dict[str, float]:
    """Each metric of `METRICS` of the mean of the runs' probabilities.

    Raises:
        UserError: the runs predict for other subjects, times or labels.
    """
    members = [read_predictions(predictions_file(run, split)) for run in runs]
    for run, member in zip(runs, members, strict=True):
        members[0].refuse_other_samples(member, str(runs[0]), str(run))
    mean = np.mean([member.probabilities for member in members], axis=0)
    together = Predictions(members[0].keys, members[0].labels, mean)
    return {name: float(values[0]) for name, values in replicates(together, n_bootstrap=0).items()}


@dataclass(frozen=True)
class Difference:
    """One metric of one run minus that of another: on the data, its 95 % interval, and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float


def difference(one: Floats, other: Floats) -> Difference:
    """Compare two runs' replicates (1 + n_bootstrap,), the first of which is the data as it is.

    p is twice the smaller share of draws on one side of zero, counting the data themselves as one draw, so that it is
    never 0 (Davison and Hinkley 1997, section 4.2). Draws in which a metric is undefined are left out.

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
    """Holm's step-down adjustment for as many tests as there are (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values)
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[int(index)] = largest
    return adjusted
