"""Decision curves (Vickers and Elkin 2006, doi:10.1177/0272989X06295361): is acting on a model better than acting on all?"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import polars as pl

from ehr_embed.core.files import atomic_path
from ehr_embed.evaluation.bootstrap import Floats
from ehr_embed.evaluation.metrics import check_binary
from ehr_embed.evaluation.plots import Curves

THRESHOLDS = np.arange(1, 100) / 100
"""Probabilities from which on one would act: whoever acts at 10 % holds a missed case to be nine times as bad as a needless act."""


def net_benefit(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, thresholds: Floats = THRESHOLDS, *, split_name: str
) -> Floats:
    """Return the net benefit of acting wherever the probability is at least t, in true positives per sample, (T,).

    It is TP / n - FP / n * t / (1 - t): each needless act costs the odds of the threshold. Acting on nobody has a net benefit of 0,
    and nothing has more than the prevalence.

    Args:
        labels: (n,) 0/1.
        probabilities: (n,) in [0, 1].
        thresholds: (T,) in (0, 1).
        split_name: name of the split, for error messages.

    Raises:
        UserError: see `check_binary`.

    >>> net_benefit([0, 0, 0, 1], [0.1, 0.2, 0.6, 0.9], np.array([0.15, 0.5, 0.8]), split_name="x").round(3).tolist()
    [0.162, 0.0, 0.25]
    """
    y, p = check_binary(labels, probabilities, split_name=split_name)
    order = np.argsort(p)
    n_below = np.searchsorted(p[order], thresholds, side="left")
    n_positive_below = np.concatenate([np.zeros(1, np.int64), np.cumsum(y[order])])[n_below]
    n_true = y.sum() - n_positive_below
    n_false = (len(y) - n_below) - n_true
    found: Floats = (n_true - n_false * thresholds / (1 - thresholds)) / len(y)
    return found


def net_benefit_of_all(prevalence: float, thresholds: Floats = THRESHOLDS) -> Floats:
    """Return the net benefit of acting on everybody, (T,).

    >>> net_benefit_of_all(0.25, np.array([0.25, 0.5])).tolist()
    [0.0, -0.5]
    """
    found: Floats = prevalence - (1 - prevalence) * thresholds / (1 - thresholds)
    return found


def decision_table(curves: Curves) -> pl.DataFrame:
    """Return the numbers of decision curves: one row per curve and threshold.

    Args:
        curves: name -> (labels (n,) 0/1, probabilities (n,)).

    Returns:
        Columns curve, threshold, net_benefit, net_benefit_of_all and net_benefit_of_none, all in true positives per sample.
    """
    frames = []
    for name, (labels, probabilities) in curves.items():
        prevalence = float(np.mean(np.asarray(labels, dtype=np.float64)))
        columns = {
            "threshold": THRESHOLDS,
            "net_benefit": net_benefit(labels, probabilities, split_name=name),
            "net_benefit_of_all": net_benefit_of_all(prevalence),
            "net_benefit_of_none": np.zeros(len(THRESHOLDS)),
        }
        frames.append(pl.DataFrame(columns).select(pl.lit(name).alias("curve"), pl.all()))
    return pl.concat(frames)


def write_decision_table(path: str | os.PathLike[str], curves: Curves) -> None:
    """Write what `decision_table` returns as CSV."""
    with atomic_path(path) as temporary:
        decision_table(curves).write_csv(temporary)
