"""Temperature scaling (Guo et al. 2017, arXiv:1706.04599): one number that makes probabilities bolder or milder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ehr_embed.calibration.log_odds import (
    LARGEST_SLOPE,
    LEAST_SLOPE,
    checked_numbers,
    fit_problems,
    scaled,
)
from ehr_embed.calibration.protocol import Floats, Parameters
from ehr_embed.core.settings import Count, checked


class Temperature:
    """Divides log-probabilities by a temperature T: p_c is proportional to p_c ** (1 / T), with the least cross-entropy on tuning.

    Exclusive classes share one temperature, labels of `task=multilabel` have one each. For two classes, and for each label, the
    order of the samples stays, so AUROC and AUPRC do too.

    Args:
        min_per_class: smallest number of subjects of each class.
    """

    @checked("calibration")
    def __init__(self, *, min_per_class: Count = 20) -> None:
        self.min_per_class = min_per_class

    def fit(self, probabilities: Floats, labels: Floats, *, is_exclusive: bool) -> Parameters | None:
        found = fit_problems(probabilities, labels, is_exclusive=is_exclusive, has_shifts=False)
        return {"temperatures": [1 / slope for slope, _ in found]}

    def apply(self, probabilities: Floats, parameters: Parameters, *, is_exclusive: bool) -> Floats:
        slopes = [1 / temperature for temperature in parameters["temperatures"]]
        none = [0.0] * (probabilities.shape[1] if is_exclusive else 2)
        return scaled(probabilities, slopes, [none] * len(slopes), is_exclusive=is_exclusive)

    def check(self, parameters: Mapping[str, Any], n_classes: int, *, is_exclusive: bool) -> Parameters:
        n = 1 if is_exclusive else n_classes
        low, high = 0.99 / LARGEST_SLOPE, 1.01 / LEAST_SLOPE
        return {"temperatures": checked_numbers(parameters, "temperatures", n=n, low=low, high=high)}

    def describe(self, parameters: Parameters) -> str:
        return "temperature " + ", ".join(f"{temperature:.3g}" for temperature in parameters["temperatures"])
