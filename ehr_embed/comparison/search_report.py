"""Write report.html of a search, a multirun or a comparison: a table of its trials that sorts itself, plots, and paired tests.

The page is made from summary.csv, study.json, comparisons.csv and plots/ of the folder, and holds no path of a dataset.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ehr_embed import __version__
from ehr_embed.core.files import read_json
from ehr_embed.core.secrets import without_folders, without_private
from ehr_embed.reports.html_report import save
from ehr_embed.reports.page import picture, render, shown
from ehr_embed.run_folder.layout import PLOTS, REPORT

SUMMARY_TABLE, STUDY, TESTS, LEARNING = "summary.csv", "study.json", "comparisons.csv", "learning_curves"
COMPARISON = "comparison"
"""Folder inside a sweep's that `ehr-embed compare SWEEP_DIR` writes into."""
PLACES = (
    ("optimization_history", "History"),
    (LEARNING, "Learning curves"),
    ("param_importances", "Importances"),
    ("slice", "Values and results"),
    ("parallel_coordinate", "Values together"),
    ("pareto_front", "Pareto front"),
)
WIDE = (LEARNING, "slice", "parallel_coordinate")
FACTS = ("seconds", "n_parameters", "events_per_s", "peak_memory_mib")
NOT_COLUMNS = ("error", "host", "is_best", "last_report", "n_reports")
TOLD = ("study", "sampler", "pruner", "n_trials", "directions", "n_by_state", "written")


def is_search(folder: Path) -> bool:
    """Return whether a folder is one that a search, a multirun or a comparison has reported."""
    return (folder / SUMMARY_TABLE).is_file() and (folder / STUDY).is_file()


def report_of_folder(folder: Path) -> Path:
    """Write report.html of a search from the files in its folder, and return its path."""
    table = pd.read_csv(folder / SUMMARY_TABLE, dtype=str, keep_default_na=False)
    facts = read_json(folder / STUDY)
    rows = table.to_dict("records")
    columns = _columns(list(table.columns), rows)
    tests = next((path for path in (folder / TESTS, folder / COMPARISON / TESTS) if path.is_file()), None)
    pictures = _pictures(folder / PLOTS)
    page = render(
        "search.html.jinja",
        title=folder.resolve().name,
        about=_about(facts),
        tiles=_tiles(rows, facts),
        contents=_contents(pictures, tests is not None),
        heads=[_title(name) for name in columns],
        rows=[[_cell(name, row) for name in columns] for row in _with_short_names(rows)],
        plots_of=pictures,
        tests=_tests(tests),
        facts=[(name, _told(facts[name])) for name in TOLD if name in facts],
        fixed=[without_folders(str(line)) for line in facts.get("fixed", [])],
        version=__version__,
    )
    return save(page, folder / REPORT)


def _columns(names: Sequence[str], rows: Sequence[Mapping[Any, Any]]) -> list[str]:
    """Return the columns of the table: run, state, objectives, what differs, metrics of held_out, then facts of training."""
    filled = [name for name in names if name not in NOT_COLUMNS and any(row[name] for row in rows)]
    metrics = [name for name in filled if name.startswith("held_out/") and name.count("/") == 1]
    objectives = [name for name in filled if name.startswith("objective")]
    start = [name for name in ("run", "state") if name in filled]
    facts = [name for name in FACTS if name in filled]
    results = {name for name in filled if name.startswith(("held_out/", "tuning/"))}
    known = {
        *start,
        *objectives,
        *facts,
        *results,
        "train_seconds",
        "embedding_seconds",
        "steps",
        "epochs",
        "best_epoch",
    }
    known |= {"n_trained", "n_parameters"}
    chosen = [name for name in filled if name not in known and len({row[name] for row in rows}) > 1]
    return [*start, *objectives, *chosen, *metrics, *facts]


def _with_short_names(rows: Sequence[Mapping[Any, Any]]) -> list[dict[Any, Any]]:
    """Return the rows with absolute folders of runs named from their common folder on."""
    names = [str(row["run"]) for row in rows]
    if not all(Path(name).is_absolute() for name in names):
        return [dict(row) for row in rows]
    common = os.path.commonpath(names) if len(names) > 1 else str(Path(names[0]).parent)
    return [dict(row) | {"run": os.path.relpath(name, common)} for row, name in zip(rows, names, strict=True)]


