"""Make the Markdown tables of docs/hospitals.md from the rows that `benchmarks.hospitals` writes, by the standard library alone."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

Row = Mapping[str, str]
MODELS = ("code_tab", "gbm", "mean logit of code_tab and gbm")
"""Models in the order of the tables, before those that are controls."""
RUNS, PAIRED, RENAMED, HIDDEN = "runs.csv", "paired.csv", "renamed.csv", "hidden_codes.csv"
"""Files of the rows, in one folder."""
WAYS = (
    ("boosting", "gbm", "alone"),
    ("boosting, leaves of 5", "gbm with model.min_leaf_samples=5", "alone"),
    ("`code_tab` from scratch", "code_tab", "alone"),
    ("the other hospital's `code_tab`, unchanged", "code_tab", "unchanged"),
    ("the same, fine-tuned", "code_tab", "tuned"),
    ("boosting, pooled", "gbm", "pooled"),
    ("`code_tab`, pooled", "code_tab", "pooled"),
)
"""Columns of the table of few labels: heading, model and way of the rows."""


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def mean_sd(values: Sequence[float]) -> str:
    """Return the mean and the standard deviation of some values.

    >>> mean_sd([0.8, 0.9]), mean_sd([0.8]), mean_sd([])
    ('0.850 ± 0.071', '0.800', '')
    """
    if not values:
        return ""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def cell(rows: Sequence[Row], metric: str, *, most: int, of: str = "seed", interval: bool = False) -> str:
    """Return the mean and SD of a metric over rows, the first with its interval, and their number where it is not the usual `most`.

    >>> low, high = {"auroc": "0.8", "auroc/low": "0.7", "auroc/high": "0.9"}, {"auroc": "0.9"}
    >>> cell([low, high], "auroc", most=2), cell([low], "auroc", most=2, of="draw")
    ('0.850 ± 0.071', '0.800 (1 draw)')
    >>> cell([low, high], "auroc", most=2, interval=True), cell([low], "auroc", most=1, interval=True)
    ('0.850 ± 0.071; 0.800 [0.700, 0.900]', '0.800 [0.700, 0.900]')
    """
    told = mean_sd([float(row[metric]) for row in rows])
    if interval and rows:
        first = f"{float(rows[0][metric]):.3f} [{float(rows[0][f'{metric}/low']):.3f}, {float(rows[0][f'{metric}/high']):.3f}]"
        told = first if len(rows) == 1 else f"{told}; {first}"
    return told if len(rows) in (0, most) else f"{told} ({len(rows)} {of}{'' if len(rows) == 1 else 's'})"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def chosen(rows: Iterable[Row], **about: str) -> list[Row]:
    """Return the rows with some cells, by seed and draw."""
    found = [row for row in rows if all(row[name] == value for name, value in about.items())]
    return sorted(found, key=lambda row: (int(row["seed"]), int(row["draw"] or 0)))


def told(model: str) -> str:
    """Return a model's name with its options as code.

    >>> told("gbm"), told("code_tab with embedder=random_frozen"), told("mean logit of code_tab and gbm")
    ('`gbm`', '`code_tab` with `embedder=random_frozen`', 'mean logit of `code_tab` and `gbm`')
    """
    plain = ("mean", "logit", "of", "and", "with")
    return " ".join(word if word in plain else f"`{word}`" for word in model.split()).replace("` `", " ")


def unchanged(rows: Sequence[Row], names: Mapping[str, str], *, seeds: int) -> str:
    """Return the table of models that are applied, unchanged, to all labels of the other hospital, by control."""
    of = [row for row in rows if row["way"] == "unchanged" and row["split"] == "all"]
    order = dict.fromkeys([*MODELS, *(row["model"] for row in of)])
    groups = dict.fromkeys((row["trained_on"], row["applied_to"]) for row in of)
    ways = sorted(
        groups, key=lambda key: not any(row["way"] == "tuned" and row["applied_to"] == key[1] for row in rows)
    )
    lines = []
    for one, other in ways:
        for model in order:
            here = {
                control: chosen(of, trained_on=one, applied_to=other, model=model, control=control)
                for control in ("texts", "shuffled", "none")
            }
            if not (texts := here["texts"]):
                continue
            n, positive = texts[0]["n"], texts[0]["n_positive"]
            lines.append((
                told(model), names.get(one, one), f"{names.get(other, other)}, {int(n):,} labels ({int(positive):,} positive)",
                cell(texts, "auroc", most=seeds, interval=True),
                cell(texts, "auprc", most=seeds),
                *(cell(here[control], "auroc", most=seeds) for control in ("shuffled", "none")),
            ))  # fmt: skip
    head = ("model", "trained on", "applied to", "AUROC", "AUPRC", "AUROC, texts shuffled", "AUROC, not aligned")
    return markdown(head, lines)


def few(rows: Sequence[Row], _names: Mapping[str, str], *, seeds: int, draws: int = 5) -> str:
    """Return the table of held-out AUROC by the number of labels of the second hospital that each way uses."""
    held_out = [row for row in rows if row["split"] == "held_out" and row["control"] in ("", "texts")]
    there = {row["applied_to"] for row in held_out if row["draw"] or row["way"] == "tuned"}
    held_out = [row for row in held_out if row["applied_to"] in there]
    lines = []
    numbers = sorted({int(row["labels"]) for row in held_out if row["way"] != "unchanged"})
    for n in numbers:
        cells = []
        for _, model, way in WAYS:
            if way == "unchanged":
                cells.append(cell(chosen(held_out, model=model, way=way), "auroc", most=seeds))
                continue
            found = chosen(held_out, model=model, way=way, labels=str(n))
            drawn = [row for row in found if row["draw"]]
            cells.append(cell(found, "auroc", most=draws if drawn else seeds, of="draw" if drawn else "seed"))
        lines.append((f"{n} (all)" if n == numbers[-1] else str(n), *cells))
    return markdown(("labels", *(head for head, *_ in WAYS)), lines)


def pooled(rows: Sequence[Row], names: Mapping[str, str], *, seeds: int, paired: Sequence[Row]) -> str:
    """Return the table of training in each hospital alone and on the pool."""
    lines = []
    for difference in paired:
        model, here = difference["model"], difference["applied_to"]
        whole = [row for row in rows if row["model"] == model and row["applied_to"] == here and not row["draw"]]
        most = max((int(row["labels"]) for row in whole), default=0)
        of = {way: chosen(whole, way=way, labels=str(most), split="held_out") for way in ("alone", "pooled")}
        n = f"{names.get(here, here)}, {int(difference['n']):,} labels ({int(of['alone'][0]['n_positive']):,} positive)"
        cells = [cell(of[way], metric, most=seeds) for metric in ("auroc", "auprc") for way in ("alone", "pooled")]
        less = f"{float(difference['difference']):+.3f} [{float(difference['low']):+.3f}, {float(difference['high']):+.3f}]"
        number = int(difference["seeds"])
        lines.append(
            (n, told(model), *cells, less + ("" if number == seeds else f" ({number} seed{'s' * (number > 1)})"))
        )
    head = (
        "held_out of",
        "model",
        "AUROC alone",
        "AUROC pooled",
        "AUPRC alone",
        "AUPRC pooled",
        "AUROC, pooled less alone",
    )
    return markdown(head, lines)


def renamed(rows: Sequence[Row]) -> str:
    """Return the table of what models keep of renamed codes, by the way in which these are read.

    "Kept" is the mean over seeds of a metric's share, and in brackets that of what the AUROC has above 0.5.
    """
    lines = []
    for model, codes in dict.fromkeys((row["model"], row["codes"]) for row in rows):
        of = [row for row in rows if (row["model"], row["codes"]) == (model, codes)]
        metrics = [mean_sd([float(row[name]) for row in of]) for name in ("auroc", "auprc")]
        kept = [
            percent([float(row[f"{name}/kept"]) for row in of if row[f"{name}/kept"]]) for name in ("auroc", "auprc")
        ]
        if kept[0]:
            above = [(float(row["auroc"]) - 0.5) / (float(row["auroc"]) / float(row["auroc/kept"]) - 0.5) for row in of]
            kept[0] += f" ({100 * statistics.mean(above):.1f} %)"
        lines.append((told(model), str(len(of)), codes, *metrics, *kept))
    return markdown(("model", "seeds", "codes are read", "AUROC", "AUPRC", "AUROC kept", "AUPRC kept"), lines)


def percent(values: Sequence[float]) -> str:
    """Return mean and SD of shares in per cent.

    >>> percent([0.9, 1.0]), percent([0.5]), percent([])
    ('95.0 ± 7.1 %', '50.0 %', '')
    """
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread} %"


def hidden(rows: Sequence[Row]) -> str:
    """Return the table of what codes that train never had cost, per label set and kind of vectors, over draws of the codes."""
    lines = []
    share = next(row["hidden"] for row in rows if float(row["hidden"]))
    for labels, vectors in dict.fromkeys((row["labels"], row["vectors"]) for row in rows):
        here = [row for row in rows if (row["labels"], row["vectors"]) == (labels, vectors)]
        of = {(float(row["hidden"]) > 0, row["draw"]): float(row["auroc"]) for row in here}
        draws = [draw for is_hidden, draw in of if is_hidden]
        whole, part = ([of[is_hidden, draw] for draw in draws] for is_hidden in (False, True))
        lost = [a - b for a, b in zip(whole, part, strict=True)]
        told_lost = ", ".join(f"{x:.3f}" for x in lost)
        lines.append(
            (f"`{labels}`", told(vectors), mean_sd(whole), mean_sd(part), told_lost, f"{statistics.mean(lost):.3f}")
        )
    return markdown(
        ("labels", "vectors", "all codes", f"{float(share):.0%} hidden", "AUROC lost, per draw", "mean"), lines
    )


def tables(folder: Path, names: Mapping[str, str], *, seeds: int = 3, draws: int = 5) -> dict[str, str]:
    """Return the tables of a folder's rows as Markdown, by name: those whose files are there.

    Args:
        folder: where the files lie.
        names: what the tables call the datasets.
        seeds, draws: the usual numbers of these; a cell says where it has another.
    """
    made: dict[str, str] = {}
    if (folder / RUNS).exists():
        rows = read(folder / RUNS)
        made["unchanged"] = unchanged(rows, names, seeds=seeds)
        made["few"] = few(rows, names, seeds=seeds, draws=draws)
        made["pooled"] = pooled(rows, names, seeds=seeds, paired=read(folder / PAIRED))
    if (folder / RENAMED).exists():
        made["renamed"] = renamed(read(folder / RENAMED))
    if (folder / HIDDEN).exists():
        made["hidden"] = hidden(read(folder / HIDDEN))
    return made
