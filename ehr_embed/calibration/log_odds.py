"""Parts of calibrations that act on log-probabilities: a slope, and where a calibration has one a shift per class.

Suffixes give the axes: N samples, C classes, K problems. Exclusive classes are one problem with C columns. Labels that are
independent are one problem each, with two columns: the complement and the label.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import scipy  # which loads a part when it is first used

from ehr_embed.calibration.protocol import Floats
from ehr_embed.core.errors import UserError

TINY = float(np.finfo(np.float64).tiny)
LEAST_SLOPE, LARGEST_SLOPE = 0.01, 100.0
LARGEST_SHIFT = 50.0
STEPS = {"maxiter": 500, "gtol": 1e-10, "ftol": 1e-14}


def problems(probabilities_NC: Floats, *, is_exclusive: bool) -> list[Floats]:
    """Return the log-probabilities (N, columns) of each problem.

    >>> [z.round(2).tolist() for z in problems(np.array([[0.5, 0.1]]), is_exclusive=False)]
    [[[-0.69, -0.69]], [[-0.11, -2.3]]]
    """
    if is_exclusive:
        return [_log(probabilities_NC)]
    return [np.stack([_log(1 - p_N), _log(p_N)], axis=1) for p_N in probabilities_NC.T]


def targets(labels_NC: Floats, *, is_exclusive: bool) -> Iterator[tuple[Any, Any]]:
    """Yield per problem the rows whose label is known, (M,) bool, and their class, (M,) integers."""
    if is_exclusive:
        yield np.ones(len(labels_NC), bool), labels_NC.argmax(axis=1)
        return
    for y_N in labels_NC.T:
        is_known_N = ~np.isnan(y_N)
        yield is_known_N, y_N[is_known_N].astype(np.int64)


def fit_problem(z_NC: Floats, y_N: Any, *, has_shifts: bool) -> tuple[float, list[float]]:
    """Return slope a and shifts b (C,) with the least cross-entropy of softmax(a z + b), which is convex in them; b of the first
    class is 0, and all are 0 without `has_shifts`.

    >>> z = np.log(np.array([[0.1, 0.9]] * 4))
    >>> slope, shifts = fit_problem(z, np.array([1, 1, 1, 0]), has_shifts=False)
    >>> round(slope, 3), shifts  # so that 0.9 becomes 0.75: log 3 / log 9
    (0.5, [0.0, 0.0])
    """
    n_classes = z_NC.shape[1]
    rows, onehot_NC = np.arange(len(y_N)), np.eye(n_classes)[y_N]

    def loss(x: Floats) -> tuple[float, Floats]:
        a, b_C = x[0], np.concatenate([np.zeros(1), x[1:]]) if has_shifts else np.zeros(n_classes)
        s_NC = a * z_NC + b_C
        log_total_N = scipy.special.logsumexp(s_NC, axis=1)
        error_NC = np.exp(s_NC - log_total_N[:, None]) - onehot_NC
        gradient = np.concatenate([[np.mean((error_NC * z_NC).sum(axis=1))], error_NC.mean(axis=0)[1:]])
        return float(np.mean(log_total_N - s_NC[rows, y_N])), gradient if has_shifts else gradient[:1]

    start = np.concatenate([[1.0], np.zeros(n_classes - 1 if has_shifts else 0)])
    bounds = [(LEAST_SLOPE, LARGEST_SLOPE)] + [(-LARGEST_SHIFT, LARGEST_SHIFT)] * (len(start) - 1)
    found = scipy.optimize.minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B", options=STEPS)
    x = found.x if found.fun <= loss(start)[0] else start
    return float(x[0]), [0.0, *map(float, x[1:])] if has_shifts else [0.0] * n_classes


def fit_problems(
    probabilities_NC: Floats, labels_NC: Floats, *, is_exclusive: bool, has_shifts: bool
) -> list[tuple[float, list[float]]]:
    """Return slope and shifts of each problem, fitted to the samples whose label is known (`fit_problem`)."""
    of_problems, known = (
        problems(probabilities_NC, is_exclusive=is_exclusive),
        targets(labels_NC, is_exclusive=is_exclusive),
    )
    return [
        fit_problem(z[is_known], y, has_shifts=has_shifts) for z, (is_known, y) in zip(of_problems, known, strict=True)
    ]


def scaled(probabilities_NC: Floats, slopes: list[float], shifts: list[list[float]], *, is_exclusive: bool) -> Floats:
    """Return the probabilities (N, C) of softmax(a z + b) of each problem."""
    found = []
    for z_NC, slope, shift_C in zip(problems(probabilities_NC, is_exclusive=is_exclusive), slopes, shifts, strict=True):
        s_NC = slope * z_NC + np.asarray(shift_C)
        p_NC = np.exp(s_NC - scipy.special.logsumexp(s_NC, axis=1, keepdims=True))
        found.append(p_NC if is_exclusive else p_NC[:, 1:])
    return np.concatenate(found, axis=1)


def checked_numbers(
    parameters: Mapping[str, Any], name: str, *, n: int | None, low: float, high: float, most: int = 1_000_000
) -> list[float]:
    """Return a list of finite numbers in [low, high] among parameters that a file holds.

    Raises:
        UserError: there is no such list.

    >>> checked_numbers({"slopes": [1, 2.5]}, "slopes", n=2, low=0, high=9)
    [1.0, 2.5]
    """
    values = parameters.get(name)
    expected = f"a list of {most if n is None else n:,} numbers{' at most' if n is None else ''} in [{low:g}, {high:g}]"
    if isinstance(values, list) and (len(values) == n if n is not None else 0 < len(values) <= most):
        is_number = all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
        if is_number and all(low <= x <= high for x in values):
            return [float(x) for x in values]
    raise UserError(f"its parameter {name} is not {expected}, which train.py writes.")


def checked_lists(
    parameters: Mapping[str, Any], name: str, *, n_lists: int, n: int | None, low: float, high: float
) -> list[list[float]]:
    """Return lists of finite numbers in [low, high] among parameters that a file holds, as `checked_numbers` does one.

    Raises:
        UserError: there are no such lists.
    """
    lists = parameters.get(name)
    if not isinstance(lists, list) or len(lists) != n_lists:
        raise UserError(f"its parameter {name} is not a list of {n_lists} lists, which train.py writes.")
    return [checked_numbers({name: own}, name, n=n, low=low, high=high) for own in lists]


def _log(p: Floats) -> Floats:
    """Return logarithms of probabilities, those of 0 as of the least number."""
    return np.log(np.clip(p, TINY, None))
