"""Report of a multirun: write summary.csv, study.json and Optuna's plots, and print the runs, the best first."""

from __future__ import annotations

import datetime
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from rich.console import Console
from rich.table import Table

from ehr_embed import __version__
from ehr_embed.comparison.results import find_runs, read_rows
from ehr_embed.comparison.search_report import LEARNING, report_of_folder
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path, write_json
from ehr_embed.core.outcome import Row
from ehr_embed.core.secrets import MASK, is_secret, masked
from ehr_embed.run_folder.layout import PLOTS

log = logging.getLogger(__name__)
MAX_SHOWN = 20
LOG_WIDTH = 140
"""Width in characters of the printed table where there is no terminal."""
SHOWN_METRICS = ("held_out/auroc", "held_out/accuracy", "held_out/top1", "held_out/loss")
"""The metric that is printed is the first of these, or of a task that has none of them the first that it measures."""


def report_folder(folder: Path) -> None:
    """Report the jobs of a multirun from the files in `folder`; do nothing if no job left a result."""
    try:
        runs = find_runs([folder])
    except UserError:
        return
    rows, direction = read_rows(runs, relative_to=folder)
    write_report(rows, folder, directions=[direction], facts={})


def write_report(
    rows: Sequence[Row],
    folder: Path,
    *,
    directions: Sequence[str],
    facts: Mapping[str, Any],
    study: optuna.Study | None = None,
    has_plots: bool = True,
) -> pd.DataFrame:
    """Write summary.csv, study.json, plots/ and report.html into `folder`, and print the table.

    Args:
        rows: one row per run, see `ehr_embed.core.outcome.Row`.
        folder: folder for the results.
        directions: `maximize` or `minimize`, one per objective.
        facts: further facts of the study for study.json.
        study: Optuna study to plot; None = a study made from the rows.
        has_plots: also draw the plots and write report.html.

    Returns:
        The table of `summary.csv`.
    """
    rows = [_without_secrets(row) for row in rows]
    table = best_first(pd.DataFrame(rows), directions)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "summary.csv") as path:
        table.to_csv(path, index=False)
    objectives = objective_names(table)
    overrides = override_names(rows)
    best = table[table["state"] == "finished"] if len(table) else table
    best = best[best["is_best"]] if len(objectives) > 1 and len(best) else best.head(1)
    report = {
        **facts,
        "directions": list(directions),
        "n_by_state": dict(Counter(str(row["state"]) for row in rows)),
        "best": [
            {
                "run": row["run"],
                "values": {name: row[name] for name in objectives},
                "overrides": {name: row[name] for name in overrides if isinstance(row[name], str)},
            }
            for row in best.to_dict("records")
        ],
        "versions": {"ehr_embed": __version__, "optuna": metadata.version("optuna")},
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(folder / "study.json", _jsonable(report))
    if has_plots:
        # Both draw with scikit-learn or Matplotlib, whose import takes a second that a search without plots need not wait.
        from ehr_embed.comparison.learning_curves import write_learning_curves
        from ehr_embed.comparison.study_plots import write_study_plots

        write_study_plots(folder / PLOTS, study or study_of(rows, directions), objectives)
        names = [str(name) for name in table["run"]] if len(table) else []
        write_learning_curves(folder / PLOTS / f"{LEARNING}.png", [_folder_of(folder, name) for name in names], names)
        report_of_folder(folder)
    print_table(table, objectives, overrides, folder)
    return table


def _folder_of(folder: Path, name: str) -> Path:
    """Return the folder of a run that is named by its folder in a sweep, or by a path of its own."""
    return folder / name if (folder / name).is_dir() else Path(name)


def _without_secrets(row: Row) -> Row:
    """Return a row with the secrets in its overrides masked.

    >>> _without_secrets({"run": "0", "tracker.api_key": "k1", "seed": "1"})
    {'run': '0', 'tracker.api_key': '***', 'seed': '1'}
    """
    return {
        key: value if not isinstance(value, str) else MASK if is_secret(key) else masked(value)
        for key, value in row.items()
    }


def best_first(table: pd.DataFrame, directions: Sequence[str]) -> pd.DataFrame:
    """Sort rows by objective, rows without one last. With several objectives, put the Pareto front first (`is_best`)."""
    if not len(table):
        return table
    objectives = objective_names(table)
    if len(objectives) == 1:
        return table.sort_values("objective", ascending=directions[0] == "minimize", na_position="last", kind="stable")
    signs = [1 if direction == "minimize" else -1 for direction in directions]
    losses = table[objectives].astype(float) * signs
    front = [
        bool(loss.notna().all())
        and not any((other <= loss).all() and (other < loss).any() for _, other in losses.iterrows())
        for _, loss in losses.iterrows()
    ]
    table = table.assign(is_best=front, _loss=losses[objectives[0]])
    by = table.sort_values(["is_best", "_loss"], ascending=[False, True], na_position="last", kind="stable")
    return by.drop(columns="_loss")


def objective_names(table: pd.DataFrame) -> list[str]:
    """Return the names of the columns that hold objectives, in order."""
    return [
        name for name in table.columns if name == "objective" or (name.startswith("objective_") and name[10:].isdigit())
    ]


def override_names(rows: Sequence[Row]) -> list[str]:
    """Return the columns of overrides (those with text values) whose values differ between rows."""
    fixed = {"run", "state", "error", "host"}
    keys = dict.fromkeys(
        key for row in rows for key, value in row.items() if isinstance(value, str) and key not in fixed
    )
    return [key for key in keys if len({str(row.get(key)) for row in rows}) > 1]


def study_of(rows: Sequence[Row], directions: Sequence[str]) -> optuna.Study:
    """Build an in-memory Optuna study from rows, so that Optuna can plot the jobs of any sweeper."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # which would tell of a study that nobody sees
    study = optuna.create_study(directions=list(directions))  # type: ignore[arg-type]
    objectives = objective_names(pd.DataFrame(list(rows)))
    distributions: dict[str, optuna.distributions.BaseDistribution] = {}
    for key in override_names(rows):
        texts = [str(row[key]) for row in rows if key in row]
        numbers = [_number(text) for text in texts]
        known = [number for number in numbers if number is not None]
        distributions[key] = (
            optuna.distributions.FloatDistribution(min(known), max(known))
            if len(known) == len(texts)
            else optuna.distributions.CategoricalDistribution(sorted(set(texts)))
        )
    for row in rows:
        values = [row.get(name) for name in objectives]
        is_finished = row["state"] == "finished" and all(isinstance(value, int | float) for value in values)
        here = {key: distribution for key, distribution in distributions.items() if key in row}
        numeric = {k for k, d in here.items() if isinstance(d, optuna.distributions.FloatDistribution)}
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if is_finished else optuna.trial.TrialState.FAIL,
                values=[float(value) for value in values if value is not None] if is_finished else None,
                params={key: float(row[key]) if key in numeric else str(row[key]) for key in here},
                distributions=here,
            )
        )
    return study


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def print_table(table: pd.DataFrame, objectives: Sequence[str], overrides: Sequence[str], folder: Path) -> None:
    """Print the best rows: objectives, first held-out metric with its interval, and the overrides that differ."""
    console = wide_console()
    shown = Table(title=f"{len(table)} runs, best first, {folder / 'summary.csv'}", title_justify="left")
    on_held_out = [
        str(name) for name in table.columns if str(name).startswith("held_out/") and str(name).count("/") == 1
    ]
    usual = [name for name in SHOWN_METRICS if name in on_held_out]
    told = [name for name in overrides if not _follows_class(table, name)]
    metric = next(iter([*usual, *on_held_out]), None)
    for name in ("run", "state"):
        shown.add_column(name)
    for name in [*objectives, *([metric] if metric else []), "s"]:
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("overrides", overflow="fold")
    for row in table.head(MAX_SHOWN).to_dict("records"):
        cells = [str(row["run"]), str(row["state"])]
        cells += [_cell(row.get(name), ".4f") for name in objectives]
        cells += [_interval(row, metric)] if metric else []
        cells.append(_cell(row.get("seconds"), ",.0f"))
        cells.append(_told({name: row[name] for name in told if _is_set(row[name])}, overrides))
        shown.add_row(*cells)
    console.print(shown)
    if len(table) > MAX_SHOWN:
        console.print(f"{len(table) - MAX_SHOWN} more rows in {folder / 'summary.csv'}", highlight=False)


def wide_console() -> Console:
    """Return the console: the terminal, or without one a plain output that is wide enough for a row."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)


def _follows_class(table: pd.DataFrame, key: str) -> bool:
    """Return whether the class of a key's group says the key's value too, since all runs of one class have the same one.

    >>> table = pd.DataFrame({"model._target_": ["A", "A", "B"], "model.n_trees": [9, 9, None], "model.dropout": [0.1, 0.3, None]})
    >>> _follows_class(table, "model.n_trees"), _follows_class(table, "model.dropout"), _follows_class(table, "model._target_")
    (True, False, False)
    """
    of_class = f"{key.partition('.')[0]}._target_"
    if key == of_class or of_class not in table.columns:
        return False
    return bool(table[key].astype(str).groupby(table[of_class].astype(str)).nunique().max() <= 1)


def _told(chosen: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return what tells a run from the others, as it might be typed; a class is said by its name.

    >>> keys = ["model._target_", "model.n_trees", "seed"]
    >>> _told({"model._target_": "ehr_embed.models.gbm.GBM", "seed": "0"}, keys)
    'model=GBM seed=0'
    """
    return " ".join(
        f"{key.removesuffix('._target_')}={str(value).rpartition('.')[2]}"
        if key.endswith("._target_")
        else f"{_short(key, keys)}={_shown(value)}"
        for key, value in chosen.items()
    )


def _short(key: str, keys: Sequence[str]) -> str:
    """Return the last part of a dotted key, or the whole key where another key ends in the same part.

    >>> _short("model.n_layers", ["model.n_layers", "seed"]), _short("a.x", ["a.x", "b.x"])
    ('n_layers', 'a.x')
    """
    last = key.rpartition(".")[2]
    return last if [other.rpartition(".")[2] for other in keys].count(last) == 1 else key


def _is_set(value: Any) -> bool:
    return value is not None and value == value


def _shown(value: Any) -> str:
    """Return a number with four significant digits, and any other text unchanged.

    >>> _shown("0.0011509493"), _shown("mpnet"), _shown("128")
    ('0.001151', 'mpnet', '128')
    """
    number = _number(str(value))
    return str(value) if number is None else f"{number:.4g}"


def _interval(row: Mapping[Any, Any], name: str) -> str:
    low, high = row.get(f"{name}/low"), row.get(f"{name}/high")
    has_interval = isinstance(low, float) and isinstance(high, float) and low == low and high == high
    return _cell(row.get(name), ".3f") + (f" [{low:.3f}, {high:.3f}]" if has_interval else "")


def _cell(value: Any, form: str) -> str:
    """Return a number formatted by `form`, a text unchanged, and an empty text for a missing value.

    >>> _cell(0.12345, ".3f"), _cell("mpnet", ".3f"), _cell(float("nan"), ".3f"), _cell(None, ".3f")
    ('0.123', 'mpnet', '', '')
    """
    if value is None or value != value:
        return ""
    return format(value, form) if isinstance(value, int | float) else str(value)


def _jsonable(value: Any) -> Any:
    """Return a value in which NaN, pandas' missing value, is replaced by None, which JSON can hold."""
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and value != value else value
