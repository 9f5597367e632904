"""Draw Optuna's plots of a study, each as an interactive HTML file and as a PNG image."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import optuna
from optuna.trial import TrialState

from ehr_embed.core.files import atomic_path
from ehr_embed.evaluation.plot_style import COLOURS, DPI, TYPE, restyle

log = logging.getLogger(__name__)
PLOTS = ("optimization_history", "param_importances", "parallel_coordinate", "slice")


def write_study_plots(folder: Path, study: optuna.Study, objectives: Sequence[str]) -> list[Path]:
    """Write `<plot>.html` and `<plot>.png` for each plot of `PLOTS`, and the Pareto front of two or three objectives.

    A plot that Optuna cannot draw for this study (for example if a parameter has a single value) is left out with a line
    in the log.

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
    for index, objective in enumerate(objectives):
        arguments: dict[str, Any] = {}
        suffix = ""
        if len(objectives) > 1:
            arguments = {"target": _value_at(index), "target_name": objective}
            suffix = f"_{objective}"
        for name in PLOTS:
            written += _write(folder / f"{name}{suffix}", name, study, arguments)
    if len(objectives) in (2, 3):
        written += _write(folder / "pareto_front", "pareto_front", study, {"target_names": list(objectives)})
    return written


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
        with atomic_path(png) as path:
            figure.savefig(path, format="png", dpi=DPI, bbox_inches="tight")
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        log.info("no plot %s: %s", stem.name, error)
        return []
    finally:
        matplotlib.pyplot.close("all")
    return [html, png]


def _figure_of(axes: Any) -> Any:
    """Return the figure that one axes, or an array of axes, belongs to."""
    return (axes.flat[0] if hasattr(axes, "flat") else axes).get_figure()


def _write_plotly_script(folder: Path) -> None:
    import plotly.offline

    path = folder / "plotly.min.js"
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(plotly.offline.get_plotlyjs(), encoding="utf-8")
