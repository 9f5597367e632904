"""Write report.html of a run: one file that opens anywhere, made from what the run's folder holds already.

Nothing is drawn or computed again, so that a report costs a few hundredths of a second. Like the model card, it holds counts and
metrics of groups but no single subject and no path, so that it can be shared.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ehr_embed import __version__
from ehr_embed.config.differences import differences_from_options
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path, read_json
from ehr_embed.core.secrets import without_private
from ehr_embed.evaluation.metric import title_of
from ehr_embed.evaluation.metric_entries import intervals_missing, values_of, with_interval
from ehr_embed.reports.page import from_markdown, picture, render, sections, shown, table_in
from ehr_embed.run_folder.finish import read_config, read_metrics
from ehr_embed.run_folder.layout import (
    AUDIT,
    ENVIRONMENT,
    EXPLAINED,
    FINISHED,
    MODEL_CARD,
    MOVED,
    MOVED_TEXTS,
    PLOTS,
    REPORT,
    SUMMARY,
)
from ehr_embed.sources.protocol import EVALUATED

FIRST = ("roc", "precision_recall", "loss")
"""The plots that stand first, in this order; those of a task follow."""
WIDE = ("loss",)
IN_SECTIONS_OF_THEIR_OWN = ("Metrics", "Calibration", "Subgroups of held_out", "Decision curve")
"""Sections of the model card that the report shows in another way."""
N_TEXTS = 20
WITH_SUBJECTS = ("subject_ids", "groups")
"""Details of findings of the audit that name subjects, as their messages do after `such as`."""
INTERVAL = re.compile(r"(-?\d+\.\d+) \[(-?\d+\.\d+), (-?\d+\.\d+)\]")
COVERAGE_COLOURS = ("c0", "c1", "c2", "c3")


def write_report(run_dir: Path) -> Path:
    """Write report.html of a finished run, from its folder alone, and return its path.

    Raises:
        UserError: the folder holds no finished run, or a damaged one.
    """
    if not (run_dir / FINISHED).is_file():
        raise UserError(
            f"{run_dir}: no finished run here (no {FINISHED}), and no search (no study.json), of which a report could tell. "
            "Type: run=RUN_DIR or run=SWEEP_DIR"
        )
    config, summary = read_config(run_dir), run_dir / SUMMARY
    tags = read_json(summary).get("tags", []) if summary.is_file() else []
    page = report_of(run_dir, config=config or {}, metrics=read_metrics(run_dir), choices=[str(tag) for tag in tags])
    return save(page, run_dir / REPORT)


def save(page: str, path: Path) -> Path:
    """Write a page and return its path."""
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def report_of(
    run_dir: Path,
    *,
    config: dict[str, Any],
    metrics: dict[str, Any],
    choices: Sequence[str],
    has_codes: bool = True,
    has_environment: bool = True,
) -> str:
    """Return the report of a run as HTML.

    Args:
        run_dir: the run's folder, after the plots and the model card were written.
        config: the resolved configuration.
        metrics: content of metrics.json.
        choices: the options of the config groups as `group=option`.
        has_codes: whether to show the parts that quote codes or texts of the data: subgroups, findings of the audit, and moved
            predictions.
        has_environment: whether to show the versions of packages and the hardware.
    """
    card_file = run_dir / MODEL_CARD
    card = sections(card_file.read_text(encoding="utf-8")) if card_file.is_file() else {}
    pictures = _pictures(run_dir / PLOTS)
    calibration = [entry for entry in pictures if entry[0].startswith("calibration")]
    values = {
        "metrics": _metric_rows(metrics),
        "facts": _facts(metrics),
        "intervals_told": " ".join(["95 % bootstrap intervals over subjects.", *intervals_missing(metrics)]),
        "curves": [entry for entry in pictures if entry not in calibration],
        "calibration": calibration,
        "calibrated": from_markdown(_without_pictures(card.get("Calibration", ""))),
        "subgroups": _subgroups(card) if has_codes else None,
        "moved": _moved(run_dir / EXPLAINED) if has_codes else None,
        "card": [
            (heading.split()[0].lower(), heading, from_markdown(_without_pictures(text)))
            for heading, text in card.items()
            if heading not in IN_SECTIONS_OF_THEIR_OWN
        ],
        "coverage": _coverage(card.get("Texts", "")),
        "audit": _audit(run_dir / AUDIT, has_codes=has_codes),
    }
    return render(
        "run.html.jinja",
        title=_title(config, run_dir),
        about=_about(config),
        tiles=_tiles(metrics),
        contents=_contents(values),
        choices=choices,
        differences=_differences(config, choices),
        environment=_environment(run_dir / ENVIRONMENT) if has_environment else [],
        version=__version__,
        **values,
    )


def _title(config: dict[str, Any], run_dir: Path) -> str:
    """Return what a run is about, its labels or its task, and its folder's name, which alone is often a time of day.

    >>> _title({"task": {"labels": "death_5y"}}, Path("runs/first")), _title({}, Path("13-17-17"))
    ('death_5y (first)', '13-17-17')
    """
    task = config.get("task") or {}
    labels = without_private(task.get("labels"))
    named = [labels] if isinstance(labels, str) else labels or []
    what = ", ".join(Path(str(name)).stem for name in named) or str(task.get("_target_", "")).rpartition(".")[2]
    name = run_dir.resolve().name
    return f"{what} ({name})" if what else name


def _about(config: dict[str, Any]) -> str:
    def kind(group: str) -> str:
        return str((config.get(group) or {}).get("_target_", "")).rpartition(".")[2]

    labels = without_private((config.get("task") or {}).get("labels"))
    told = [kind("task") + (f" of {labels}" if labels else ""), kind("model"), kind("embedder")]
    return " · ".join([part for part in told if part] + [f"seed {config.get('seed')}"])


def _tiles(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    held_out, train = metrics.get("held_out", {}), metrics.get("train", {})
    values = values_of(held_out)
    first = dict.fromkeys(name for name in (metrics.get("monitor", {}).get("name"), "auroc", "auprc") if name in values)
    tiles = []
    for name in list(first or values)[:2]:
        value, _, interval = with_interval(held_out[name]).partition(" ")
        tiles.append((f"{title_of(name)}, held out", value, interval))
    tiles.append(("samples, held out", shown(held_out.get("n")), f"{shown(held_out.get('n_subjects'))} subjects"))
    if "prevalence" in held_out:
        tiles.append(("prevalence", f"{held_out['prevalence']:.3f}", "held out"))
    if "n_parameters" in train:
        note = f"best epoch {train['best_epoch']} of {train['epochs']}" if "best_epoch" in train else ""
        tiles.append(("parameters", shown(train["n_parameters"]), note))
    if "total_seconds" in train:
        speed = f"{train['events_per_s']:,.0f} events/s" if "events_per_s" in train else ""
        tiles.append(("time in all", f"{train['total_seconds']:.0f} s", speed))
    return tiles


def _metric_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per metric: name, the entry of each split with its text, and the ends of the axis of its bars."""
    rows = []
    for name in values_of(metrics["held_out"]):
        entries = {split: metrics.get(split, {}).get(name) for split in EVALUATED}
        numbers = [
            entry[end]
            for entry in entries.values()
            if entry
            for end in ("value", "low", "high")
            if entry.get(end) is not None
        ]
        # A share has the axis of a share; anything else has its own.
        is_share = bool(numbers) and min(numbers) >= 0 and max(numbers) <= 1
        low, high = (0.0, 1.0) if is_share else (min(numbers, default=0.0), max(numbers, default=0.0))
        room = 0.0 if is_share else 0.05 * (high - low)
        row: dict[str, Any] = {"name": title_of(name), "low": low - room, "high": high + room}
        for split, entry in entries.items():
            row[split] = entry and {"low": None, "high": None} | entry | {
                "text": with_interval({"low": None, "high": None} | entry)
            }
        rows.append(row)
    return rows


