"""Compute the value bins of a code, their names in words, and the scale that normalises its values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def bin_edges(values: npt.NDArray[np.float32], n_bins: int) -> npt.NDArray[np.float32]:
    """Return the lower bounds of the second and later quantile bins; every bin holds at least one of `values`.

    A variable with at most `n_bins` distinct values gets one bin per value.

    >>> bin_edges(np.arange(10.), 5).tolist()
    [2.0, 4.0, 6.0, 8.0]
    >>> bin_edges(np.array([0., 0., 0., 1.]), 10).tolist()
    [1.0]
    >>> bin_edges(np.array([3., 3.]), 10).tolist(), bin_edges(np.array([0., 0., 0., 1., 2.]), 2).tolist()
    ([], [1.0])
    """
    ordered = np.sort(values)
    distinct = ordered[_is_first(ordered)]
    if len(distinct) <= n_bins:
        return distinct[1:]
    if n_bins < 2:
        return distinct[:0]
    # The same as numpy.quantile(method="higher"), whose overhead is larger than the time to sort the values of most
    # codes.
    edges = ordered[np.ceil((len(ordered) - 1) * (np.arange(1, n_bins) / n_bins)).astype(np.intp)]
    edges = edges[_is_first(edges) & (edges > distinct[0])]
    if not len(edges):  # nearly all values equal the minimum, so the values above it are binned
        return np.concatenate([distinct[1:2], bin_edges(ordered[ordered > distinct[0]], n_bins - 1)])
    return edges


def _is_first(ordered: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return for each sorted value whether it differs from the one before it."""
    return np.append(np.ones(min(1, len(ordered)), bool), ordered[1:] != ordered[:-1])


def bin_text(number: int, n_bins: int) -> str:
    """Return the name of a value bin in words; `number` counts from 1.

    >>> bin_text(8, 10)
    'high (8th of 10)'
    >>> bin_text(1, 10), bin_text(2, 3)
    ('very low (1st of 10)', 'middle (2nd of 3)')
    """
    position = (number - 0.5) / n_bins
    words = ((0.1, "very low"), (0.3, "low"), (0.7, "middle"), (0.9, "high"), (1.0, "very high"))
    word = next(word for bound, word in words if position < bound)
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{word} ({number}{suffix} of {n_bins})"


def robust_scale(values: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Return the median and a robust standard deviation.

    The latter is the interquartile range / 1.349, which is the standard deviation of a normal variable with that range.
    Where the range is 0, it is the standard deviation of the values; where that is 0 too, it is 1.

    >>> robust_scale(np.array([1., 1., 1.]))
    (1.0, 1.0)
    """
    ordered = np.sort(values)
    low, median, high = (quantile(ordered, share) for share in (0.25, 0.5, 0.75))
    return median, (high - low) / 1.349 or float(values.astype(np.float64).std()) or 1.0


def quantile(ordered: npt.NDArray[np.float32], share: float) -> float:
    """Return the same quantile of sorted values as `numpy.quantile`, without its overhead.

    >>> quantile(np.array([1.0, 2.0, 4.0]), 0.75)
    3.0
    """
    place = share * (len(ordered) - 1)
    below = int(place)
    a, b, t = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)]), place - below
    return b - (b - a) * (1 - t) if t >= 0.5 else a + (b - a) * t
