"""No calibration: probabilities stay as the model gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ehr_embed.calibration.protocol import Floats, Parameters


class NoCalibration:
    """Leaves probabilities as the model gives them."""

    min_per_class = 0

    def fit(self, probabilities: Floats, labels: Floats, *, is_exclusive: bool) -> Parameters | None:
        return None

    def apply(self, probabilities: Floats, parameters: Parameters, *, is_exclusive: bool) -> Floats:
        return probabilities

    def check(self, parameters: Mapping[str, Any], n_classes: int, *, is_exclusive: bool) -> Parameters:
        return {}

    def describe(self, parameters: Parameters) -> str:
        return "none"
