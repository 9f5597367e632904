"""Read what a finished run has left: metrics, history, predictions as frames, and figures."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
from matplotlib.figure import Figure

from ehr_embed.core.errors import UserError
from ehr_embed.core.manifest import checked
from ehr_embed.evaluation.decision_curve import decision_table
from ehr_embed.evaluation.plots import (
    Curves,
    draw_calibration,
    draw_decision,
    draw_loss,
    draw_precision_recall,
    draw_roc,
)
from ehr_embed.evaluation.predictions import read_predictions
from ehr_embed.run_folder.finish import read_metrics
from ehr_embed.run_folder.layout import FINISHED, HISTORY, predictions_file
from ehr_embed.sources.meds_files import readable
from ehr_embed.sources.protocol import EVALUATED


class FinishedRun:
    """The results of a run in its folder; `ehr_embed.train` returns one.

    Args:
        folder: the run's folder.

    Raises:
        UserError: there is no finished run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not (self.folder / FINISHED).is_file():
            raise UserError(
                f"{self.folder}: no finished run here (no {FINISHED}); with check=true nothing is trained. "
                "Type: python train.py run_dir=RUN_DIR"
            )

    def __repr__(self) -> str:
        """Return the folder and the monitored metric."""
        name = self.metrics["monitor"]["name"]
        values = (f"{split} {self.metrics[split][name]['value']:.4g}" for split in reversed(EVALUATED))
        return f"FinishedRun({str(self.folder)!r}, {name}: {', '.join(values)})"

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Return what metrics.json holds: `metrics["held_out"]["auroc"]["value"]`, and `low` and `high` beside it."""
        return read_metrics(self.folder)

    @cached_property
    def history(self) -> pl.DataFrame:
        """Return the metrics per epoch, one row each; empty for a run that trained nothing."""
        path = self.folder / HISTORY
        return (
            pl.read_ndjson(path.read_bytes(), infer_schema_length=None)
            if path.is_file() and path.stat().st_size
            else pl.DataFrame()
        )

    def predictions(self, split: str = "held_out") -> pl.DataFrame:
        """Return the run's predictions on tuning or held_out, one row per prediction time."""
        path = predictions_file(self.folder, split)
        with readable(path):
            return pl.read_parquet(checked(path), glob=False)

    def plot_loss(self) -> Figure:
        """Return the loss by epoch, and the metrics on tuning."""
        return draw_loss(self.history.to_dicts(), chosen=self.metrics.get("train", {}).get("best_epoch"))

    def plot_roc(self) -> Figure:
        """Return the ROC curves of tuning and held_out, of a task with boolean labels."""
        return draw_roc(self._curves())

    def plot_precision_recall(self) -> Figure:
        """Return precision against recall, of a task with boolean labels."""
        return draw_precision_recall(self._curves())

    def plot_calibration(self) -> Figure:
        """Return the reliability diagram, of a task with boolean labels."""
        return draw_calibration(self._curves())

    def plot_decision(self) -> Figure:
        """Return the decision curves, of a task with boolean labels."""
        return draw_decision(decision_table(self._curves()))

    def _curves(self) -> Curves:
        found = {split: read_predictions(predictions_file(self.folder, split)) for split in EVALUATED}
        if any(predictions.labels.shape[1] != 1 for predictions in found.values()):
            raise UserError(f"{self.folder}: these curves are of boolean labels, and this task has several classes.")
        return {split: (of.labels[:, 0], of.probabilities[:, 0]) for split, of in found.items()}
