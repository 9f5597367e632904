"""Draw attributions: along the timeline of one subject as PNG and HTML, and averaged per text over many samples."""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import plotly.graph_objects as go
import polars as pl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ehr_embed.core.files import atomic_path
from ehr_embed.evaluation.plot_style import LOWERS, RAISES, TYPE, ZERO, frame, in_style

N_NAMED, N_TEXTS, TEXT_WIDTH = 15, 20, 60
UNITS = ((3.0, 24.0, "hours"), (3 * 365.25, 1.0, "days"), (float("inf"), 1 / 365.25, "years"))
"""Units of the time axis: longest span in days for which the unit is used, units per day, and name."""


@dataclass(frozen=True)
class Timeline:
    """Data of the plots of one prediction.

    Attributes:
        events: one row per event with text, days_before (null = static), numeric_value and attribution.
        subject: id of the subject.
        prediction_time: time of the prediction.
        target: class whose log-odds are explained.
        score: log-odds of the class.
        baseline_score: log-odds of the class for a record of average events; NaN = the method has no baseline.
    """

    events: pl.DataFrame
    subject: int
    prediction_time: datetime
    target: str
    score: float
    baseline_score: float

    @property
    def title(self) -> str:
        """Return the title: subject, time, probability and log-odds of the class."""
        p = 1 / (1 + np.exp(-self.score))
        baseline = f"of a record of average events {self.baseline_score:+.2f}"
        if np.isnan(self.baseline_score):
            baseline = "and by how much a code's events change them"
        return (
            f"Subject {self.subject} at {self.prediction_time:%Y-%m-%d %H:%M}: probability of {self.target} {p:.3f}\n"
            f"log-odds {self.score:+.2f}, {baseline}"
        )

    @property
    def unit(self) -> tuple[float, str]:
        """Return the units per day and the name of the unit that suits the span of the record."""
        longest = self.events["days_before"].max()
        span = float(longest) if isinstance(longest, int | float) else 0.0
        return next((per_day, name) for limit, per_day, name in UNITS if span <= limit)

    def positions(self) -> tuple[np.ndarray, float | None]:
        """Return the position of each event on the time axis, in units before the prediction (negative).

        The second value is the position of static events, left of all others; None if there are none.
        """
        per_day, _ = self.unit
        days = self.events["days_before"].to_numpy()
        x = -days * per_day
        is_static = np.isnan(x)
        if not is_static.any():
            return x, None
        low = float(np.nanmin(x)) if not is_static.all() else 0.0
        left = low - 0.08 * max(-low, 1.0)
        return np.where(is_static, left, x), left


def event_label(text: str, value: float | None, width: int = TEXT_WIDTH) -> str:
    """Return a text with its numeric value, shortened to `width` characters.

    >>> event_label("Creatinine, mg/dL", 1.5), event_label("word " * 30, None, 12)
    ('Creatinine, mg/dL = 1.5', 'word word …')
    """
    number = "" if value is None else f" = {value:.4g}"
    return textwrap.shorten(text, max(width - len(number), 10), placeholder=" …") + number


def label_groups(x: np.ndarray, y: np.ndarray, *, near_x: float = 0.02, near_y: float = 0.08) -> list[list[int]]:
    """Group points whose labels would overlap: each point joins the first group whose first point is near.

    Args:
        x, y: (n,) positions as shares of the axes.
        near_x, near_y: distances below which labels overlap.

    Returns:
        Indices of the points in each group, in the order of the points.

    >>> label_groups(np.array([0.0, 0.5, 0.01]), np.array([0.9, 0.9, 0.85]))
    [[0, 2], [1]]
    """
    groups: list[list[int]] = []
    for point in range(len(x)):
        near = (g for g in groups if abs(x[g[0]] - x[point]) < near_x and abs(y[g[0]] - y[point]) < near_y)
        if group := next(near, None):
            group.append(point)
        else:
            groups.append([point])
    return groups


