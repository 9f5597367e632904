"""Report of a search: write its trials as the rows of summary.csv, and its settings and best trials into study.json."""

from __future__ import annotations

from pathlib import Path

import optuna
import pandas as pd
from optuna.study import StudyDirection

from ehr_embed.core.outcome import Row, objective_columns, split_overrides
from ehr_embed.core.secrets import masked
from ehr_embed.search.application import application
from ehr_embed.search.study import DISCARDED, SharedStudy

STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


def report_study(shared: SharedStudy, folder: Path, *, command: str, has_plots: bool = True) -> pd.DataFrame:
    """Report all trials of a study, including those that other processes and hosts ran.

    Args:
        shared: the study.
        folder: folder into which summary.csv, study.json and plots/ are written.
        command: command line of the search, recorded in study.json.
        has_plots: also draw Optuna's plots.

    Returns:
        The table of `summary.csv`.
    """
    study = shared.study
    trials = [trial for trial in study.get_trials(deepcopy=False) if DISCARDED not in trial.user_attrs]
    rows = [trial_row(trial, len(study.directions)) for trial in trials]
    directions = ["maximize" if d == StudyDirection.MAXIMIZE else "minimize" for d in study.directions]
    facts = {
        "study": study.study_name,
        "storage": masked(shared.storage.url),
        "n_trials": shared.n_trials,
        "sampler": type(study.sampler).__name__,
        "pruner": type(study.pruner).__name__,
        **study.user_attrs.get("settings", {}),
        "fixed": [masked(line) for line in study.user_attrs.get("fixed", [])],
        "command": masked(command),
    }
    return application().write_report(
        rows, folder, directions=directions, facts=facts, study=study, has_plots=has_plots
    )


def trial_row(trial: optuna.trial.FrozenTrial, n_objectives: int) -> Row:
    """Return a trial as a row of summary.csv; a trial that did not complete has empty objectives.

    The column last_report holds the last value that the trial reported to the pruner, and n_reports their number.
    """
    row: Row = {"run": str(trial.number), "state": STATES[trial.state.name]}
    # Optuna sets the value of a pruned trial to its last report; after fewer epochs, that is not comparable with others.
    is_complete = trial.state == optuna.trial.TrialState.COMPLETE
    row |= objective_columns(trial.values if is_complete else [None] * n_objectives)
    if trial.intermediate_values:
        row["last_report"] = trial.intermediate_values[max(trial.intermediate_values)]
        row["n_reports"] = len(trial.intermediate_values)
    row |= split_overrides(trial.user_attrs.get("overrides", []))
    row |= trial.user_attrs.get("results", {})
    # Seconds of the whole trial: all its seeds, and the start of their processes.
    row["seconds"] = trial.user_attrs.get("seconds")
    return row | {"host": trial.user_attrs.get("owner", {}).get("host"), "error": trial.user_attrs.get("error")}