def _facts(metrics: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return further numbers per split: those without an interval, of baselines, and the best that is possible."""
    splits = [metrics.get(split, {}) for split in reversed(EVALUATED)]
    names = [
        name for name, value in splits[0].items() if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    rows = [(title_of(name), *(split.get(name) for split in splits)) for name in names]
    for baseline, found in splits[0].get("baselines", {}).items():
        rows += [
            (f"{title_of(name)}, {baseline}", *(split["baselines"][baseline].get(name) for split in splits))
            for name in found
        ]
    for name in ("auroc", "concordance"):
        if best := metrics.get(f"bayes_{name}"):
            rows.append((f"best possible {title_of(name)}", *(best.get(split) for split in reversed(EVALUATED))))
    for name, of in metrics.get("transfer", {}).items():
        rows.append((f"{title_of(name)} kept of where it was trained", of["kept"], None))
    return rows


def _pictures(folder: Path) -> list[tuple[str, str, bool]]:
    """Return (name, address, whether it is wide) of each plot."""
    if not folder.is_dir():
        return []
    names = sorted(path.stem for path in folder.glob("*.png"))
    order = [*(name for name in FIRST if name in names), *(name for name in names if name not in FIRST)]
    found = [(name, picture(folder / f"{name}.png")) for name in order]
    return [
        (name.replace("_", " ").replace("roc", "ROC"), address, name in WIDE)
        for name, address in found
        if address is not None
    ]


def _without_pictures(text: str) -> str:
    """Return the text of a card without its pictures, which the report shows at their own places."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("![")).strip()


def _subgroups(card: dict[str, str]) -> dict[str, Any] | None:
    head, rows, rest = table_in(card.get("Subgroups of held_out", ""))
    if not rows:
        return None
    column = head.index("AUROC") if "AUROC" in head else len(head) - 1
    told = []
    for row in rows:
        found = INTERVAL.fullmatch(row[column])
        entry = dict(zip(("value", "low", "high"), map(float, found.groups()), strict=True)) if found else None
        told.append({"cells": row, "entry": entry})
    return {"head": head, "rows": told, "drawn": "", "low": 0.0, "high": 1.0, "rest": from_markdown(rest)}


def _coverage(text: str) -> list[tuple[str, list[tuple[str, float, str]]]]:
    """Return, for codes and for events, the share whose text has each origin."""
    head, rows, _ = table_in(text)
    found = []
    for column, what in enumerate(head[1:], start=1):
        shares = [
            (f"{row[0]} {row[column]}", float(share[1]) / 100, colour)
            for row, colour in zip(rows, COVERAGE_COLOURS, strict=False)
            if (share := re.fullmatch(r"(\d+\.\d+) %", row[column]))
        ]
        found.append((f"Origin of the texts of {what}", shares))
    return found


def _moved(folder: Path) -> dict[str, Any] | None:
    """Return the plot and the texts that moved predictions most, if `ehr-embed explain` wrote a summary; a summary names no
    single subject."""
    table = folder / MOVED_TEXTS
    if not table.is_file():
        return None
    with table.open(encoding="utf-8", newline="") as file:
        rows = [row for row, _ in zip(csv.DictReader(file), range(N_TEXTS), strict=False)]
    if not rows:
        return None
    address = picture(folder / MOVED)
    return {
        "pictures": [("texts that raise (orange) and lower (blue) the log-odds", address, True)] if address else [],
        "head": [name.replace("_", " ") for name in rows[0]],
        "rows": [[_number(value) for value in row.values()] for row in rows],
    }


def _number(text: str | None) -> Any:
    for kind in (int, float):
        try:
            return kind(text)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            continue
    return text


def _audit(path: Path, *, has_codes: bool) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = read_json(path)
    told = []
    for finding in found.get("findings", []):
        message = str(finding["message"]) if has_codes else "see audit.json"
        if set(WITH_SUBJECTS) & set(finding.get("details", {})):
            message = message.partition(", such as")[0] + " (audit.json names them)"
        told.append((finding["level"], finding["check"], message))
    return {"findings": told, "not_checked": found.get("not_checked", [])}


def _differences(config: dict[str, Any], choices: Sequence[str]) -> list[tuple[str, str, str]] | None:
    found = differences_from_options(config, choices)
    if found is None:
        return None
    return [(key, _value(key, here), _value(key, usual)) for key, here, usual in found]


def _value(key: str, value: Any) -> str:
    return "null" if value is None else shown(without_private({key: value})[key])


def _environment(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        return []
    found = read_json(path)
    rows = [(name, shown(value)) for name, value in found.items() if not isinstance(value, dict | list)]
    rows += [("GPUs", ", ".join(map(str, found["gpus"])))] if found.get("gpus") else []
    return rows + [(name, str(version)) for name, version in found.get("packages", {}).items()]


def _contents(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the sections that the page has, in its order."""
    possible = [
        ("metrics", "Metrics", True),
        ("curves", "Curves", values["curves"]),
        ("calibration", "Calibration", values["calibration"] or values["calibrated"]),
        ("subgroups", "Subgroups", values["subgroups"]),
        ("moved", "What moved predictions", values["moved"]),
        *((id, heading, id not in ("limits", "model")) for id, heading, _ in values["card"]),
        ("audit", "Audit", True),
        ("limits", "Limits", any(id == "limits" for id, *_ in values["card"])),
        ("configuration", "Configuration", True),
    ]
    return [(id, heading) for id, heading, is_there in possible if is_there]
