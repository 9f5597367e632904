"""What a search leaves at its end: its trials as the rows of summary.csv, and its facts in study.json."""

from __future__ import annotations

from pathlib import Path

import optuna
import pandas as pd
from optuna.study import StudyDirection

from ehr_embed.comparison.report import write_report
from ehr_embed.comparison.results import Row, objective_columns, split_overrides
from ehr_embed.core.secrets import masked
from ehr_embed.search.study import DISCARDED, SharedStudy

STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


def report_study(shared: SharedStudy, folder: Path, *, command: str, has_plots: bool = True) -> pd.DataFrame:
    """Report the trials of a study, those of other processes and hosts included.

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
    return write_report(rows, folder, directions=directions, facts=facts, study=study, has_plots=has_plots)


def trial_row(trial: optuna.trial.FrozenTrial, n_objectives: int) -> Row:
    """A trial as a row; the values of one that did not complete are empty, and its last report is its own column."""
    row: Row = {"run": str(trial.number), "state": STATES[trial.state.name]}
    # Optuna gives a pruned trial its last report as a value, which other trials had after other epochs.
    is_complete = trial.state == optuna.trial.TrialState.COMPLETE
    row |= objective_columns(trial.values if is_complete else [None] * n_objectives)
    if trial.intermediate_values:
        row["last_report"] = trial.intermediate_values[max(trial.intermediate_values)]
        row["n_reports"] = len(trial.intermediate_values)
    row |= split_overrides(trial.user_attrs.get("overrides", []))
    row |= trial.user_attrs.get("results", {})
    # Of the whole trial, with all its seeds and the start of its processes.
    row["seconds"] = trial.user_attrs.get("seconds")
    return row | {"host": trial.user_attrs.get("owner", {}).get("host"), "error": trial.user_attrs.get("error")}
