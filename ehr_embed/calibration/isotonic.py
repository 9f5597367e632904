"""Isotonic regression (Zadrozny and Elkan 2002): the rising steps that fit the observed rates best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.isotonic import IsotonicRegression

from ehr_embed.calibration.log_odds import checked_lists
from ehr_embed.calibration.protocol import Floats, Parameters
from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import Count, checked


class Isotonic:
    """A rising curve from the model's probability to the observed rate, by scikit-learn's `IsotonicRegression`.

    It bends wherever the rates do, and so needs more labels than a temperature. Samples on one step get equal probabilities, so
    that AUROC changes a little. Of n samples, no probability lies below 1 / (n + 2) or above (n + 1) / (n + 2) (the rule of
    succession): otherwise a step without a positive sample would give later samples the probability 0. For more than two exclusive
    classes there is one curve per class against the rest, and rows are scaled to sum to one.

    Args:
        min_per_class: smallest number of subjects of each class.
    """

    @checked("calibration")
    def __init__(self, *, min_per_class: Count = 100) -> None:
        self.min_per_class = min_per_class

    def fit(self, probabilities: Floats, labels: Floats, *, is_exclusive: bool) -> Parameters | None:
        inputs, rates = [], []
        for column in _columns(probabilities.shape[1], is_exclusive=is_exclusive):
            is_known = ~np.isnan(labels[:, column])
            p, y = probabilities[is_known, column], labels[is_known, column]
            least = 1 / (len(y) + 2)
            curve = IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip").fit(p, y)
            inputs.append(curve.X_thresholds_.tolist())
            rates.append(curve.y_thresholds_.tolist())
        return {"probabilities": inputs, "rates": rates}

    def apply(self, probabilities: Floats, parameters: Parameters, *, is_exclusive: bool) -> Floats:
        columns = _columns(probabilities.shape[1], is_exclusive=is_exclusive)
        curves = zip(columns, parameters["probabilities"], parameters["rates"], strict=True)
        found = np.stack([np.interp(probabilities[:, column], x, y) for column, x, y in curves], axis=1)
        if not is_exclusive:
            return found
        if len(columns) == 1:
            return np.concatenate([1 - found, found], axis=1)
        scaled: Floats = found / found.sum(axis=1, keepdims=True)
        return scaled

    def check(self, parameters: Mapping[str, Any], n_classes: int, *, is_exclusive: bool) -> Parameters:
        n = len(_columns(n_classes, is_exclusive=is_exclusive))
        found = {
            name: checked_lists(parameters, name, n_lists=n, n=None, low=0, high=1)
            for name in ("probabilities", "rates")
        }
        for x, y in zip(found["probabilities"], found["rates"], strict=True):
            if len(x) != len(y) or not _rises(x) or not _rises(y) or min(y) <= 0 or max(y) >= 1:
                raise UserError(
                    "its parameters probabilities and rates are not rising lists of one length, the rates above 0 and below 1, "
                    "which train.py writes."
                )
        return dict(found)

    def describe(self, parameters: Parameters) -> str:
        return "isotonic curve through " + ", ".join(f"{len(set(own)):,} rates" for own in parameters["rates"])


def _columns(n_classes: int, *, is_exclusive: bool) -> list[int]:
    """Return the columns that have a curve of their own: of two exclusive classes the second alone.

    >>> _columns(2, is_exclusive=True), _columns(3, is_exclusive=True), _columns(2, is_exclusive=False)
    ([1], [0, 1, 2], [0, 1])
    """
    return [1] if is_exclusive and n_classes == 2 else list(range(n_classes))


def _rises(values: list[float]) -> bool:
    return bool((np.diff(values) >= 0).all())
