"""Tabulate many runs: runs that differ only in their seed form one row, with mean, SD and 95 % interval over these runs.

Where the runs of a row are folds of a cross-validation (data.split_column), the seeds of each fold are averaged first, and
mean and SD are over the folds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd
from rich.table import Table
from scipy import stats

from ehr_embed.comparison.paired_bootstrap import METRICS, NUMBER_METRICS, ensemble
from ehr_embed.comparison.provenance_columns import provenance_of
from ehr_embed.comparison.report import wide_console
from ehr_embed.comparison.results import (
    differences,
    find_runs,
    flat_metrics,
    read_config,
    split_overrides,
)
from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.files import atomic_path, digest
from ehr_embed.core.manifest import checked
from ehr_embed.core.outcome import read_outcome
from ehr_embed.evaluation.predictions import read_predictions
from ehr_embed.run_folder.finish import read_metrics
from ehr_embed.run_folder.layout import FINISHED, predictions_file

FOLDER = "folder"
"""Value of --by that makes one row per folder of the command line."""
FOLD = "data.split_column"
"""Configuration key whose values distinguish the folds of a cross-validation."""
REPEATS = ("seed", FOLD, "data.source.split_column", "task.fraction_seed")
"""Keys in which runs of one row may differ: such runs are repetitions of each other."""
SHOWN = (
    *(f"held_out/{name}" for name in (*METRICS, *NUMBER_METRICS)),
    *("events_per_s", "n_parameters", "seconds"),
)
TITLES = {
    "events_per_s": "training speed, events/s",
    "ms_per_step": "iteration speed, ms per step",
    "n_trained": "parameters trained",
    "n_parameters": "parameters in all",
    "model_mib": "model size, MiB",
    "peak_memory_mib": "peak memory, MiB",
    "train_seconds": "training, s",
    "seconds": "in all, s",
    "embedding_seconds": "embedding, once, s",
}
ENSEMBLE = "ensemble/"
"""Prefix of metrics, such as `ensemble/auroc`, of the mean probabilities of a row's runs on held_out."""
ONCE = ("embedding_seconds",)
"""Facts that are summed over a row's runs rather than averaged: the first run pays, the others find the result cached."""
BYTES_A_PARAMETER = 4


@dataclass(frozen=True)
class Statistic:
    """Statistics of one metric over the n runs of a row, or over its n folds, where each fold is the mean of its runs.

    Attributes:
        mean: mean of the n values.
        sd: sample standard deviation; None for one value.
        low, high: 95 % interval of the mean by Student's t with n - 1 degrees of freedom; None for one value. Over seeds, the
            interval measures how much training varies, but not how much the subjects would vary if they were sampled again.
            Over folds it is too narrow, since the folds share training subjects (Bengio and Grandvalet 2004).
    """

    mean: float
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Group:
    """One row of the table: runs that repeat each other.

    Attributes:
        keys: configuration keys and values that distinguish the row from others.
        runs: folders of the runs.
        statistics: metric -> statistics; a metric that no run of the row has is missing.
    """

    keys: dict[str, str]
    runs: list[Path]
    statistics: dict[str, Statistic]


@dataclass(frozen=True)
class Tabulated:
    """The table: its rows, the metrics in their order, and the notes that are printed below it."""

    groups: list[Group]
    metrics: list[str]
    notes: list[str]


def statistic(values: Sequence[float]) -> Statistic:
    """Return mean, SD and 95 % interval of one or more values.

    >>> found = statistic([0.7, 0.8, 0.9])
    >>> round(found.mean, 3), round(found.sd, 3), round(found.low, 3), round(found.high, 3)
    (0.8, 0.1, 0.552, 1.048)
    >>> statistic([0.7])
    Statistic(mean=0.7, sd=None, low=None, high=None)
    """
    mean, n = fmean(values), len(values)
    if n == 1:
        return Statistic(mean, None, None, None)
    sd = stdev(values)
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return Statistic(mean, sd, mean - half, mean + half)


