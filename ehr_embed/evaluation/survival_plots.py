"""Plots of times to an outcome: observed curves of risk groups beside the predicted ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from ehr_embed.evaluation.bootstrap import Floats
from ehr_embed.evaluation.plot_style import COLOURS, DASHES, MARKERS, finish, in_style
from ehr_embed.evaluation.plots import _save
from ehr_embed.evaluation.survival import Times

GROUP_COLOURS = (COLOURS[0], COLOURS[2], COLOURS[6], COLOURS[1])
MOST_CURVES, N_MARKERS = 60, 6


@in_style
def plot_risk_groups(
    path: str | os.PathLike[str],
    days: npt.NDArray[Any],
    status: npt.NDArray[Any],
    incidence: Floats,
    *,
    grid_days: Sequence[float],
    title: str,
) -> None:
    """Plot the observed incidence (Kaplan-Meier) of four groups of equal size by predicted risk, and the mean predicted one.

    Args:
        path: PNG file to write.
        days, status: (n,) as in `survival_metrics`.
        incidence: (n, G) predicted.
        grid_days: (G,) ascending.
        title: title of the plot.
    """
    from sksurv.nonparametric import kaplan_meier_estimator

    times, grid = Times.of(days, status), np.asarray(grid_days, np.float64)
    order = np.argsort(incidence[:, -1], kind="stable")
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    until = float(np.asarray(days).max())
    for number, group in enumerate(np.array_split(order, len(GROUP_COLOURS))):
        if not len(group):
            continue
        own, colour, marker = times.take(group), GROUP_COLOURS[number], MARKERS[number]
        when, survival = kaplan_meier_estimator(own.is_event, own.days)
        label = f"quarter {number + 1} of risk (n = {len(group):,}, {int(own.is_event.sum()):,} events)"
        # Colours look alike in a black-and-white print: each group has a marker of its own, and a dash where it is predicted.
        axes.step(
            np.r_[0, when], 1 - np.r_[1, survival], where="post", color=colour, lw=1.8, label=label,
            marker=marker, markevery=max(1, (len(when) + 1) // N_MARKERS), markersize=5,
        )  # fmt: skip
        axes.plot(
            np.r_[0, grid], np.r_[0, incidence[group].mean(0)], color=colour, lw=1.4, ls=DASHES[number + 1],
            marker=marker, markevery=max(1, (len(grid) + 1) // N_MARKERS), markersize=5, fillstyle="none",
        )  # fmt: skip
    axes.set_xlim(0, until)
    axes.set_ylim(bottom=0)
    finish(axes, title, "days after the prediction", "observed (whole lines) and predicted (dashed) incidence")
    _save(figure, path)


@in_style
def plot_risk_curves(
    path: str | os.PathLike[str], incidence: Floats, *, grid_days: Sequence[float], title: str
) -> None:
    """Plot the predicted incidence of single samples, of at most 60 of them, evenly spaced by risk, and the mean of all.

    Args:
        path: PNG file to write.
        incidence: (n, G) predicted.
        grid_days: (G,) ascending.
        title: title of the plot.
    """
    grid, order = np.asarray(grid_days, np.float64), np.argsort(incidence[:, -1], kind="stable")
    shown = order[np.unique(np.linspace(0, len(order) - 1, min(MOST_CURVES, len(order))).round().astype(int))]
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for row in incidence[shown]:
        axes.plot(np.r_[0, grid], np.r_[0, row], color=COLOURS[0], lw=0.7, alpha=0.4)
    label = f"mean of {len(incidence):,} predictions"
    axes.plot(np.r_[0, grid], np.r_[0, incidence.mean(0)], color="black", lw=2, label=label)
    axes.set_xlim(0, float(grid[-1]))
    axes.set_ylim(bottom=0)
    finish(axes, title, "days after the prediction", "predicted incidence")
    _save(figure, path)
