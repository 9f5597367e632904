"""Evaluation of predicted numbers: absolute and squared errors, explained variance and rank correlation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ehr_embed.core.errors import UserError
from ehr_embed.evaluation.bootstrap import Floats, Integers, SubjectBootstrap
from ehr_embed.evaluation.metric import Metric
from ehr_embed.evaluation.metrics import summaries

REGRESSION_METRICS = (
    *(Metric(name, is_higher_better=False) for name in ("mae", "rmse")),
    Metric("r2", is_higher_better=True),
    Metric("spearman", is_higher_better=True, is_ranking=True),
)
IN_UNITS = ("mae", "rmse")
"""Metrics in the unit of the labels, whose size means nothing by itself."""


def regression_metrics(
    labels: npt.ArrayLike,
    predicted: npt.ArrayLike,
    *,
    subject_ids: npt.ArrayLike,
    n_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    split_name: str,
) -> dict[str, Any]:
    """Return the metrics of predicted numbers, each with a subject-level bootstrap interval.

    `mae` and `rmse` are the mean absolute and the root mean squared error, in the unit of the labels. `r2` is one minus the mean
    squared error over the variance of the split's labels, so that a constant prediction of their mean has 0. `spearman` is the
    correlation of ranks, with mean ranks for ties; it is 0 if all predictions are equal.

    Args:
        labels: (n,) finite numbers, at least two different ones.
        predicted: (n,) finite numbers.
        subject_ids, n_bootstrap, seed, confidence, split_name: as in `binary_metrics`.

    Returns:
        Each of `REGRESSION_METRICS` -> {"value", "low", "high"}; "n", "n_subjects", "label_mean", "label_sd".

    Raises:
        UserError: shapes differ, a number is not finite, or all labels are equal.

    >>> found = regression_metrics([1, 2, 3, 6], [1, 3, 3, 5], subject_ids=[1, 2, 3, 4], n_bootstrap=0, split_name="tuning")
    >>> found["mae"]["value"], round(found["r2"]["value"], 3), round(found["spearman"]["value"], 3)
    (0.5, 0.857, 0.949)
    """
    y, x = np.asarray(labels, np.float64), np.asarray(predicted, np.float64)
    if y.ndim != 1 or y.shape != x.shape:
        raise UserError(
            f"split {split_name!r}: expected labels and predictions of one shape (n,), got {y.shape} and {x.shape}."
        )
    for what, values in (("labels", y), ("predictions", x)):
        if not np.isfinite(values).all():
            raise UserError(
                f"split {split_name!r}: {int((~np.isfinite(values)).sum())} of {len(values)} {what} are no finite numbers, so no "
                "error can be computed. Mend or drop these labels; for predictions, type: trainer.learning_rate=1e-4"
            )
    if not len(y) or y.min() == y.max():
        raise UserError(
            f"split {split_name!r}: all {len(y)} labels are equal, so that nothing can be explained or ranked. Choose another "
            "label set, or a split in which it varies."
        )
    bootstrap = SubjectBootstrap.of(subject_ids, n_samples=len(y), n_bootstrap=n_bootstrap, seed=seed)
    (replicates,) = regression_replicates(bootstrap, y, [x])
    facts = {"n": len(y), "n_subjects": bootstrap.n_subjects, "label_mean": float(y.mean()), "label_sd": float(y.std())}
    return summaries(replicates, confidence) | facts


def regression_replicates(
    bootstrap: SubjectBootstrap, labels: Floats, runs: Sequence[Floats]
) -> list[dict[str, Floats]]:
    """Return every metric of each run in every replicate, name -> (1 + n_bootstrap,), on the same draws; NaN where the drawn labels
    are all equal.

    Args:
        bootstrap: draws of the subjects.
        labels: (n,).
        runs: predictions (n,) of each run.
    """
    centred = labels - labels.mean()  # sums of squares would lose digits far from 0
    table = np.column_stack([bootstrap.totals(own) for own in (np.ones(len(labels)), centred, centred**2)])
    errors = [
        np.column_stack([bootstrap.totals(own) for own in (np.abs(run - labels), (run - labels) ** 2)]) for run in runs
    ]
    of_labels, of_runs = Ranks.of(labels), [Ranks.of(run) for run in runs]
    parts: list[dict[str, list[Floats]]] = [{metric.name: [] for metric in REGRESSION_METRICS} for _ in runs]
    for weights in bootstrap.weights():
        n, total, squares = (weights @ table).T
        variance = np.maximum(squares / n - (total / n) ** 2, 0)
        varies = variance > 1e-12 * max(float(centred.var()), 1e-300)
        own = np.take(weights, bootstrap.subject, axis=1)
        label_ranks = of_labels.under(own)
        for part, error, ranks in zip(parts, errors, of_runs, strict=True):
            absolute, square = (weights @ error).T / n
            part["mae"].append(absolute)
            part["rmse"].append(np.sqrt(square))
            with np.errstate(invalid="ignore", divide="ignore"):
                part["r2"].append(np.where(varies, 1 - square / variance, np.nan))
            part["spearman"].append(np.where(varies, _correlation(label_ranks, ranks.under(own), own), np.nan))
    return [{name: np.concatenate(values) for name, values in part.items()} for part in parts]


class Ranks:
    """Mean ranks of the same numbers under many weightings.

    Args:
        order: (n,) samples by ascending number.
        start: (g,) sorted position at which each tie begins.
        tie: (n,) tie of each sample.
    """

    def __init__(self, order: Integers, start: Integers, tie: Integers) -> None:
        self.order, self.start, self.tie = order, start, tie

    @classmethod
    def of(cls, values: Floats) -> Ranks:
        """Sort the numbers (n,) once."""
        order = np.argsort(values, kind="stable")
        is_first = np.r_[True, np.diff(values[order]) != 0]
        tie = np.empty(len(values), np.intp)
        tie[order] = np.cumsum(is_first) - 1
        return cls(order, np.flatnonzero(is_first), tie)

    def under(self, weights: Floats) -> Floats:
        """Return the mean rank of each sample (b, n) if it occurs as often as `weights` (b, n) says.

        >>> Ranks.of(np.array([5.0, 7.0, 5.0])).under(np.array([[1.0, 1, 1], [0, 1, 2]])).tolist()
        [[1.5, 3.0, 1.5], [1.5, 3.0, 1.5]]
        """
        own = np.add.reduceat(weights[:, self.order], self.start, axis=1)
        mean: Floats = (own.cumsum(axis=1) - own + (own + 1) / 2)[:, self.tie]
        return mean


def _correlation(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Return the correlation (b,) of x and y (b, n) under `weights` (b, n); 0 where one of them does not vary."""
    n = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / n
    y = y - (weights * y).sum(axis=1, keepdims=True) / n
    product = np.sqrt((weights * x**2).sum(axis=1) * (weights * y**2).sum(axis=1))
    together = (weights * x * y).sum(axis=1)
    found: Floats = np.divide(together, product, out=np.zeros_like(product), where=product > 1e-9)
    return found
