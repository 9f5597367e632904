"""Read the metrics of a split as metrics.json holds them: values, values with intervals, and which intervals are missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def values_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the point value of each metric of a split, without other entries such as counts.

    >>> values_of({"auroc": {"value": 0.8, "low": 0.7, "high": 0.9}, "n": 10})
    {'auroc': 0.8}
    """
    return {name: entry["value"] for name, entry in metrics.items() if isinstance(entry, dict) and "value" in entry}


def with_interval(entry: Mapping[str, float | None]) -> str:
    """Format a metric's value with its interval, if it has one.

    >>> with_interval({"value": 0.8, "low": 0.71, "high": 0.9}), with_interval({"value": 0.8, "low": None, "high": None})
    ('0.800 [0.710, 0.900]', '0.800')
    """
    tail = "" if entry["low"] is None else f" [{entry['low']:.3f}, {entry['high']:.3f}]"
    return f"{entry['value']:.3f}{tail}"


def intervals_missing(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each split of `metrics` that has no intervals because all its samples are of one subject.

    >>> intervals_missing({"tuning": {"n_subjects": 1, "n": 40}, "held_out": {"n_subjects": 9, "n": 9}})
    ['All 40 samples of tuning are of one subject: nothing tells how the metrics vary between subjects, hence no intervals.']
    """
    return [
        f"All {own['n']:,} samples of {split} are of one subject: nothing tells how the metrics vary between subjects, hence "
        "no intervals."
        for split, own in metrics.items()
        if isinstance(own, Mapping) and own.get("n_subjects") == 1
    ]
