"""Plots are drawn for ordinary and awkward input, without pyplot, and carry the numbers they promise."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import roc_auc_score

from ehr_embed.core.errors import UserError
from ehr_embed.evaluation import plots


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures saved during a test."""
    saved: list[Figure] = []
    save = plots._save

    def keep(figure: Figure, path: Path) -> None:
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return saved


def sample(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.random(n)
    return (rng.random(n) < p).astype(int), p


def legend_texts(figure: Figure) -> str:
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    return "\n".join(text.get_text() for legend in legends if legend is not None for text in legend.get_texts())


@pytest.fixture
def quick_plots() -> None:
    """The pictures themselves are tested here."""


@pytest.mark.parametrize("draw", [plots.plot_roc, plots.plot_precision_recall, plots.plot_calibration])
def test_curves(tmp_path: Path, figures: list[Figure], draw: Callable[..., None]) -> None:
    curves = {"tuning": sample(5000, 0), "held_out": sample(40, 1)}
    draw(tmp_path / "plot.png", curves)
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG"
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]
    text = legend_texts(figures[0])
    assert "tuning" in text
    assert "held out" in text
    if draw is plots.plot_precision_recall:
        assert f"prevalence {curves['tuning'][0].mean():.3f}" in text
    else:
        assert f"AUROC {roc_auc_score(*curves['held_out']):.3f}" in text
    with pytest.raises(UserError, match=r"'held_out'.*AUROC is undefined"):
        draw(tmp_path / "other.png", {"held_out": ([1, 1], [0.1, 0.2])})
    assert not (tmp_path / "other.png").exists()


def test_loss_marks_the_best_epoch_and_skips_gaps(tmp_path: Path, figures: list[Figure]) -> None:
    history: list[dict[str, Any]] = [
        {"epoch": 1, "train/loss": 0.9, "tuning/loss": 0.8, "tuning/f1": 0.1},
        {"epoch": 2, "train/loss": 0.7, "tuning/loss": 0.6, "tuning/f1": None, "note": "x"},
        {"epoch": 3, "train/loss": 0.5, "tuning/loss": 0.7, "tuning/f1": 0.4, "tuning/auroc": float("nan")},
    ]
    plots.plot_loss(tmp_path / "loss.png", history)
    assert len(figures[0].axes) == 2
    assert "tuning, lowest 0.6 at epoch 2" in legend_texts(figures[0])
    assert "F1" in legend_texts(figures[0])
    assert "AUROC" not in legend_texts(figures[0])
    plots.plot_loss(tmp_path / "loss.png", [{"epoch": 1, "train/loss": 0.5}])
    assert len(figures[1].axes) == 1
    plots.plot_loss(tmp_path / "loss.png", [])


def test_pyplot_is_never_imported() -> None:
    """pyplot keeps global figures and may look for a display."""
    code = "import sys, ehr_embed.evaluation.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
