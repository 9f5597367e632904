"""Read the results of runs as rows that can be compared: overrides, metrics with intervals, speed and size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.outcome import OUTCOME, Outcome, Row, message_of, objective_columns, read_outcome, split_overrides
from ehr_embed.run_folder import finish
from ehr_embed.run_folder.finish import read_metrics
from ehr_embed.run_folder.layout import FINISHED

FACTS = {"total_seconds": "seconds", "seconds": "train_seconds"} | {
    name: name
    for name in (
        "events_per_s",
        "steps",
        "peak_memory_mib",
        "n_parameters",
        "n_trained",
        "embedding_seconds",
        "best_epoch",
        "epochs",
    )
}
"""Facts of training: name in `metrics.json` -> name of the column."""
LOWER_IN_OLD_RUNS = ("loss", "perplexity", "time_loss", "value_loss", "brier", "ece")
"""Metrics for which lower is better, for runs of versions whose metrics.json does not store the direction."""
NOT_COMPARED = ("run_dir", "cache_dir", "hydra", "defaults", "tracker")


def read_results(folder: Path) -> Row:
    """Return the results of one run as a row; empty if the run has no `metrics.json`."""
    return flat_metrics(read_metrics(folder)) if (folder / FINISHED).exists() else {}


def flat_metrics(metrics: Mapping[str, Any]) -> Row:
    """Return the metrics of held_out and tuning with their intervals, and the facts of training, as one row.

    >>> flat_metrics({"tuning": {"auroc": {"value": 0.8, "low": 0.7, "high": 0.9}, "n": 9}, "train": {"epochs": 3}})
    {'tuning/auroc': 0.8, 'tuning/auroc/low': 0.7, 'tuning/auroc/high': 0.9, 'epochs': 3}
    """
    row: Row = {}
    for split in ("held_out", "tuning"):
        for name, entry in metrics.get(split, {}).items():
            if isinstance(entry, Mapping) and "value" in entry:
                row[f"{split}/{name}"] = entry["value"]
                row |= {f"{split}/{name}/{end}": entry[end] for end in ("low", "high") if entry.get(end) is not None}
    train = metrics.get("train", {})
    return row | {shown: train[name] for name, shown in FACTS.items() if name in train}


def with_results(outcome: Outcome, folder: Path, objectives: Sequence[str], n_objectives: int) -> Outcome:
    """Add the job's metrics to its outcome, and take the values of the named `objectives` from them.

    The outcome becomes a failure if an objective is missing or the number of values differs from `n_objectives`.
    """
    if outcome.state == "failed":
        return outcome
    try:
        outcome.results = read_results(folder)
        if outcome.state == "finished" and objectives:
            metrics = read_metrics(folder)
            outcome.values = [objective_of(metrics, name) for name in objectives]
    except (UserError, OSError) as error:
        return Outcome("failed", error=message_of(error), seconds=outcome.seconds, overrides=outcome.overrides)
    n_values = len(outcome.values or [])
    if outcome.state == "finished" and n_values != n_objectives:
        outcome.state = "failed"
        outcome.error = f"the job yields {n_values} values, but the study has {n_objectives} directions"
    return outcome


def objective_of(metrics: dict[str, Any], name: str) -> float:
    """Return a number of `metrics.json` by its dotted name; the name of a metric means the metric's value.

    Raises:
        UserError: metrics.json has no number of this name.

    >>> objective_of({"tuning": {"auroc": {"value": 0.8, "low": 0.7, "high": 0.9}}}, "tuning.auroc")
    0.8
    """
    node: Any = metrics
    for part in name.split("."):
        if not isinstance(node, dict) or part not in node:
            valid = node if isinstance(node, dict) else []
            raise unknown_name(f"part of hydra.sweeper.objectives={name}:", part, valid)
        node = node[part]
    value = node["value"] if isinstance(node, dict) and "value" in node else node
    if not isinstance(value, int | float):
        raise UserError(f"hydra.sweeper.objectives={name}: expected the name of a number in metrics.json.")
    return float(value)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the run folders among `paths` and below them, in the order of their numbers.

    Raises:
        UserError: a path is not a folder, or no run has ended in it or below it.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: expected the folder of a run or of a sweep, found no such folder.")
        folders = {file.parent for name in (FINISHED, OUTCOME) for file in path.rglob(name)}
        if not folders:
            raise UserError(f"{path}: no {FINISHED} and no {OUTCOME} in it or below, so no run has ended here.")
        # A run's folder may contain the run of an earlier stage, such as pretraining, which is not compared with it.
        folders = {folder for folder in folders if not folders.intersection(folder.parents)}
        found += sorted(folders, key=_by_number)
    return list(dict.fromkeys(found))


def _by_number(path: Path) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in path.parts]


def read_rows(folders: Sequence[Path], relative_to: Path | None = None) -> tuple[list[Row], str]:
    """Return one row per run, and the direction of their objective.

    The overrides in a row are those of the multirun's job. Where no run has any, the configuration keys in which the runs
    differ take their place.
    """
    rows: list[Row] = []
    higher_is_better: set[bool] = set()
    overrides: list[dict[str, str]] = []
    configs = [read_config(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        outcome, results = read_outcome(folder), read_results(folder)
        monitor = str(config.get("task.monitor"))
        if results:
            told = read_metrics(folder).get("monitor", {"is_higher_better": monitor not in LOWER_IN_OLD_RUNS})
            higher_is_better.add(told["is_higher_better"])
        state = outcome.state if outcome else "finished" if results else "unknown"
        values: Sequence[float | None] = (outcome.values if outcome else None) or [results.get(f"tuning/{monitor}")]
        row: Row = {"run": str(folder.relative_to(relative_to) if relative_to else folder), "state": state}
        row |= objective_columns(values)
        rows.append(row | {"results": results, "error": outcome.error if outcome else None})
        overrides.append(split_overrides(outcome.overrides if outcome else []))
    varying = overrides if any(overrides) else differences(configs)
    rows = [
        {key: value for key, value in row.items() if key not in ("results", "error")}
        | chosen
        | row["results"]
        | {"error": row["error"]}
        for row, chosen in zip(rows, varying, strict=True)
    ]
    return rows, "minimize" if higher_is_better == {False} else "maximize"


def read_config(folder: Path) -> dict[str, Any]:
    """Return a run's resolved configuration by dotted key; empty if the folder holds no config.yaml."""
    return dict(_flat(finish.read_config(folder) or {}))


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return, per configuration, the values of the keys that are not the same in all configurations.

    >>> differences([{"seed": 0, "a": 1}, {"seed": 1, "a": 1}])
    [{'seed': '0'}, {'seed': '1'}]
    """
    keys = [key for key in dict.fromkeys(k for c in configs for k in c) if not key.startswith(NOT_COMPARED)]
    varying = [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]
    return [{key: str(config[key]) for key in varying if key in config} for config in configs]
