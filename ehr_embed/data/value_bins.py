"""From a code's numbers to bins, their names in words, and a scale."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def bin_edges(values: npt.NDArray[np.float32], n_bins: int) -> npt.NDArray[np.float32]:
    """Lower bounds of the second and later quantile bins; every bin holds at least one of `values`.

    A variable with no more distinct values than bins gets one bin a value.

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
    # numpy.quantile(method="higher"), whose preparations take longer than most codes' sorting
    edges = ordered[np.ceil((len(ordered) - 1) * (np.arange(1, n_bins) / n_bins)).astype(np.intp)]
    edges = edges[_is_first(edges) & (edges > distinct[0])]
    if not len(edges):  # nearly all values are the minimum: bin what lies above it
        return np.concatenate([distinct[1:2], bin_edges(ordered[ordered > distinct[0]], n_bins - 1)])
    return edges


def _is_first(ordered: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Whether a sorted value differs from the one before it."""
    return np.append(np.ones(min(1, len(ordered)), bool), ordered[1:] != ordered[:-1])


def bin_text(number: int, n_bins: int) -> str:
    """A value bin in words; `number` counts from 1.

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
    """Median and interquartile range / 1.349 (the standard deviation of a normal variable with that range);
    the standard deviation where the range is 0, and 1 where that is 0 too.

    >>> robust_scale(np.array([1., 1., 1.]))
    (1.0, 1.0)
    """
    ordered = np.sort(values)
    low, median, high = (quantile(ordered, share) for share in (0.25, 0.5, 0.75))
    return median, (high - low) / 1.349 or float(values.astype(np.float64).std()) or 1.0


def quantile(ordered: npt.NDArray[np.float32], share: float) -> float:
    """The quantile of sorted values as `numpy.quantile` gives it, whose preparations take longer than all else here.

    >>> quantile(np.array([1.0, 2.0, 4.0]), 0.75)
    3.0
    """
    place = share * (len(ordered) - 1)
    below = int(place)
    a, b, t = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)]), place - below
    return b - (b - a) * (1 - t) if t >= 0.5 else a + (b - a) * t
