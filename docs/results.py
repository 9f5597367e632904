"""Write the tables of docs/results.md and docs/hospitals.md from those in docs/results/: `python docs/results.py`.

A table there is what `ehr-embed tabulate RUNS --output docs/results/NAME` writes; the CSV suffices to add it. Give it a heading,
and say what it is about, in docs/results/titles.yaml; without an entry there its name is the heading. What runs did not record of
themselves stands there as well, under `afterwards`, and is marked on the page. What others have published on the same splits stands
there under `published` and becomes the last rows of the table. Below a table stand the paired differences that
`python -m benchmarks.folds table SWEEPS --output docs/results/paired/NAME.csv` wrote, if there are any. The files in
docs/results/hospitals are those of `benchmarks.hospitals`, `benchmarks.renamed_codes` and `benchmarks.hidden_codes`, of which
`benchmarks.hospital_tables` makes the tables.
"""

from __future__ import annotations

import csv
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import hospital_tables  # noqa: E402

HOSPITALS_PAGE, HOSPITALS = ROOT / "docs" / "hospitals.md", ROOT / "docs" / "results" / "hospitals"
HOSPITALS_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
DATASETS = {"physionet2012": "PhysioNet 2012", "eicu_demo_a": "eICU"}
"""Names that the pages give to the datasets of the rows."""
PAGE, TABLES = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
MARKED = re.compile(r"(<!-- leaderboard -->\n).*?(<!-- end -->)", flags=re.DOTALL)
TASK_LABELS = re.compile(r"task\.labels=\S+")
METRICS = ("auroc", "auprc", "concordance", "integrated_brier", "squared_error", "explained")
SPLITS = ("held_out/", "ensemble/")
REPEATED = (
    "seed", "trainer.threads", "trainer.n_bootstrap", "data", "data.split_column", "data.splits", "data.renamed",
    "model.max_length", "task.labels", "audit", "report", "pretrain.trainer.epochs", "run_dir",
)  # fmt: skip
"""Keys of a command that do not say what was run."""
TITLES = {
    "held_out/auroc": "AUROC",
    "held_out/auprc": "AUPRC",
    "ensemble/auroc": "AUROC, seeds averaged",
    "ensemble/auprc": "AUPRC, seeds averaged",
}
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


def words_of(command: str) -> list[str]:
    """Return the overrides of a command that say what was run, without those that only repeat it or say where.

    >>> words_of("ehr-embed train experiment=gibleed data.root=gibleed model=gbm seed=0 trainer.threads=1")
    ['experiment=gibleed', 'data.root=gibleed', 'model=gbm']
    """
    return [word for word in shlex.split(command) if "=" in word and word.partition("=")[0] not in REPEATED]


def labels_of(rows: list[dict[str, str]]) -> list[str]:
    """Return a name per row: the overrides in which its command differs from the others, after its experiment or search where
    no model is among them. A member of an ensemble has no command of its own and is named by its model.

    >>> rows = [{"command": "ehr-embed train experiment=a seed=0,1"}, {"command": "ehr-embed train experiment=a model=gbm"}]
    >>> labels_of(rows)
    ['`experiment=a`', '`model=gbm`']
    >>> labels_of([{"command": "ehr-embed train sweeps=a"}, {"command": "", "model._target_": "ehr_embed.models.gbm.GBM"}])
    ['`sweeps=a`', 'member GBM']
    """
    of_row = [words_of(row.get("command") or "") for row in rows]
    common = set.intersection(*map(set, of_row)) if of_row else set()
    labels = []
    for row, words in zip(rows, of_row, strict=True):
        if not words and row.get("model._target_"):
            labels.append(f"member {row['model._target_'].rpartition('.')[2]}")
            continue
        own = [word for word in words if word not in common]
        if not any(word.startswith(("model=", "experiment=", "sweeps=", "embedder=")) for word in own):
            own = [word for word in words if word.startswith(("experiment=", "sweeps="))] + own
        own = own or [word for word in words if word.startswith("model=")] or words[:1]
        labels.append(" ".join(f"`{word}`" for word in own))
    # Runs that differ in their labels alone are told apart by them.
    return [
        f"{label} `{found[0]}`"
        if labels.count(label) > 1 and (found := TASK_LABELS.findall(row.get("command") or ""))
        else label
        for label, row in zip(labels, rows, strict=True)
    ]


