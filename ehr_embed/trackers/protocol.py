"""What a run tells the outside world, and how a run ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import optuna
import pandas as pd

Scalar = float | int | str | None


class Tracker(Protocol):
    """Records one run, from entering the context to leaving it. Every member writes `<run_dir>/metrics.jsonl`.

    The experiment builds each with the same five arguments: `run_dir`, `config`, `tags`, `table_digest` and
    `table_path` (the embedding table's file).
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """One row of history; `step` is the epoch and rises from row to row."""

    def summarise(self, values: Mapping[str, Scalar]) -> None:
        """The values a run is compared by, such as `best/held_out/auroc`."""

    def add_plots(self, paths: Sequence[Path]) -> None:
        """PNG files, named by their stems."""

    def add_examples(self, make: Callable[[], pd.DataFrame]) -> None:
        """Records in text with their predictions; `make` is called only by a tracker that was asked to keep patient text."""


def state_of(exc_type: type[BaseException] | None) -> str:
    """How a run ended: `finished`, `pruned` (its search gave it up), `stopped` (by a signal; it may go on) or `failed`.

    >>> state_of(None), state_of(optuna.TrialPruned), state_of(KeyboardInterrupt), state_of(ValueError)
    ('finished', 'pruned', 'stopped', 'failed')
    """
    if exc_type is None:
        return "finished"
    if issubclass(exc_type, KeyboardInterrupt):
        return "stopped"
    return "pruned" if issubclass(exc_type, optuna.TrialPruned) else "failed"


def json_ready(values: Mapping[str, Any]) -> dict[str, Any]:
    """NumPy and torch scalars as Python numbers; NaN and infinity, which JSON does not have, as None.

    >>> json_ready({"loss": float("nan"), "epoch": 3, "precision": "bf16-mixed"})
    {'loss': None, 'epoch': 3, 'precision': 'bf16-mixed'}
    """
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in plain.items()
    }
