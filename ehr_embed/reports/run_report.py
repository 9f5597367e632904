"""Report the results of a run at its end: a summary for the tracker, plots, and a printed table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ehr_embed.core.programs import command, quoted_override
from ehr_embed.evaluation.decision_curve import decision_table, write_decision_table
from ehr_embed.evaluation.metric_entries import intervals_missing, values_of, with_interval
from ehr_embed.evaluation.plots import (
    BEFORE,
    plot_calibration,
    plot_decision,
    plot_loss,
    plot_precision_recall,
    plot_roc,
)
from ehr_embed.run_folder.layout import BEST, DECISION_CURVE, REPORT
from ehr_embed.sources.protocol import EVALUATED

LEAST_TOLD_MFU = 0.005
"""Below it the share of the peak arithmetic would read 0 %, as that of every small model on a shared CPU."""


def summary_of(metrics: dict[str, Any]) -> dict[str, float]:
    """Return point values by name: `best/<split>/<metric>` of the best checkpoint, `transfer/...`, and `train/<fact>`.

    >>> summary_of({"tuning": {"auroc": {"value": 0.8, "low": 0.7, "high": 0.9}, "n": 10}, "train": {"epochs": 3}})
    {'best/tuning/auroc': 0.8, 'train/epochs': 3}
    """
    best = {
        f"best/{split}/{name}": value
        for split in EVALUATED
        for name, value in values_of(metrics.get(split, {})).items()
    }
    transfer = {
        f"transfer/{name}_{what}": value
        for name, of in metrics.get("transfer", {}).items()
        for what, value in of.items()
    }
    return best | transfer | {f"train/{name}": value for name, value in metrics["train"].items()}


def write_plots(
    folder: Path,
    history: list[dict[str, float]],
    curves: dict[str, Any],
    *,
    before: dict[str, Any] | None = None,
    chosen: int | None = None,
) -> list[Path]:
    """Draw the loss if the run trained, and ROC, precision-recall, calibration and decision curves for binary labels.

    The numbers of the decision curves are written as CSV beside them.

    Args:
        folder: folder for the PNG files.
        history: metrics per epoch; empty if nothing was trained.
        curves: split -> labels and probabilities; empty unless the labels are binary.
        before: the same of the probabilities before they were calibrated, if they were.
        chosen: epoch whose weights were kept; None = nothing was trained by epochs.

    Returns:
        The paths of the plots.
    """
    folder.mkdir(parents=True, exist_ok=True)
    both = curves | {f"{name}{BEFORE}": own for name, own in (before or {}).items()}
    named: dict[str, tuple[Callable[[Path, Any], None], Any]] = {
        "loss": (partial(plot_loss, chosen=chosen), history),
        "roc": (plot_roc, curves),
        "precision_recall": (plot_precision_recall, curves),
        "calibration": (plot_calibration, both),
        "decision_curve": (plot_decision, decision_table(both) if both else None),
    }
    paths = []
    for name, (plot, data) in named.items():
        if data is not None and len(data):
            plot(folder / f"{name}.png", data)
            paths.append(folder / f"{name}.png")
    if both:
        write_decision_table(folder / DECISION_CURVE, both)
    return paths


def print_metrics(metrics: dict[str, Any], run_dir: Path) -> None:
    """Print the table of metrics with which a run ends, and the facts of its training."""
    table = Table()
    table.add_column("metric")
    for split in reversed(EVALUATED):
        table.add_column(f"{split} (n={metrics[split]['n']})", justify="right")
    for name in values_of(metrics["held_out"]):
        table.add_row(name, *(with_interval(metrics[split][name]) for split in reversed(EVALUATED)))
    if "prevalence" in metrics["held_out"]:
        table.add_row("prevalence", *(f"{metrics[split]['prevalence']:.3f}" for split in reversed(EVALUATED)))
    for name in metrics["held_out"].get("baselines", {}):
        for metric in ("perplexity", "top1_accuracy"):
            cells = (f"{metrics[split]['baselines'][name][metric]:.3f}" for split in reversed(EVALUATED))
            table.add_row(f"{metric}, {name}", *cells)
    for name in ("auroc", "concordance"):
        if bayes := metrics.get(f"bayes_{name}"):
            table.add_row(f"best possible {name}", *(f"{bayes[split]:.3f}" for split in reversed(EVALUATED)))
    console = Console()
    # A path, or a sentence in a log, is not cut at the width of a terminal that is not there.
    console.print(f"held-out and tuning metrics with 95 % intervals, {run_dir}", highlight=False, soft_wrap=True)
    console.print(table)
    for note in intervals_missing(metrics):
        console.print(note, highlight=False, soft_wrap=True)
    if found := metrics.get("all_splits"):
        said = ", ".join(f"{name} {with_interval(found[name])}" for name in found if name != "n")
        console.print(
            f"all {found['n']:,} labels of all splits, none of which the model learned from: {said}",
            highlight=False,
            soft_wrap=True,
        )
    for name, of in metrics.get("transfer", {}).items():
        console.print(
            f"held-out {name}: {of['before']:.3f} where it was trained, {of['here']:.3f} here, {of['kept']:.1%} kept",
            highlight=False,
            soft_wrap=True,
        )
    if told := calibration_text(metrics):
        console.print(told, highlight=False, soft_wrap=True)
    if metrics.get("datasets"):
        console.print(_datasets(metrics["datasets"]))
    if metrics.get("members"):
        console.print(_members(metrics["members"]))
    train = metrics["train"]
    trained = ""
    if "epochs" in train:
        trained = f"best epoch {train['best_epoch']} of {train['epochs']}, {train['events_per_s']:,.0f} events/s, "
        if train.get("mfu", 0) >= LEAST_TOLD_MFU:
            trained += f"{train['mfu']:.0%} of the peak arithmetic, "
        trained += f"{train['padding_share']:.0%} padding, "
    console.print(
        f"{train['n_parameters']:,} parameters, {trained}{train['precision']}, {train['total_seconds']:.0f} s in all",
        highlight=False,
        soft_wrap=True,
    )
    if (run_dir / REPORT).is_file():
        console.print(f"Report: {run_dir / REPORT}", highlight=False, soft_wrap=True, markup=False)
    if "auroc" in metrics["held_out"] and (run_dir / BEST).is_file():
        console.print(
            f"Next: {command('explain')} {quoted_override('run', run_dir)}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )


def calibration_text(metrics: dict[str, Any]) -> str:
    """Return in a sentence what the calibration of a run has changed on held_out; nothing where it asks for none.

    >>> entry = {"value": 0.2, "low": None, "high": None}
    >>> found = {"method": "Temperature", "n": 90, "fitted": "temperature 2", "before": {"held_out": {"ece": entry}}}
    >>> calibration_text({"calibration": found, "held_out": {"ece": entry | {"value": 0.1}}})
    'calibrated: temperature 2, fitted on 90 samples of tuning; held-out ece 0.200 before, 0.100 after'
    """
    found = metrics.get("calibration")
    if found is None:
        return ""
    if "fitted" not in found:
        return f"not calibrated: {found['too_few']}"
    before, after = values_of(found["before"]["held_out"]), values_of(metrics["held_out"])
    changes = ", ".join(f"{name} {before[name]:.3f} before, {after[name]:.3f} after" for name in before)
    return f"calibrated: {found['fitted']}, fitted on {found['n']:,} samples of tuning; held-out {changes}"


def dataset_rows(datasets: dict[str, Any]) -> list[list[str]]:
    """Return one row of cells per dataset of a pool and split: its samples, and each measure where both classes occur."""
    rows = []
    for name, splits in datasets.items():
        for split in reversed(EVALUATED):
            found = splits[split]
            cells = [with_interval(found[m]) if m in found else "one class only" for m in ("auroc", "auprc")]
            rows.append([name, split, f"{found['n']:,} ({found['n_positive']:,})", *cells])
    return rows


DATASET_COLUMNS = ("dataset", "split", "samples (positive)", "AUROC", "AUPRC")


def _datasets(datasets: dict[str, Any]) -> Table:
    """Return the table of the metrics of each dataset of a pool."""
    table = Table()
    for column in DATASET_COLUMNS:
        table.add_column(column)
    for row in dataset_rows(datasets):
        table.add_row(*row)
    return table


def _members(members: list[dict[str, Any]]) -> Table:
    """Return the table of an ensemble's members, with how far it lies above each on held_out."""
    table = Table(
        title="how far the ensemble lies above each member on held_out, paired over subjects", title_justify="left"
    )
    table.add_column("member")
    table.add_column("weight", justify="right")
    for metric in members[0]["held_out"]:
        table.add_column(f"{metric} [95 %], p (Holm)", justify="right")
    for member in members:
        table.add_row(member["run"], f"{member['weight']:.3f}", *map(difference_text, member["held_out"].values()))
    return table


def difference_text(found: dict[str, float | None]) -> str:
    """Return a difference with its interval and adjusted p-value.

    >>> difference_text({"difference": 0.01, "low": 0.002, "high": 0.02, "p": 0.01, "p_holm": 0.02})
    '+0.0100 [+0.0020, +0.0200], 0.020'
    >>> difference_text({"difference": 0.01, "low": None, "high": None, "p": None, "p_holm": None})
    '+0.0100'
    """
    if found["low"] is None:
        return f"{found['difference']:+.4f}"
    return f"{found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}], {found['p_holm']:.3f}"
