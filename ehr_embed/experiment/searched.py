"""Answers a search's questions about a run of this project: its task, its data, its metrics and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    import optuna
    import pandas as pd

    from ehr_embed.core.outcome import Outcome, Row


class SearchedRuns:
    """The runs of train.py, as a search sees them; see `ehr_embed.search.application.Application`.

    Each method imports what it needs, since Optuna, pandas and Polars take seconds that a single run's start and
    a command's help do not need.
    """

    def build(self, config: DictConfig, /, *, trusted: Sequence[str] = (), **arguments: Any) -> Any:
        from ehr_embed.config.instantiate import instantiate

        return instantiate(config, trusted=trusted, **arguments)

    def data_identity(self, example: DictConfig) -> str | None:
        """Return two digests of the dataset's files, joined by a colon; they do not depend on the folder that holds the dataset.

        The first digest is the one that studies of earlier versions store, the second is the present one. Return None for data
        that are generated or imported: their overrides, which the study stores too, identify them.
        """
        from ehr_embed.config.instantiate import MEDS
        from ehr_embed.core.files import digest
        from ehr_embed.core.fingerprints import known_fingerprints, without_content

        root = OmegaConf.select(example, "data.root")
        if root is None or OmegaConf.select(example, "data.source._target_") != MEDS:
            return None
        from ehr_embed.sources.meds import MedsSource

        with known_fingerprints(Path(OmegaConf.select(example, "cache_dir", default="cache"))):
            found = MedsSource(root=root).fingerprint()
        return f"{digest({file: without_content(value) for file, value in found.items()})}:{digest(found)}"

    def with_results(self, outcome: Outcome, folder: Path, objectives: Sequence[str], n_objectives: int) -> Outcome:
        from ehr_embed.comparison.results import with_results

        return with_results(outcome, folder, objectives, n_objectives)

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
        from ehr_embed.comparison.report import write_report

        return write_report(rows, folder, directions=directions, facts=facts, study=study, has_plots=has_plots)

    def report_folder(self, folder: Path) -> None:
        from ehr_embed.comparison.report import report_folder

        report_folder(folder)

    def tabulate(self, folder: Path, *, metrics: Sequence[str], by: Sequence[str], stem: Path) -> None:
        from ehr_embed.comparison.tabulate import print_table, tabulate, write_table

        tabulated = tabulate([folder], metrics=metrics, by=by)
        write_table(tabulated, stem)
        print_table(tabulated)
