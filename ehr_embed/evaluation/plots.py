"""PNG plots of a run.

Figures are plain objects drawn by Agg, without a display or pyplot's global state, so they are safe in worker
processes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from ehr_embed.core.files import atomic_path
from ehr_embed.evaluation.bootstrap import N_CALIBRATION_BINS, calibration_bin
from ehr_embed.evaluation.metric import title_of
from ehr_embed.evaluation.metrics import check_binary
from ehr_embed.evaluation.plot_style import (
    BEFORE,
    CHANCE,
    DPI,
    LEGEND_SIZE,
    SPLITS,
    ZERO,
    curve_style,
    finish,
    frame,
    in_style,
    split_style,
)

Curves = Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]

_MAX_POINTS = 2000


class ShownFigure(Figure):
    """A figure that a notebook shows although pyplot, with its global state, has no part in it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        FigureCanvasAgg(self)
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


@in_style
def draw_loss(history: Sequence[Mapping[str, Any]], *, chosen: int | None = None) -> Figure:
    """Draw the loss by epoch and, in a second panel, the other metrics on tuning if there are any.

    Args:
        history: one dict per epoch with "epoch" and any of "train/loss", "tuning/loss", "tuning/<metric>". A metric
            missing or None in an epoch is skipped; other keys and values that are no numbers are ignored.
        chosen: epoch whose weights were kept, which a line marks; None = it is not known.
    """
    keys = list(dict.fromkeys(key for row in history for key in row))
    losses = [key for key in keys if key.endswith("/loss") and _series(history, key)[0]]
    metrics = [
        key
        for key in keys
        if key.startswith("tuning/")
        and not key.endswith(("loss", "perplexity"))  # another scale would flatten the rest
        and _series(history, key)[0]
    ]
    figure = ShownFigure(figsize=(10.5 if metrics else 5.6, 4.2), layout="constrained")
    panels = figure.subplots(1, 2 if metrics else 1, squeeze=False)[0]
    for index, key in enumerate(losses):
        split = key.removesuffix("/loss")
        epochs, values = _series(history, key)
        label, style = title_of(split), _style(split, index, len(epochs))
        if split == "tuning":
            best = int(np.argmin(values))
            label += f", lowest {values[best]:.4g} at epoch {epochs[best]:g}"
            ring = {"color": style["color"], "markersize": 11, "fillstyle": "none"}
            panels[0].plot(epochs[best], values[best], "o", **ring)
        panels[0].plot(epochs, values, label=label, **style)
    for panel in panels if chosen is not None else ():
        panel.axvline(chosen, color=CHANCE, lw=1.2, ls=":", label=f"epoch {chosen} was kept")
    finish(panels[0], "Loss", "epoch", "loss")
    for index, key in enumerate(metrics):
        epochs, values = _series(history, key)
        label = title_of(key.removeprefix("tuning/"))
        panels[1].plot(epochs, values, label=label, **_thinned(curve_style(index), len(epochs)))
    if metrics:
        finish(panels[1], "Tuning metrics", "epoch", "value")
    for panel in panels:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@in_style
