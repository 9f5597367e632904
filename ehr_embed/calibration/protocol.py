"""The interface of calibrations: maps of probabilities that are fitted on tuning, after the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Parameters = dict[str, Any]
"""The fitted parameters of a calibration by name, as values that JSON can hold."""


class Calibration(Protocol):
    """A map of probabilities to better ones. It holds settings only; what it fits is plain data that is kept with the run.

    Probabilities are (N, C) float64. With `is_exclusive`, a sample has one of the C classes, and rows sum to one; without it, each
    column is a label of its own.
    """

    min_per_class: int
    """Smallest number of subjects of each class in tuning with which the map is fitted; fewer say too little."""

    def fit(self, probabilities: Floats, labels: Floats, *, is_exclusive: bool) -> Parameters | None:
        """Return the parameters that suit labels (N, C) of 0 and 1, NaN where unknown; None = probabilities stay as they are."""
        ...

    def apply(self, probabilities: Floats, parameters: Parameters, *, is_exclusive: bool) -> Floats:
        """Return the calibrated probabilities (N, C)."""
        ...

    def check(self, parameters: Mapping[str, Any], n_classes: int, *, is_exclusive: bool) -> Parameters:
        """Return parameters that a file holds, once they are known to be such as `fit` returns.

        Raises:
            UserError: they are not.
        """
        ...

    def describe(self, parameters: Parameters) -> str:
        """Return in a few words what was fitted, such as `temperature 1.31`."""
        ...
