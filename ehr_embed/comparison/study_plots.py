"""Draw Optuna's plots of a study, each as an interactive HTML file and as a PNG image."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
from optuna.trial import TrialState

from ehr_embed.core.files import atomic_path
from ehr_embed.evaluation.plot_style import COLOURS, DPI, TYPE, restyle

log = logging.getLogger(__name__)
PLOTS = ("optimization_history", "param_importances", "parallel_coordinate", "slice")
BY_PARAMETER = ("parallel_coordinate", "slice")
"""Plots with a panel or an axis per parameter."""
LEAST_RATIO = 30.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
MAX_PARAMETERS = 16
"""Most parameters in a plot: panels for the hundred keys in which two unlike models differ take minutes, and nobody reads them."""


def write_study_plots(folder: Path, study: optuna.Study, objectives: Sequence[str]) -> list[Path]:
    """Write `<plot>.html` and `<plot>.png` for each plot of `PLOTS`, and the Pareto front of two or three objectives.

    A plot that Optuna cannot draw for this study (for example if a parameter has a single value) is left out with a line
    in the log. If there are more than `MAX_PARAMETERS` parameters,
    the plots show the parameters that most trials have and that vary most.

    Args:
        folder: folder for the files.
        study: the study; without a completed trial nothing is drawn.
        objectives: names of the objectives in the order of the study's directions; several = one set of plots for each.

    Returns:
        The paths of the files.
    """
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return []
    # The Agg backend draws into files and needs no display.
    matplotlib.use("Agg")
    # Matplotlib logs a remark on texts that look like numbers, such as the choices 32 and 64, which are texts on purpose.
    logging.getLogger("matplotlib.category").setLevel(logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    shown = _shown_parameters(study)
    for index, objective in enumerate(objectives):
        arguments: dict[str, Any] = {}
        suffix = ""
        if len(objectives) > 1:
            arguments = {"target": _value_at(index), "target_name": objective}
            suffix = f"_{objective}"
        for name in PLOTS:
            chosen = arguments | ({"params": shown} if shown and name in BY_PARAMETER else {})
            written += _write(folder / f"{name}{suffix}", name, study, chosen)
    if len(objectives) in (2, 3):
        written += _write(folder / "pareto_front", "pareto_front", study, {"target_names": list(objectives)})
    return written


def _shown_parameters(study: optuna.Study) -> list[str] | None:
    """Return the parameters that plots with a panel for each show; None = all, for there are few.

    >>> study = optuna.create_study()
    >>> fields = {f"p{i}": optuna.distributions.IntDistribution(0, 9) for i in range(40)}
    >>> for values in ({f"p{i}": i % 9 for i in range(40)}, {f"p{i}": 9 for i in range(20)}):
    ...     study.add_trial(
    ...         optuna.create_trial(params=values, distributions={name: fields[name] for name in values}, value=0.0)
    ...     )
    >>> _shown_parameters(study) == [f"p{i}" for i in range(16)]
    True
    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    values: dict[str, list[str]] = {}
    for trial in trials:
        for name, value in trial.params.items():
            values.setdefault(name, []).append(str(value))
    if len(values) <= MAX_PARAMETERS:
        return None
    # The sort is stable: among equals the first ones are shown.
    by_use = sorted(values, key=lambda name: (-len(values[name]), -len(set(values[name]))))
    log.info("%d settings differ; the plots by setting show %d, those that most runs have", len(values), MAX_PARAMETERS)
    return by_use[:MAX_PARAMETERS]


def _value_at(index: int) -> Callable[[optuna.trial.FrozenTrial], float]:
    return lambda trial: trial.values[index]


def _write(stem: Path, name: str, study: optuna.Study, arguments: dict[str, Any]) -> list[Path]:
    html, png = stem.with_name(f"{stem.name}.html"), stem.with_name(f"{stem.name}.png")
    try:
        # Optuna sets a matplotlib style for the whole process; rc_context restores the old one.
        with warnings.catch_warnings(), matplotlib.rc_context(TYPE):
            # Optuna warns that its matplotlib plots are experimental, and about trials that lack a conditional parameter.
            warnings.simplefilter("ignore")
            interactive = getattr(optuna.visualization, f"plot_{name}")(study, **arguments)
            interactive.update_layout(
                template="plotly_white", colorway=COLOURS, font={"family": f"{TYPE['font.family']}, sans-serif"}
            )
            axes = getattr(optuna.visualization.matplotlib, f"plot_{name}")(study, **arguments)
        with atomic_path(html) as path:
            # Plotly's 5 MB of JavaScript are stored once beside the plots, so that they open without a network.
            path.write_text(interactive.to_html(include_plotlyjs="directory"), encoding="utf-8")
        _write_plotly_script(stem.parent)
        figure = _figure_of(axes)
        restyle(figure)
        if name == "slice":  # wide panels and slanted labels, or the names of choices would overlap
            figure.set_size_inches(max(6.0, 3.0 * len(figure.axes)), 5.0)
            for panel in figure.axes:
                panel.tick_params(axis="x", labelrotation=45)
                _spread(panel)
        with atomic_path(png) as path:
            figure.savefig(path, format="png", dpi=DPI, bbox_inches="tight")
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        log.info("no plot %s: %s", stem.name, error)
        return []
    finally:
        matplotlib.pyplot.close("all")
    return [html, png]


def _spread(panel: Any) -> None:
    """Give a panel a logarithmic axis where its values lie several orders apart, such as those of a learning rate."""
    values = [float(x) for points in panel.collections for x in np.asarray(points.get_offsets())[:, 0]]
    if values and min(values) > 0 and max(values) / min(values) >= LEAST_RATIO:
        panel.set_xscale("log")


def _figure_of(axes: Any) -> Any:
    """Return the figure that one axes, or an array of axes, belongs to."""
    return (axes.flat[0] if hasattr(axes, "flat") else axes).get_figure()


def _write_plotly_script(folder: Path) -> None:
    import plotly.offline

    path = folder / "plotly.min.js"
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(plotly.offline.get_plotlyjs(), encoding="utf-8")
