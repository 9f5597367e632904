"""Draw how the runs of a search learned: the monitored metric on tuning by epoch, the best runs in styles of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from ehr_embed.core.errors import UserError
from ehr_embed.evaluation.plot_style import CHANCE, curve_style, finish, in_style
from ehr_embed.evaluation.plots import ShownFigure, save_figure
from ehr_embed.run_folder.finish import read_metrics
from ehr_embed.run_folder.layout import FINISHED, HISTORY

N_NAMED, MOST = 8, 200
"""Curves with a style and a name, and curves in all; the others are grey."""


@in_style
def write_learning_curves(path: Path, folders: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """Write the curves as PNG, the first runs with names.

    Args:
        path: the file to write.
        folders: folders of runs, the best first; those without a history of two epochs are left out.
        names: names of the runs.

    Returns:
        The path; nothing if no run has a curve.
    """
    monitor = next((name for folder in folders if (name := _monitor(folder))), None)
    curves = [
        (name, *curve) for name, folder in zip(names, folders, strict=True) if len((curve := _read(folder, monitor))[0]) > 1
    ]  # fmt: skip
    if not curves or monitor is None:
        return []
    figure = ShownFigure(figsize=(8.6, 4.4), layout="constrained")
    axes = figure.subplots()
    for index, (name, epochs, values) in reversed(list(enumerate(curves[:MOST]))):
        style = {**curve_style(index), "lw": 1.8, "markersize": 4, "label": name, "zorder": 3}
        axes.plot(epochs, values, **(style if index < N_NAMED else {"color": CHANCE, "lw": 0.7, "alpha": 0.5}))
    others = len(curves) - N_NAMED
    title = f"Learning curves of {len(curves)} runs" + (f", {others} of them in grey" if others > 0 else "")
    finish(axes, title, "epoch", f"tuning {monitor}", place=None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, title="run", handlelength=4)
    save_figure(figure, path)
    return [path]


def _monitor(folder: Path) -> str | None:
    if not (folder / FINISHED).is_file():
        return None
    try:
        return str(read_metrics(folder)["monitor"]["name"])
    except (KeyError, TypeError, UserError):
        return None


def _read(folder: Path, monitor: str | None) -> tuple[list[float], list[float]]:
    """Return the epochs and the values of a run's history; lines that a killed run left half-written are passed over."""
    epochs: list[float] = []
    values: list[float] = []
    path = folder / HISTORY
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            epoch, value = float(row["epoch"]), float(row[f"tuning/{monitor}"])
        except (ValueError, KeyError, TypeError):
            continue
        epochs.append(epoch)
        values.append(value)
    return epochs, values
