"""One palette, one type and one frame for every plot: Okabe and Ito's colours, which people without red-green vision can tell
apart, each with a dash and a marker of its own, so that curves stay apart in a black-and-white print too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

Given = ParamSpec("Given")
Drawn = TypeVar("Drawn")
Place = Literal["best", "lower right"]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#7A5C00")
"""Okabe and Ito 2008, "Color Universal Design"; a dark ochre is in the place of their yellow, which white paper swallows."""
DASHES: tuple[Any, ...] = (
    "-", (0, (6, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (8, 2, 1, 2, 1, 2)), (0, (2, 3)), (0, (10, 3)),
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SPLITS: dict[str, dict[str, Any]] = {
    "train": {"color": "#0072B2", "linestyle": (0, (1, 1.5)), "marker": "^"},
    "tuning": {"color": "#E69F00", "linestyle": (0, (6, 2)), "marker": "s"},
    "held_out": {"color": "#009E73", "linestyle": "-", "marker": "o"},
}
"""A split looks the same in every plot."""
BEFORE = ", before calibration"
"""End of the name of a curve of probabilities as the model gave them."""
RAISES, LOWERS = "#D55E00", "#0072B2"
"""Colours of what raises and what lowers a prediction."""
GRID, CHANCE, ZERO = "#EBEBEB", "#8C8C8C", "#666666"
LEGEND_SIZE, DPI = 9, 150
TYPE: Any = {"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11.5, "axes.labelsize": 10}
"""matplotlib's own font, which every installation has."""
OTHERS = {
    "#1f77b4": COLOURS[0], "#ff7f0e": COLOURS[1], "#2ca02c": COLOURS[2], "#d62728": COLOURS[1], "#9467bd": COLOURS[3],
    "#8c564b": COLOURS[7], "#e377c2": COLOURS[3], "#7f7f7f": "#7F7F7F", "#bcbd22": COLOURS[7], "#17becf": COLOURS[5],
    "#e24a33": COLOURS[1], "#348abd": COLOURS[0], "#0000ff": COLOURS[0], "#ff0000": COLOURS[1],
}  # fmt: skip
"""Colours that other libraries draw with -> ours."""


def in_style(draw: Callable[Given, Drawn]) -> Callable[Given, Drawn]:
    """Decorate a function that draws, so that it draws in our type, whatever the user's own matplotlibrc says."""

    @functools.wraps(draw)
    def styled(*args: Given.args, **kwargs: Given.kwargs) -> Drawn:
        with matplotlib.rc_context(TYPE):
            return draw(*args, **kwargs)

    return styled


def curve_style(index: int) -> dict[str, Any]:
    """Return colour, dash and marker of the curve of a number; 64 curves look different, the first eight in each of the three.

    >>> len({(s["color"], str(s["linestyle"])) for s in map(curve_style, range(64))})
    64
    >>> [len({str(curve_style(i)[key]) for i in range(8)}) for key in ("color", "linestyle", "marker")]
    [8, 8, 8]
    """
    row, column = divmod(index, len(COLOURS))
    return {
        "color": COLOURS[column],
        "linestyle": DASHES[(column + row) % len(DASHES)],
        "marker": MARKERS[(column + row) % len(MARKERS)],
    }


def split_style(name: str, index: int) -> dict[str, Any]:
    """Return the style of a split, or of another curve by its number; what was before calibration is dotted and hollow.

    >>> [split_style(name, 0)["color"] for name in ("held_out", "held_out, before calibration")]
    ['#009E73', '#009E73']
    """
    found = dict(SPLITS.get(name.removesuffix(BEFORE)) or curve_style(index))
    return found | {"linestyle": (0, (1, 1)), "marker": "x"} if name.endswith(BEFORE) else found


def finish(axes: Axes, title: str, x_label: str, y_label: str, *, place: Place | None = "best") -> None:
    """Give axes their titles, frame, grid and, where something has a label, a legend; `place=None` draws no legend."""
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    frame(axes)
    if place is not None and axes.get_legend_handles_labels()[0]:
        axes.legend(loc=place, frameon=True, framealpha=0.85, edgecolor="none", fontsize=LEGEND_SIZE, handlelength=3)


def frame(axes: Axes, *, grid: Literal["both", "x", "y"] = "both") -> None:
    """Give axes a light grid behind what is drawn, and no frame at the top and the right."""
    axes.grid(True, axis=grid, color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def restyle(figure: Figure) -> None:
    """Give a figure that another library drew our colours on white, our grid and our type."""
    figure.set_facecolor("white")
    for axes in figure.axes:
        axes.set_facecolor("white")
        axes.title.set_fontsize(TYPE["axes.titlesize"])
        if axes.get_label() != "<colorbar>" and axes.name != "3d":
            axes.grid(True, color=GRID, lw=0.8)
            axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_color(CHANCE)
    for artist in figure.findobj():
        mapped = getattr(artist, "get_array", None)
        if mapped is not None and mapped() is not None:  # its colours tell values
            continue
        for part in ("color", "facecolor", "edgecolor", "markerfacecolor"):
            get, put = getattr(artist, f"get_{part}", None), getattr(artist, f"set_{part}", None)
            if get is None or put is None:
                continue
            value = get()
            if (colour := _single(value)) in OTHERS:
                put(to_rgba(OTHERS[colour], to_rgba(value if isinstance(value, str) else _first(value))[3]))


def _first(value: Any) -> Any:
    if isinstance(value, str):
        return value
    return value[0] if hasattr(value, "__len__") and len(value) and hasattr(value[0], "__len__") else value


def _single(value: Any) -> str:
    """Return a colour as hexadecimal text; empty for what is none, or several different ones."""
    try:
        if hasattr(value, "__len__") and not isinstance(value, str) and len(value) > 1 and hasattr(value[0], "__len__"):
            return ""
        return to_hex(_first(value))
    except (ValueError, TypeError, IndexError):
        return ""