def named(rows: list[dict[str, str]], entry: dict[str, Any]) -> list[str]:
    """Return a name per row, with today's names of the options that `now` of the table's entry maps from those of its commands.

    >>> named([{"command": "ehr-embed train experiment=a"}], {"now": {"experiment=a": "experiment=b"}})
    ['`experiment=b`']
    """
    labels = labels_of(rows)
    for old, new in entry.get("now", {}).items():
        labels = [label.replace(f"`{old}`", f"`{new}`") for label in labels]
    return labels


def table(path: Path, entry: dict[str, Any]) -> str:
    """Return one table of results as Markdown, and below it, folded, the provenance of each row."""
    rows = read(path, entry)
    metrics = metrics_of(rows)
    has_seconds = any(row.get("seconds") for row in rows)
    head = ["run", "runs", *(TITLES.get(name, name) for name in metrics), *(["seconds of one"] if has_seconds else [])]
    labels = named(rows, entry)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    folded = []
    for label, row in zip(labels, rows, strict=True):
        seconds = [f"{float(row['seconds']):.0f}" if row.get("seconds") else ""] if has_seconds else []
        lines.append(f"| {' | '.join([label, row['n_runs'], *(cell(row, name) for name in metrics), *seconds])} |")
        about = "; ".join(row[name] for name in ("commit", "hardware", "date") if row.get(name))
        folded += [f"# {about}", row.get("command") or f"# {label}: trained by the command of its ensemble"]
    for name, figures in entry.get("published", {}).items():
        told = [f"{figures[metric]:.3f}" if metric in figures else "" for metric in metrics]
        lines.append(f"| {' | '.join([f'{name}, published', '', *told, *([''] if has_seconds else [])])} |")
    about = f"{entry['about']}\n\n" if entry.get("about") else ""
    told_later = any(value.endswith(f" {MARK}") for row in rows for value in row.values())
    note = f"\n{MARK} The runs did not record this. {entry['afterwards']['basis']}\n" if told_later else ""
    commands = "\n".join(folded)
    details = (
        '\n<details markdown="1">\n<summary>Commands, with commit, hardware and date</summary>\n\n'
        f"```sh\n{commands}\n```\n{note}\n</details>\n"
    )
    return f"### {title(path, entry)}\n\n{about}" + "\n".join(lines) + f"\n{paired(path)}{details}"


def paired(path: Path) -> str:
    """Return the table of paired differences over folds of the file beside a table; empty without such a file.

    Raises:
        SystemExit: the file does not say which recipe the differences are from.
    """
    if not (beside := path.parent / "paired" / path.name).is_file():
        return ""
    with beside.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    reference = reference_of(rows)
    if reference is None:
        raise SystemExit(
            f"{beside}: expected the column `reference`, or one recipe whose differences are all 0. Write the file again: "
            f"python -m benchmarks.folds table SWEEPS --output {beside}"
        )
    lines = [
        "",
        f"Paired over folds, less `{reference}`, with 95 % intervals over folds (too narrow, since folds share subjects of train). "
        f"`{reference}` stops on tuning, which flatters it there.",
        "",
        "| data | recipe | folds x seeds | SD over seeds | tuning AUROC | tuning AUPRC | held_out AUROC | held_out AUPRC |",
        "|---|---|---|---|---|---|---|---|",
    ]
    grouped: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        key = (f"{row['dataset']}, {row['labels']}", row["recipe"])
        grouped.setdefault(key, {})[f"{row['split']}/{row['metric']}"] = row
    for (data, recipe), of in grouped.items():
        if recipe == reference:
            continue
        first = of["held_out/auroc"]
        spread = f"{float(first['seeds_sd']):.3f}" if first["seeds_sd"] else ""
        cells = [difference(of[f"{split}/{name}"]) for split in ("tuning", "held_out") for name in ("auroc", "auprc")]
        about = [data, f"`{recipe}`", f"{first['folds']} x {float(first['seeds']):g}", spread, *cells]
        lines.append(f"| {' | '.join(about)} |")
    return "\n".join(lines) + "\n"


