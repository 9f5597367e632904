"""Interface to the application whose runs are searched: all that a search asks of it, handed over by `register`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from omegaconf import DictConfig

from ehr_embed.core.errors import UserError
from ehr_embed.core.outcome import Outcome, Row

if TYPE_CHECKING:
    import optuna
    import pandas as pd


class Application(Protocol):
    """The application whose runs are searched."""

    def build(self, config: DictConfig, /, *, trusted: Sequence[str] = (), **arguments: Any) -> Any:
        """Build what `config._target_` names: a sampler, a pruner, a task (which declares metrics and directions) or a tracker."""

    def data_identity(self, example: DictConfig) -> str | None:
        """Return digests of the data of a composed job, wherever they lie; None where the overrides say which data they are.

        The digests are joined by a colon; a study that has only the first of them was made by an earlier version.
        """

    def with_results(self, outcome: Outcome, folder: Path, objectives: Sequence[str], n_objectives: int) -> Outcome:
        """Return the outcome of a job with the numbers that the job left in its folder, and the named objectives from them."""

    def write_report(
        self,
        rows: Sequence[Row],
        folder: Path,
        *,
        directions: Sequence[str],
        facts: Mapping[str, Any],
        study: optuna.Study,
        has_plots: bool,
    ) -> pd.DataFrame:
        """Write summary.csv, study.json and plots of a study into `folder`, and return the table."""

    def report_folder(self, folder: Path) -> None:
        """Report the jobs of a multirun that another sweeper ran, from what they left in `folder`."""

    def tabulate(self, folder: Path, *, metrics: Sequence[str], by: Sequence[str], stem: Path) -> None:
        """Print means over the runs in `folder`, grouped by the keys `by`, and write them to files that begin with `stem`."""


_registered: list[Application] = []


def register_application(chosen: Application) -> None:
    """Make `application` return this one."""
    _registered[:] = [chosen]


def application() -> Application:
    """Return the application that was registered in this process.

    Raises:
        UserError: none was.
    """
    if not _registered:
        raise UserError(
            "a search needs to know the application whose runs it searches. Call ehr_embed.search.plugin.register(APPLICATION)"
        )
    return _registered[0]
