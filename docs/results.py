"""Write the leaderboard of docs/results.md from the tables in docs/results/: `python docs/results.py`.

A table there is what `ehr-embed tabulate RUNS --output docs/results/NAME` writes; the CSV suffices to add it. Give it a heading,
and say what it is about, in docs/results/titles.yaml; without an entry there its name is the heading. What runs did not record of
themselves stands there as well, under `afterwards`, and is marked on the page.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE, TABLES = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
MARKED = re.compile(r"(<!-- leaderboard -->\n).*?(<!-- end -->)", flags=re.DOTALL)
METRICS = ("auroc", "auprc", "concordance", "integrated_brier", "squared_error", "explained")
SPLITS = ("held_out/", "ensemble/")
FACTS = ("seconds", "train_seconds", "events_per_s", "n_parameters")
PROVENANCE = ("command", "commit", "hardware", "date")
NOT_KEYS = ("n_runs", "runs", "folder", *PROVENANCE)
MARK = "†"
"""Stands behind what a run did not record of itself."""


def cell(row: dict[str, str], name: str) -> str:
    """Return a metric as mean, SD over runs, and interval.

    >>> cell({"a": "0.8812", "a/sd": "0.0008", "a/low": "0.879", "a/high": "0.883"}, "a"), cell({"a": ""}, "a")
    ('0.881 ± 0.001 [0.879, 0.883]', '')
    """
    if not row.get(name):
        return ""
    told = f"{float(row[name]):.3f}"
    if row.get(f"{name}/sd"):
        told += f" ± {float(row[f'{name}/sd']):.3f}"
    if row.get(f"{name}/low") and row.get(f"{name}/high"):
        told += f" [{float(row[f'{name}/low']):.3f}, {float(row[f'{name}/high']):.3f}]"
    return told


def marked(row: dict[str, str], afterwards: dict[str, str]) -> dict[str, str]:
    """Return a row whose empty cells hold what was found out afterwards, and in which that is marked wherever it stands.

    A row that recorded another commit recorded the rest as well.

    >>> later = {"commit": "abc", "date": "2026-11-26", "basis": "files"}
    >>> marked({"commit": "", "date": "2026-11-27"}, later), marked({"commit": "abc", "date": ""}, later)
    ({'commit': 'abc †', 'date': '2026-11-27'}, {'commit': 'abc †', 'date': '2026-11-26 †'})
    >>> marked({"commit": "def", "date": "2026-11-26"}, later)
    {'commit': 'def', 'date': '2026-11-26'}
    """
    if row.get("commit") not in ("", None, afterwards.get("commit")):
        return row
    found = {name: row[name] or str(afterwards.get(name, "")) for name in row}
    return {
        name: f"{value} {MARK}" if value and value == str(afterwards.get(name)) else value
        for name, value in found.items()
    }


def table(path: Path, entry: dict[str, Any]) -> str:
    """Return one table of results as Markdown, with its provenance row by row."""
    afterwards = entry.get("afterwards", {})
    with path.open(encoding="utf-8", newline="") as file:
        rows = [marked(row, afterwards) for row in csv.DictReader(file)]
    names = list(rows[0])
    keys = [
        name for name in names if name not in (*NOT_KEYS, *FACTS) and "/" not in name and any(row[name] for row in rows)
    ]
    metrics = [
        name for name in names if name.count("/") == 1 and name.startswith(SPLITS) and name.split("/")[1] in METRICS
    ]
    if any("seconds" in row and row["seconds"] for row in rows):
        metrics.append("seconds")
    told = [name for name in PROVENANCE if name in names and any(row[name] for row in rows)]
    head = [
        *(f"`{key.removesuffix('._target_')}`" for key in keys),
        "runs",
        *(name.replace("held_out/", "").replace("/", " ") for name in metrics),
        *told,
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        values = [
            *(row[name].rpartition(".")[2] if row[name].startswith("ehr_embed.") else row[name] for name in keys),
            row["n_runs"],
            *(f"{float(row[name]):.0f}" if name == "seconds" and row[name] else cell(row, name) for name in metrics),
            *(f"`{row[name]}`" if name == "command" and row[name] else row[name] for name in told),
        ]
        lines.append(f"| {' | '.join(value.replace('|', chr(92) + '|') for value in values)} |")
    about = f"{entry['about']}\n\n" if entry.get("about") else ""
    told_later = any(value.endswith(f" {MARK}") for row in rows for value in row.values())
    note = f"\n{MARK} The runs did not record this. {afterwards['basis']}\n" if told_later else ""
    return f"### {entry.get('title', path.stem.replace('_', ' '))}\n\n{about}" + "\n".join(lines) + f"\n{note}"


def leaderboard() -> str:
    """Return all tables, in the order of titles.yaml, then those without an entry there."""
    titles: dict[str, dict[str, Any]] = yaml.safe_load((TABLES / "titles.yaml").read_text(encoding="utf-8"))
    paths = {path.stem: path for path in sorted(TABLES.glob("*.csv"))}
    order = [name for name in titles if name in paths] + [name for name in paths if name not in titles]
    return "\n".join(table(paths[name], titles.get(name, {})) for name in order)


def expanded(page: str) -> str:
    """Return the page with the leaderboard written anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{leaderboard()}\n{found[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(expanded(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote the leaderboard of {PAGE.relative_to(ROOT)}")
