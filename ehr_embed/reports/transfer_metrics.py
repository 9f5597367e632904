"""Compare the metrics of a trained model on other data with its metrics on the data of its training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ehr_embed.evaluation.metric import Metric
from ehr_embed.run_folder.finish import read_metrics
from ehr_embed.run_folder.layout import FINISHED


def kept(init_from: str | Path, here: dict[str, Any], metrics: Iterable[Metric]) -> dict[str, dict[str, float]]:
    """Return, per metric that ranks, `before` (held_out of the run that trained the model), `here`, and their ratio `kept`.

    Args:
        init_from: folder of the run that trained the model, or a checkpoint in it.
        here: metrics on held_out of the present data.
        metrics: those that the task declares.

    Returns:
        Name of the metric -> the three numbers; empty if that run has no metrics.json, or none of these metrics is in it.
    """
    ranking = [metric.name for metric in metrics if metric.is_ranking]
    folder = Path(init_from).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    there = read_metrics(folder).get("held_out", {}) if (folder / FINISHED).is_file() else {}
    pairs = {name: (there[name]["value"], here[name]["value"]) for name in ranking if name in there and name in here}
    return {
        name: {"before": before, "here": now, "kept": now / before} for name, (before, now) in pairs.items() if before
    }