@in_style
def plot_timeline(path: str | os.PathLike[str], timeline: Timeline) -> None:
    """Draw every event as a stem at its time, and below the events with the largest attributions under the same numbers."""
    events = timeline.events
    y = events["attribution"].to_numpy()
    x, static_at = timeline.positions()
    per_day, unit = timeline.unit
    colours = np.where(y >= 0, RAISES, LOWERS)
    top = np.argsort(-np.abs(y), kind="stable")[:N_NAMED]
    figure = Figure(figsize=(11, 4.4 + 0.3 * len(top)), layout="constrained")
    # Two subfigures, so that the long names in the lower one do not narrow the timeline.
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.8, 0.3 * len(top) + 0.6])[:, 0]
    above, below = upper.subplots(), lower.subplots()
    above.vlines(x, 0, y, colors=colours, lw=1.4)
    above.scatter(x, y, c=colours, s=12, zorder=3)
    above.axhline(0, color=ZERO, lw=0.8)
    room = max(float(np.abs(y).max()), 1e-9)
    width = max(float(np.ptp(x)), 1e-9)
    for numbers in label_groups(x[top] / width, y[top] / room):
        first = top[numbers[0]]
        above.annotate(
            ", ".join(str(number + 1) for number in numbers),
            (x[first], y[first]),
            (5, 0),  # to the right of the stem, on which a smaller event at the same time may lie
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=8,
        )
    above.set_ylim(min(0, float(y.min())) - 0.15 * room, max(0, float(y.max())) + 0.15 * room)
    if static_at is not None:
        half = 0.02 * max(float(np.ptp(x)), 1.0)
        above.axvspan(static_at - half, static_at + half, color="0.94", zorder=0)
        above.text(static_at, 0.99, "static", transform=above.get_xaxis_transform(), ha="center", va="top", fontsize=8)
    above.set(title=timeline.title, xlabel=f"{unit} before the prediction", ylabel="change of the log-odds")
    above.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}" if value <= 0 else "")
    shown = top[::-1]
    below.barh(np.arange(len(shown)), y[shown], color=colours[shown], height=0.7)
    below.axvline(0, color=ZERO, lw=0.8)
    days = events["days_before"].to_list()
    names = [
        f"{len(top) - place}. {event_label(events['text'][int(i)], events['numeric_value'][int(i)])}, "
        + ("static" if days[i] is None else f"{days[i] * per_day:.3g} {unit} before")
        for place, i in enumerate(shown)
    ]
    below.set_yticks(np.arange(len(shown)), names, fontsize=9)
    below.set_xlabel("change of the log-odds (orange raises, blue lowers)")
    for axes in (above, below):
        frame(axes)
    _save(figure, path)


def write_timeline_html(path: str | os.PathLike[str], timeline: Timeline) -> None:
    """Write the timeline as one HTML file that opens without a network and describes each event under the pointer."""
    events = timeline.events
    x, static_at = timeline.positions()
    per_day, unit = timeline.unit
    figure = go.Figure()
    y = events["attribution"].to_numpy()
    for name, colour, chosen in (("raises", RAISES, y >= 0), ("lowers", LOWERS, y < 0)):
        rows = np.flatnonzero(chosen)
        if not len(rows):
            continue
        stems_x = np.column_stack([x[rows], x[rows], np.full(len(rows), np.nan)]).ravel()
        stems_y = np.column_stack([np.zeros(len(rows)), y[rows], np.full(len(rows), np.nan)]).ravel()
        part = events[rows.tolist()]
        about = [
            f"<b>{_escaped(event_label(text, value, 200))}</b><br>"
            + ("static" if days is None else f"{days * per_day:.4g} {unit} before")
            + f"<br>{attribution:+.4f}"
            for text, value, days, attribution in part.select(
                "text", "numeric_value", "days_before", "attribution"
            ).iter_rows()
        ]
        figure.add_scatter(
            x=stems_x, y=stems_y, mode="lines", line={"color": colour, "width": 1.5}, hoverinfo="skip", showlegend=False
        )
        figure.add_scatter(
            x=x[rows], y=y[rows], mode="markers", marker={"color": colour, "size": 7}, name=name,
            hovertext=about, hoverinfo="text",
        )  # fmt: skip
    if static_at is not None:
        figure.add_annotation(x=static_at, y=1, yref="paper", text="static", showarrow=False)
    figure.update_layout(
        title={"text": _escaped(timeline.title).replace("\n", "<br>")},
        xaxis_title=f"{unit} before the prediction (negative)",
        yaxis_title="change of the log-odds",
        template="plotly_white",
        font={"family": f"{TYPE['font.family']}, sans-serif"},
        hovermode="closest",
    )
    with atomic_path(path) as temporary:
        temporary.write_text(figure.to_html(include_plotlyjs=True), encoding="utf-8")


@in_style
def plot_texts(path: str | os.PathLike[str], texts: pl.DataFrame, *, target: str, n_samples: int) -> None:
    """Draw the texts that raise and that lower the log-odds most on average over the samples in which they occur.

    Args:
        path: path of the PNG file.
        texts: one row per text with text, n_samples and mean_attribution.
        target: class whose log-odds are explained.
        n_samples: number of samples that were explained.
    """
    raising = texts.filter(pl.col("mean_attribution") > 0).sort("mean_attribution", descending=True).head(N_TEXTS)
    lowering = texts.filter(pl.col("mean_attribution") < 0).sort("mean_attribution", descending=True).tail(N_TEXTS)
    shown = pl.concat([raising, lowering]).reverse()
    y = shown["mean_attribution"].to_numpy()
    figure = Figure(figsize=(11, 1.8 + 0.27 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.barh(np.arange(len(shown)), y, color=np.where(y >= 0, RAISES, LOWERS), height=0.7)
    names = [f"{event_label(text, None)} ({n})" for text, n in shown.select("text", "n_samples").iter_rows()]
    axes.set_yticks(np.arange(len(shown)), names, fontsize=9)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.axvline(0, color=ZERO, lw=0.8)
    axes.set_title(f"What raises (orange) and lowers (blue) the log-odds of {target}; {n_samples} samples")
    axes.set_xlabel("mean change of the log-odds over the samples that have the text (their number in brackets)")
    frame(axes, grid="x")
    _save(figure, path)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
