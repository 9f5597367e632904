"""Interface of trackers, which record the metrics of a run, and the names of the states in which a run can end."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

if TYPE_CHECKING:  # it takes half a second to import, and no run needs it before its first epoch
    import pandas as pd

Scalar = float | int | str | None


class Tracker(Protocol):
    """Context manager that records one run while it is open. Every tracker writes `<run_dir>/metrics.jsonl`.

    The experiment builds each tracker with the same five arguments: `run_dir`, `config`, `tags`, `table_digest` and
    `table_path` (the embedding table's file).
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Record the metrics of one epoch; `step` is the epoch and rises from call to call."""

    def summarise(self, values: Mapping[str, Scalar]) -> None:
        """Record the values by which runs are compared, such as `best/held_out/auroc`."""

    def add_plots(self, paths: Sequence[Path]) -> None:
        """Record PNG files under the stems of their names."""

    def add_examples(self, make: Callable[[], pd.DataFrame]) -> None:
        """Record the table of example records, with their texts and predictions, that `make` returns.

        Call `make` only if the user asked this tracker to keep patient text.
        """


class MakesReport(Protocol):
    """Makes the report of a run as HTML."""

    def __call__(self, *, has_codes: bool = True) -> str:
        """Return the report; without `has_codes`, it quotes no code and no text of the data."""
        ...


@runtime_checkable
class KeepsReport(Protocol):
    """A tracker that keeps the report of a run."""

    def add_report(self, make: MakesReport) -> None:
        """Record the report, with codes and texts of the data only if the user asked this tracker to keep those."""
        ...


@runtime_checkable
class ChecksFirst(Protocol):
    """A tracker that can tell, before anything is computed, that it will refuse to start."""

    def check(self) -> None:
        """Refuse now what would be refused when the tracker is entered.

        Raises:
            UserError: the tracker cannot start as it is configured.
        """
        ...


def state_of(exc_type: type[BaseException] | None) -> str:
    """Return the state of a run that ended with this exception.

    `pruned` = the search stopped the run, `stopped` = a signal did, and the run may be resumed.

    >>> import optuna
    >>> state_of(None), state_of(optuna.TrialPruned), state_of(KeyboardInterrupt), state_of(ValueError)
    ('finished', 'pruned', 'stopped', 'failed')
    """
    if exc_type is None:
        return "finished"
    if issubclass(exc_type, KeyboardInterrupt):
        return "stopped"
    optuna = sys.modules.get("optuna")  # where it was never imported, nothing was pruned
    return "pruned" if optuna is not None and issubclass(exc_type, optuna.TrialPruned) else "failed"


def json_ready(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that JSON can hold: NumPy and torch scalars become Python numbers, NaN and infinity become None.

    >>> json_ready({"loss": float("nan"), "epoch": 3, "precision": "bf16-mixed"})
    {'loss': None, 'epoch': 3, 'precision': 'bf16-mixed'}
    """
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in plain.items()
    }