def draw_roc(curves: Curves) -> Figure:
    """Draw ROC curves with the AUROC in the legend.

    Args:
        curves: split name -> (labels (n,) 0/1, probabilities (n,)).

    Raises:
        UserError: a split has one class only, or bad probabilities.
    """
    figure = ShownFigure(figsize=(5.4, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=CHANCE, lw=1, ls="--", label="chance (0.500)")
    for index, (name, (labels, probabilities)) in enumerate(curves.items()):
        y, p = check_binary(labels, probabilities, split_name=name)
        false_positive_rate, true_positive_rate, _ = roc_curve(y, p)
        kept = _thin(len(false_positive_rate))
        label = f"{title_of(name)}: AUROC {roc_auc_score(y, p):.3f} (n = {len(y):,})"
        axes.plot(false_positive_rate[kept], true_positive_rate[kept], label=label, **_line(name, index))
    _unit_square(axes)
    finish(axes, "Receiver operating characteristic", "false positive rate", "true positive rate", place="lower right")
    return figure


@in_style
def draw_precision_recall(curves: Curves) -> Figure:
    """Draw precision against recall, with the average precision in the legend and the prevalence as a dashed baseline.

    Args:
        curves: split name -> (labels (n,) 0/1, probabilities (n,)).

    Raises:
        UserError: a split has one class only, or bad probabilities.
    """
    figure = ShownFigure(figsize=(5.4, 5.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, (labels, probabilities)) in enumerate(curves.items()):
        y, p = check_binary(labels, probabilities, split_name=name)
        precision, recall, _ = precision_recall_curve(y, p)
        kept = _thin(len(precision))
        style = _line(name, index)
        label = f"{title_of(name)}: AUPRC {average_precision_score(y, p):.3f} (prevalence {y.mean():.3f}, dashed)"
        # Steps, because average precision is the area under steps: precision does not change linearly with recall.
        axes.step(recall[kept], precision[kept], where="post", label=label, **style)
        axes.axhline(float(y.mean()), color=style["color"], lw=1, ls="--", alpha=0.8)
    _unit_square(axes)
    axes.set(xlabel="recall", ylabel="precision", title="Precision and recall")
    frame(axes)
    # A precision-recall curve may run through any corner, so the legend goes below the axes.
    figure.legend(loc="outside lower center", frameon=False, fontsize=LEGEND_SIZE)
    return figure


@in_style
def draw_calibration(curves: Curves) -> Figure:
    """Draw a reliability diagram over 10 bins of equal width, with the number of samples in each bin below it.

    The bins are those of the ECE in `ehr_embed.evaluation.metrics`. The error bars are 95% Wilson intervals, which
    treat samples as independent.

    Args:
        curves: split name -> (labels (n,) 0/1, probabilities (n,)).

    Raises:
        UserError: a split has one class only, or bad probabilities.
    """
    figure = ShownFigure(figsize=(5.4, 6.4), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    axes.plot([0, 1], [0, 1], color=CHANCE, lw=1, ls="--", label="perfect calibration")
    edges = np.linspace(0, 1, N_CALIBRATION_BINS + 1)
    bar_width = 0.8 / N_CALIBRATION_BINS / max(1, len(curves))
    for index, (name, (labels, probabilities)) in enumerate(curves.items()):
        y, p = check_binary(labels, probabilities, split_name=name)
        bins = calibration_bin(p)
        counts = np.bincount(bins, minlength=N_CALIBRATION_BINS)
        filled = counts > 0
        n = counts[filled]
        mean_probability = np.bincount(bins, weights=p, minlength=N_CALIBRATION_BINS)[filled] / n
        rate = np.bincount(bins, weights=y, minlength=N_CALIBRATION_BINS)[filled] / n
        ece = float((np.abs(mean_probability - rate) * n).sum() / n.sum())
        low, high = _wilson(rate, n)
        style = split_style(name, index)
        axes.errorbar(
            mean_probability,
            rate,
            yerr=np.maximum([rate - low, high - rate], 0),
            markersize=5,
            lw=1.6,
            elinewidth=0.9,
            capsize=2,
            label=f"{title_of(name)}: ECE {ece:.3f}, AUROC {roc_auc_score(y, p):.3f}",
            **style,
        )
        shift = (index - (len(curves) - 1) / 2) * bar_width
        below.bar((edges[:-1] + edges[1:]) / 2 + shift, counts, width=bar_width, color=style["color"])
    _unit_square(axes)
    finish(axes, "Calibration", "", "observed rate", place=None)
    # Rare outcomes put nearly everything in the first bin; on a linear axis the rest would vanish.
    below.set_yscale("log")
    below.set_ylim(bottom=0.7)
    below.set_xticks(edges[::2])
    finish(below, "", "predicted probability", "samples (log)", place=None)
    figure.legend(loc="outside lower center", frameon=False, fontsize=LEGEND_SIZE)
    return figure


@in_style
def draw_decision(table: pl.DataFrame) -> Figure:
    """Draw decision curves: the net benefit of acting on a model by the threshold of the act, beside acting on all and on nobody.

    Args:
        table: what `ehr_embed.evaluation.decision_curve.decision_table` returns.
    """
    figure = ShownFigure(figsize=(5.6, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=ZERO, lw=1, label="act on nobody")
    best = 0.0
    for index, (name, rows) in enumerate(table.partition_by("curve", as_dict=True, maintain_order=True).items()):
        own, x = str(name[0]), rows["threshold"].to_numpy()
        is_before = own.endswith(BEFORE)
        style = _line(own, index)
        axes.plot(x, rows["net_benefit"], label=title_of(own), **style)
        best = max(best, float(rows["net_benefit"].max()), float(rows["net_benefit_of_all"].max()))  # type: ignore[arg-type]
        if not is_before:
            axes.plot(
                x,
                rows["net_benefit_of_all"],
                color=style["color"],
                lw=1,
                ls="--",
                alpha=0.8,
                label=f"{title_of(own)}: act on all",
            )
    axes.set(xlim=(0, 1), ylim=(-0.25 * best, 1.1 * best))  # below that a threshold is out of the question
    finish(
        axes,
        "Decision curve",
        "probability from which on one acts",
        "net benefit (true positives per sample)",
        place=None,
    )
    figure.legend(loc="outside lower center", frameon=False, fontsize=LEGEND_SIZE)
    return figure


def plot_loss(path: str | os.PathLike[str], history: Sequence[Mapping[str, Any]], *, chosen: int | None = None) -> None:
    """Write what `draw_loss` draws as PNG."""
    _save(draw_loss(history, chosen=chosen), path)


def plot_roc(path: str | os.PathLike[str], curves: Curves) -> None:
    """Write what `draw_roc` draws as PNG."""
    _save(draw_roc(curves), path)


def plot_precision_recall(path: str | os.PathLike[str], curves: Curves) -> None:
    """Write what `draw_precision_recall` draws as PNG."""
    _save(draw_precision_recall(curves), path)


def plot_calibration(path: str | os.PathLike[str], curves: Curves) -> None:
    """Write what `draw_calibration` draws as PNG."""
    _save(draw_calibration(curves), path)


def plot_decision(path: str | os.PathLike[str], table: pl.DataFrame) -> None:
    """Write what `draw_decision` draws as PNG."""
    _save(draw_decision(table), path)


@in_style
def plot_numbers(path: str | os.PathLike[str], *, labels: npt.ArrayLike, predicted: npt.ArrayLike, title: str) -> None:
    """Plot labels against predicted numbers, at most 2000 of them, and the mean of each in ten groups of equal size.

    Args:
        path: PNG file to write.
        labels: (n,) numbers.
        predicted: (n,) numbers, in the same unit.
        title: title of the plot.
    """
    y, x = np.asarray(labels, np.float64), np.asarray(predicted, np.float64)
    figure = Figure(figsize=(5.4, 5.2), layout="constrained")
    axes, order = figure.subplots(), np.argsort(x, kind="stable")
    shown = order[_thin(len(order))]
    axes.scatter(x[shown], y[shown], s=9, color=CHANCE, alpha=0.5, edgecolors="none", label=f"samples (n = {len(y):,})")
    axes.axline((float(y.mean()), float(y.mean())), slope=1, color=CHANCE, lw=1, ls="--", label="label = prediction")
    groups = [own for own in np.array_split(order, 10) if len(own)]
    means = [x[own].mean() for own in groups], [y[own].mean() for own in groups]
    axes.plot(*means, "o-", color=SPLITS["held_out"]["color"], lw=1.6, label="means of ten groups")
    finish(axes, title, "predicted", "label")
    _save(figure, path)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return the epochs and the finite values of one key.

    >>> _series([{"epoch": 1, "a": 0.5}, {"epoch": 2, "a": None}, {"epoch": 3}, {"epoch": 4, "a": 0.25}], "a")
    ([1, 4], [0.5, 0.25])
    """
    pairs = [(row.get("epoch", index + 1), row.get(key)) for index, row in enumerate(history)]
    kept = [(epoch, value) for epoch, value in pairs if isinstance(value, int | float) and np.isfinite(value)]
    return [epoch for epoch, _ in kept], [value for _, value in kept]


def _wilson(rate: npt.NDArray[Any], n: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the 95% score interval of a proportion (Wilson 1927), which is finite and within [0, 1] even for 0 of n.

    >>> [bound.round(3).tolist() for bound in _wilson(np.array([0.0, 0.5]), np.array([10, 100]))]
    [[0.0, 0.404], [0.278, 0.596]]
    """
    z = 1.959964
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return centre - half, centre + half


def _thin(n_points: int) -> npt.NDArray[np.intp]:
    """Return the indices of at most 2000 of `n_points`, both ends included, because a screen shows no more."""
    return np.unique(np.linspace(0, n_points - 1, min(n_points, _MAX_POINTS)).round().astype(np.intp))


def _line(name: str, index: int) -> dict[str, Any]:
    """Return the style of a curve of many points, which has no markers."""
    return {key: value for key, value in split_style(name, index).items() if key != "marker"} | {"lw": 1.8}


def _style(split: str, index: int, n_points: int) -> dict[str, Any]:
    return _thinned(split_style(split, index), n_points)


def _thinned(style: dict[str, Any], n_points: int) -> dict[str, Any]:
    """Return a style with small markers, or without any where they would run into each other."""
    return style | {"lw": 1.6, "markersize": 3.5, "marker": style["marker"] if n_points <= 40 else ""}


def _unit_square(axes: Axes) -> None:
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, whole or not at all."""
    _save(figure, path)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