def tabulate(paths: Sequence[Path], *, metrics: Sequence[str] = (), by: Sequence[str] = ()) -> Tabulated:
    """Group the runs under `paths` into rows, and compute the statistics of each row.

    Args:
        paths: folders of runs or of sweeps.
        metrics: `<split>/<metric>`, a fact of training such as events_per_s, any number of metrics.json by its path, or
            `ensemble/<metric>`; empty = the monitored metrics, and those of `SHOWN` that the runs have.
        by: keys whose values make the rows: configuration keys, overridden groups, or `folder`; empty = every key in which the
            runs differ, except the keys of repetitions (`REPEATS`).

    Raises:
        UserError: no run has results, a metric or key is unknown, the runs of a row predict for different subjects or labels,
            or only some runs of a row have a metric.
    """
    origin = {run: path for path in paths for run in find_runs([path])}
    runs = [run for run in origin if (run / FINISHED).exists()]
    notes = []
    if left_out := [str(run) for run in origin if run not in runs]:
        notes.append(f"{len(left_out)} runs have no metrics.json and are left out: {', '.join(left_out)}")
    if not runs:
        raise UserError(
            f"none of {len(origin)} runs has a metrics.json: all failed or were stopped. See their log.txt."
        )
    grouped: dict[tuple[tuple[str, str], ...], list[Path]] = {}
    for run, keys in zip(runs, _keys(runs, origin, by), strict=True):
        grouped.setdefault(tuple(keys.items()), []).append(run)
    found = {run: read_metrics(run) for run in runs}
    values = {run: numbers_of(row) for run, row in found.items()}
    monitored = dict.fromkeys(f"held_out/{row['monitor']['name']}" for row in found.values() if "monitor" in row)
    shown = [*(name for name in monitored if name not in SHOWN), *SHOWN]
    chosen = list(metrics) or [name for name in shown if any(name in row for row in values.values())]
    known = {key for row in values.values() for key in row} | {ENSEMBLE + name for name in (*METRICS, *NUMBER_METRICS)}
    for name in chosen:
        if name not in known:
            raise unknown_name("metric", name, sorted(known))
    if alone := [str(run) for run in runs if found[run].get("held_out", {}).get("n_subjects") == 1]:
        notes.append(
            f"held_out of {len(alone)} runs is a single subject, which says nothing about other subjects: {', '.join(alone)}"
        )
    folds = [_folds(members) for members in grouped.values()]
    notes += _check_samples(folds)
    groups = [
        Group(dict(keys), members, _statistics(row, values, chosen))
        for (keys, members), row in zip(grouped.items(), folds, strict=True)
    ]
    return Tabulated(groups, chosen, notes)


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return every number of `metrics.json` by name: metrics per split, facts of training, and two derived facts.

    `ms_per_step` is training time per optimizer step in ms, `model_mib` the size of all parameters in float32 in MiB.

    >>> numbers_of({"held_out": {"auroc": {"value": 0.8}, "n": 9}, "train": {"seconds": 2.0, "steps": 100}})
    {'held_out/auroc': 0.8, 'train_seconds': 2.0, 'steps': 100, 'ms_per_step': 20.0, 'held_out/n': 9}
    """
    found = flat_metrics(metrics)
    if found.get("steps"):
        found["ms_per_step"] = 1000 * found["train_seconds"] / found["steps"]
    if "n_parameters" in found:
        found["model_mib"] = found["n_parameters"] * BYTES_A_PARAMETER / 2**20
    for part, entries in metrics.items():
        if part not in ("train", "monitor") and isinstance(entries, Mapping):
            found |= {f"{part}/{name}": entry for name, entry in entries.items() if isinstance(entry, int | float)}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _keys(runs: Sequence[Path], origin: Mapping[Path, Path], by: Sequence[str]) -> list[dict[str, str]]:
    """Return, per run, the keys and values that determine its row."""
    configs = [read_config(run) for run in runs]
    overrides = [split_overrides(outcome.overrides if (outcome := read_outcome(run)) else []) for run in runs]
    # An override such as model=decoder is one word where the resolved configurations differ in many keys.
    varying = differences(overrides if all(overrides) else configs)
    if not by:
        keys = dict.fromkeys(key for row in varying for key in row)
        by = [key for key in keys if key not in REPEATS]
    known = [
        config | chosen | {FOLDER: str(origin[run])}
        for run, config, chosen in zip(runs, configs, overrides, strict=True)
    ]
    for key in by:
        if not any(key in row for row in known):
            raise unknown_name("--by", key, [FOLDER, *dict.fromkeys(key for row in varying for key in row)])
    return [{key: str(row.get(key, "")) for key in by} for row in known]


def _statistics(
    folds: Mapping[str, Sequence[Path]], values: Mapping[Path, Mapping[str, float]], metrics: Sequence[str]
) -> dict[str, Statistic]:
    found, runs = {}, [run for members in folds.values() for run in members]
    if asked := [name for name in metrics if name.startswith(ENSEMBLE)]:
        together = [ensemble(members, "held_out") for members in folds.values()]
        found = {name: statistic([fold[name.removeprefix(ENSEMBLE)] for fold in together]) for name in asked}
    for name in metrics:
        missing = [run for run in runs if name not in values[run]]
        if missing and len(missing) < len(runs):
            raise UserError(
                f"{missing[0]} has no {name}, but other runs of its row have: a mean over some runs would mislead. Run it "
                "again, leave it out, or leave the metric out."
            )
        if not missing:
            by_fold = [[values[run][name] for run in members] for members in folds.values()]
            column = [fmean(fold) for fold in by_fold] if len(by_fold) > 1 else by_fold[0]
            found[name] = Statistic(sum(map(sum, by_fold)), None, None, None) if name in ONCE else statistic(column)
    return found


def _folds(runs: Sequence[Path]) -> dict[str, list[Path]]:
    """Return runs grouped by their fold; without a cross-validation all runs are one fold."""
    folds: dict[str, list[Path]] = {}
    for run in runs:
        folds.setdefault(str(read_config(run).get(FOLD)), []).append(run)
    return folds


def _check_samples(rows: Sequence[Mapping[str, Sequence[Path]]]) -> list[str]:
    """Return a note if the rows predict for different subjects or labels.

    Args:
        rows: fold -> runs, per row.

    Raises:
        UserError: runs of the same row and fold predict for different subjects, times or labels.
    """
    seen = []
    for folds in rows:
        digests = {}
        for fold, members in folds.items():
            first, expected = members[0], samples_digest(members[0])
            for run in members[1:]:
                if samples_digest(run) != expected:
                    raise UserError(
                        f"{first} and {run} stand in one row but predict for different subjects, times or labels, so their "
                        f"mean means nothing. Give the key in which they differ with --by, or --by {FOLDER}"
                    )
            digests[fold] = expected
        seen.append(digests)
    if any(samples != seen[0] for samples in seen):
        return ["rows are about different subjects or labels: differences between rows are not due to the models alone"]
    return []


def samples_digest(run: Path, split: str = "held_out") -> str:
    """Return a digest of the subjects, times and labels of a run's split; the number of samples where there are no
    class probabilities to read them from."""
    # A damaged file is an error here. Without a file, or with predictions of another kind, the number of samples must do.
    checked(path := predictions_file(run, split))
    try:
        predictions = read_predictions(path)
    except (UserError, OSError):
        return str(read_metrics(run).get(split, {}).get("n"))
    return digest([*map(str, predictions.keys.rows()), predictions.labels.tolist()])


def table_frame(tabulated: Tabulated) -> pd.DataFrame:
    """Return one row per group: keys, n_runs, each metric with /sd, /low and /high, how the runs were made, their folders."""
    rows = []
    for group in tabulated.groups:
        row: dict[str, Any] = {**group.keys, "n_runs": len(group.runs)}
        for name, found in group.statistics.items():
            row[name] = found.mean
            ends = {"sd": found.sd, "low": found.low, "high": found.high}
            row |= {f"{name}/{end}": value for end, value in ends.items() if value is not None}
        rows.append(row | provenance_of(group.runs) | {"runs": " ".join(map(str, group.runs))})
    return pd.DataFrame(rows)


def cells(tabulated: Tabulated) -> tuple[list[str], list[list[str]]]:
    """Return the titles and the rows of the printed table: keys, number of runs, and each metric as text."""
    keys = list(tabulated.groups[0].keys)
    titles = [*keys, "runs", *(TITLES.get(name, name) for name in tabulated.metrics)]
    rows = [
        [*group.keys.values(), str(len(group.runs))]
        + [cell(name, group.statistics.get(name)) for name in tabulated.metrics]
        for group in tabulated.groups
    ]
    return titles, rows


def cell(name: str, found: Statistic | None) -> str:
    """Return a metric as mean ± SD [interval], and a fact as mean ± SD, without SD and interval if all runs agree.

    >>> cell("held_out/auroc", statistic([0.7, 0.8, 0.9])), cell("held_out/auroc", statistic([0.7]))
    ('0.800 ± 0.100 [0.552, 1.048]', '0.700')
    >>> cell("n_parameters", statistic([1200, 1200])), cell("ms_per_step", statistic([12.0, 14.0])), cell("seconds", None)
    ('1,200', '13.0 ± 1.4', '')
    """
    if found is None:
        return ""
    is_metric, size = "/" in name, abs(found.mean)
    # Three significant digits for large numbers; three decimals for a small metric such as an AUROC.
    decimals = 0 if size >= 100 else 1 if size >= 10 else 3 if is_metric else 2
    text = f"{found.mean:,.{decimals}f}"
    if not found.sd:
        return text
    text += f" ± {found.sd:,.{decimals}f}"
    return f"{text} [{found.low:,.{decimals}f}, {found.high:,.{decimals}f}]" if is_metric else text


def markdown(tabulated: Tabulated) -> str:
    """Return the table as Markdown, with the notes below it."""
    titles, rows = cells(tabulated)
    n_keys = len(tabulated.groups[0].keys)
    rule = ["---"] * n_keys + ["---:"] * (len(titles) - n_keys)
    lines = [f"| {' | '.join(line)} |" for line in (titles, rule, *rows)]
    return "\n".join([*lines, *(f"\n{note}" for note in tabulated.notes)]) + "\n"


def write_table(tabulated: Tabulated, stem: Path) -> None:
    """Write all numbers to STEM.csv and the printed table to STEM.md."""
    with atomic_path(stem.parent / f"{stem.name}.csv") as path:
        table_frame(tabulated).to_csv(path, index=False)
    with atomic_path(stem.parent / f"{stem.name}.md") as path:
        path.write_text(markdown(tabulated), encoding="utf-8")


def print_table(tabulated: Tabulated) -> None:
    """Print the table and its notes; a table with more metrics than rows is transposed so that it fits the terminal."""
    titles, rows = cells(tabulated)
    shown = Table(title="mean ± SD [95 % interval of the mean] over runs", title_justify="left")
    n_keys = len(tabulated.groups[0].keys)
    if len(tabulated.metrics) > len(rows):
        names = [" ".join(row[:n_keys]) for row in rows]
        columns = [titles[n_keys:], *(row[n_keys:] for row in rows)]
        titles, n_keys = [" ".join(titles[:n_keys]), *names], 1
        rows = [list(row) for row in zip(*columns, strict=True)]
    for number, title in enumerate(titles):
        shown.add_column(title, justify="left" if number < n_keys else "right")
    for row in rows:
        shown.add_row(*row)
    console = wide_console()
    console.print(shown)
    for note in tabulated.notes:
        console.print(note, highlight=False)
