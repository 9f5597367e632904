"""Platt scaling (Platt 1999): a slope and, unlike a temperature, a shift of the log-odds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ehr_embed.calibration.log_odds import (
    LARGEST_SHIFT,
    LARGEST_SLOPE,
    LEAST_SLOPE,
    checked_lists,
    checked_numbers,
    fit_problems,
    scaled,
)
from ehr_embed.calibration.protocol import Floats, Parameters
from ehr_embed.core.settings import Count, checked


class Platt:
    """Log-odds times a slope, plus a shift, with the least cross-entropy on tuning.

    A shift mends what `task.class_weights` does to probabilities: a model whose loss weighs positives more predicts too many.
    For C exclusive classes there is one slope and a shift per class (bias-corrected temperature scaling: Alexandari et al. 2020,
    arXiv:1901.06852). The slope is positive, so that for two classes, and for each label, the order of the samples stays.

    Args:
        min_per_class: smallest number of subjects of each class.
    """

    @checked("calibration")
    def __init__(self, *, min_per_class: Count = 20) -> None:
        self.min_per_class = min_per_class

    def fit(self, probabilities: Floats, labels: Floats, *, is_exclusive: bool) -> Parameters | None:
        found = fit_problems(probabilities, labels, is_exclusive=is_exclusive, has_shifts=True)
        return {"slopes": [slope for slope, _ in found], "shifts": [shifts for _, shifts in found]}

    def apply(self, probabilities: Floats, parameters: Parameters, *, is_exclusive: bool) -> Floats:
        return scaled(probabilities, parameters["slopes"], parameters["shifts"], is_exclusive=is_exclusive)

    def check(self, parameters: Mapping[str, Any], n_classes: int, *, is_exclusive: bool) -> Parameters:
        n, n_columns = (1, n_classes) if is_exclusive else (n_classes, 2)
        shifts = checked_lists(parameters, "shifts", n_lists=n, n=n_columns, low=-LARGEST_SHIFT, high=LARGEST_SHIFT)
        slopes = checked_numbers(parameters, "slopes", n=n, low=LEAST_SLOPE, high=LARGEST_SLOPE)
        return {"slopes": slopes, "shifts": shifts}

    def describe(self, parameters: Parameters) -> str:
        pairs = zip(parameters["slopes"], parameters["shifts"], strict=True)
        return "; ".join(f"slope {a:.3g}, shift {', '.join(f'{b:+.3g}' for b in shifts[1:])}" for a, shifts in pairs)