def _cell(name: str, row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what a cell shows and by what its column is sorted."""
    text = str(row.get(name, ""))
    number = _number(text)
    if number is None:
        return {"text": str(without_private({name: text})[name]), "value": text, "is_number": False}
    low, high = (_number(str(row.get(f"{name}/{end}", ""))) for end in ("low", "high"))
    told = shown(int(number) if number.is_integer() and "." not in text else number)
    if "/" in name:
        told = f"{number:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else "")
    elif name.startswith("objective"):
        told = f"{number:.4f}"
    return {"text": told, "value": text, "is_number": True}


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) != float("inf") and number == number else None


def _title(name: str) -> str:
    """Return a column's heading.

    >>> _title("held_out/auroc"), _title("model.n_layers"), _title("n_parameters")
    ('held out auroc', 'model.n_layers', 'n parameters')
    """
    return name if "." in name else name.replace("/", " ").replace("_", " ")


def _short(value: str) -> str:
    """Return the value of an override as the table of runs shows it.

    >>> _short("0.009062263471261952"), _short("mean"), _short("512")
    ('0.009062', 'mean', '512')
    """
    number = _number(value)
    return value if number is None or len(value) < len("0.0000000") else shown(number)


def _about(facts: Mapping[str, Any]) -> str:
    told = [str(part) for name in ("study", "sampler", "pruner") if (part := facts.get(name))]
    if directions := facts.get("directions"):
        told.append("searched to " + ", ".join(map(str, directions)))
    return " · ".join(told)


def _tiles(rows: Sequence[Mapping[Any, Any]], facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    states = facts.get("n_by_state", {})
    tiles = [("runs", str(len(rows)), ", ".join(f"{count} {state}" for state, count in states.items()))]
    for best in facts.get("best", [])[:1]:
        for name, value in best["values"].items():
            tiles.append((f"best {name} (tuning)", f"{value:.4f}" if isinstance(value, float) else shown(value), ""))
        told = ", ".join(f"{key}={_short(str(without_private({key: v})[key]))}" for key, v in best["overrides"].items())
        tiles.append(("best run", _run_name(best["run"]), told[:120]))
    seconds = [number for row in rows if (number := _number(str(row.get("seconds", "")))) is not None]
    if seconds:
        tiles.append(("time of all runs", f"{sum(seconds):,.0f} s", f"{sum(seconds) / len(seconds):,.1f} s per run"))
    return tiles


def _pictures(folder: Path) -> list[tuple[str, str, list[tuple[str, str, bool]]]]:
    """Return (anchor, heading, pictures) of each kind of plot; with several objectives there is one picture per objective."""
    found = []
    for name, heading in PLACES:
        files = sorted(folder.glob(f"{name}.png")) + sorted(folder.glob(f"{name}_objective_*.png"))
        pictures = [
            (path.stem.replace("_", " "), address, name in WIDE)
            for path in files
            if (address := picture(path)) is not None
        ]
        if pictures:
            found.append((name, heading, pictures))
    return found


def _tests(path: Path | None) -> dict[str, Any] | None:
    """Return the paired tests of comparisons.csv."""
    if path is None:
        return None
    table = pd.read_csv(path)
    reference = str(table["run"].iloc[0]) if len(table) else ""
    rows = []
    for row in table.to_dict("records"):
        has_draws = row["p"] == row["p"]
        interval = f" [{row['low']:+.4f}, {row['high']:+.4f}]" if has_draws else ""
        rows.append(
            [
                {"text": row["metric"], "value": row["metric"], "is_number": False},
                {"text": _run_name(row["other"]), "value": _run_name(row["other"]), "is_number": False},
                {"text": f"{row['difference']:+.4f}{interval}", "value": row["difference"], "is_number": True},
                {
                    "text": f"{row['p']:.4f}" if has_draws else "",
                    "value": row["p"] if has_draws else "",
                    "is_number": True,
                },
                {
                    "text": f"{row['p_holm']:.4f}" if has_draws else "",
                    "value": row["p_holm"] if has_draws else "",
                    "is_number": True,
                },
            ]
        )
    return {"reference": _run_name(reference), "rows": rows}


def _run_name(path: Any) -> str:
    """Return the last two parts of a run's folder, which name the sweep and the job.

    >>> _run_name("/data/ann/multirun/sizes/3")
    'sizes/3'
    """
    return "/".join(Path(str(path)).parts[-2:])


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else shown(value)


def _contents(pictures: Sequence[tuple[str, str, Any]], has_tests: bool) -> list[tuple[str, str]]:
    tests = [("tests", "Paired tests")] if has_tests else []
    return [("runs", "Runs"), *((name, heading) for name, heading, _ in pictures), *tests, ("settings", "Settings")]
