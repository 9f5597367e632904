"""A fitted calibration: fit one on the outputs of tuning, and apply it to any."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ehr_embed.calibration.protocol import Calibration, Floats, Parameters

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibrator:
    """A calibration with what it has fitted.

    Attributes:
        method: the calibration.
        parameters: what `method.fit` returned.
        is_exclusive: whether a sample has one of the classes, in contrast to several independent labels.
    """

    method: Calibration
    parameters: Parameters
    is_exclusive: bool

    def __call__(self, probabilities: Floats) -> Floats:
        """Return the calibrated probabilities (N, C)."""
        if not len(probabilities):
            return probabilities
        return self.method.apply(probabilities, self.parameters, is_exclusive=self.is_exclusive)


@dataclass(frozen=True)
class Fit:
    """The result of fitting a calibration.

    Attributes:
        calibrator: the fitted calibration; None = probabilities stay as they are.
        n: samples of tuning.
        subjects: subjects of tuning per class, by name; of a label those with it and those without.
        too_few: why nothing was fitted; empty = it was.
    """

    calibrator: Calibrator | None
    n: int
    subjects: dict[str, int]
    too_few: str = ""


def fit_calibrator(
    method: Calibration,
    probabilities: Floats,
    labels: npt.NDArray[Any],
    subject_ids: npt.NDArray[np.int64],
    class_names: Sequence[str],
    *,
    is_exclusive: bool,
) -> Fit:
    """Fit a calibration, or say why tuning is too small for it.

    Args:
        method: the calibration.
        probabilities: (N, C) of the samples of tuning.
        labels: (N,) classes, or (N, C) labels of 0 and 1, NaN where unknown.
        subject_ids: (N,) subjects: several samples of one subject do not count as several.
        class_names: C names.
        is_exclusive: whether a sample has one of the classes.
    """
    targets = np.eye(len(class_names))[labels] if is_exclusive else np.asarray(labels, np.float64)
    subjects = {
        str(name): len(np.unique(subject_ids[column == 1])) for name, column in zip(class_names, targets.T, strict=True)
    }
    if not is_exclusive:
        subjects |= {
            f"not {name}": len(np.unique(subject_ids[column == 0]))
            for name, column in zip(class_names, targets.T, strict=True)
        }
    few = min(subjects, key=subjects.__getitem__)
    if subjects[few] < method.min_per_class:
        too_few = (
            f"tuning has {subjects[few]} subjects of {few}, and {type(method).__name__} is fitted on {method.min_per_class} of "
            "each class or more (calibration.min_per_class): probabilities stay as the model gives them"
        )
        log.warning(too_few)
        return Fit(None, len(targets), subjects, too_few)
    parameters = method.fit(probabilities, targets, is_exclusive=is_exclusive)
    calibrator = None if parameters is None else Calibrator(method, parameters, is_exclusive)
    return Fit(calibrator, len(targets), subjects)