def reference_of(rows: list[dict[str, str]]) -> str | None:
    """Return the recipe that differences are from: the one that the table names, or in an older table the only one whose
    differences are all 0; None where neither is there.

    >>> rows = [{"recipe": "a", "difference": "0.1"}, {"recipe": "b", "difference": "0.0"}]
    >>> reference_of(rows), reference_of([*rows, {"recipe": "copy of b", "difference": "0.0"}]), reference_of(rows[:1])
    ('b', None, None)
    >>> reference_of([row | {"reference": "a"} for row in rows])
    'a'
    """
    if named := {row["reference"] for row in rows if row.get("reference")}:
        return named.pop() if len(named) == 1 else None
    recipes = dict.fromkeys(row["recipe"] for row in rows)
    same = [name for name in recipes if not any(float(row["difference"]) for row in rows if row["recipe"] == name)]
    return same[0] if len(same) == 1 else None


def difference(row: dict[str, str]) -> str:
    """Return a difference with its interval, where it has one.

    >>> difference({"difference": "0.0012", "low": "-0.003", "high": "0.0054"})
    '+0.001 [-0.003, +0.005]'
    """
    interval = f" [{float(row['low']):+.3f}, {float(row['high']):+.3f}]" if row["low"] else ""
    return f"{float(row['difference']):+.3f}{interval}"


def read(path: Path, entry: dict[str, Any]) -> list[dict[str, str]]:
    """Return the rows of a table, with what was found out afterwards."""
    with path.open(encoding="utf-8", newline="") as file:
        return [marked(row, entry.get("afterwards", {})) for row in csv.DictReader(file)]


def metrics_of(rows: list[dict[str, str]]) -> list[str]:
    """Return the columns of metrics that are shown."""
    return [
        name for name in rows[0] if name.count("/") == 1 and name.startswith(SPLITS) and name.split("/")[1] in METRICS
    ]


def title(path: Path, entry: dict[str, Any]) -> str:
    """Return the heading of a table."""
    return str(entry.get("title", path.stem.replace("_", " ")))


def summary(tables: list[tuple[Path, dict[str, Any]]]) -> str:
    """Return the first row of each table beside its boosting, where boosting was measured."""
    lines = ["| data and task | first row of its table | AUROC | `model=gbm`, AUROC |", "|---|---|---|---|"]
    for path, entry in tables:
        rows = read(path, entry)
        metric = next((name for name in metrics_of(rows) if name.endswith("/auroc")), None)
        if metric is None:
            continue
        labels = named(rows, entry)
        boosted = [
            row for row, label in zip(rows, labels, strict=True) if "`model=gbm`" in label or label == "member GBM"
        ]
        gbm = cell(boosted[0], metric) if boosted else "not measured"
        lines.append(f"| {title(path, entry)} | {labels[0]} | {cell(rows[0], metric)} | {gbm} |")
    return "\n".join(lines) + "\n"


def leaderboard() -> str:
    """Return a summary and all tables, in the order of titles.yaml, then those without an entry there."""
    titles: dict[str, dict[str, Any]] = yaml.safe_load((TABLES / "titles.yaml").read_text(encoding="utf-8"))
    paths = {path.stem: path for path in sorted(TABLES.glob("*.csv"))}
    order = [name for name in titles if name in paths] + [name for name in paths if name not in titles]
    tables = [(paths[name], titles.get(name, {})) for name in order]
    return summary(tables) + "\n" + "\n".join(table(path, entry) for path, entry in tables)


def expanded(page: str) -> str:
    """Return the page with the leaderboard written anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{leaderboard()}\n{found[2]}", page)


def with_hospitals(page: str) -> str:
    """Return the page of other hospitals with its tables written anew.

    Raises:
        KeyError: a marker names no table.
    """
    made = hospital_tables.tables(HOSPITALS, DATASETS)
    return HOSPITALS_MARKED.sub(lambda found: f"{found[1]}\n{made[found[2]]}\n{found[3]}", page)


if __name__ == "__main__":
    for page, write in ((PAGE, expanded), (HOSPITALS_PAGE, with_hospitals)):
        page.write_text(write(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote the tables of {page.relative_to(ROOT)}")
