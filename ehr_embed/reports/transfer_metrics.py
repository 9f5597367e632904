"""What a trained model keeps of its metrics on other data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ehr_embed.run_folder.finish import read_metrics
from ehr_embed.run_folder.layout import FINISHED

MEASURES = ("auroc", "auprc")
"""Ranking measures alone: thresholds are chosen anew on the other data's tuning split."""


def kept(init_from: str | Path, here: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each ranking measure: `before`, on held_out in the run the model comes from; `here`; and `kept`, their ratio.

    Args:
        init_from: the run's folder, or a checkpoint in it.
        here: metrics of held_out on these data.

    Returns:
        Empty where that run's metrics.json is not there or has none of the measures.
    """
    folder = Path(init_from).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    there = read_metrics(folder).get("held_out", {}) if (folder / FINISHED).is_file() else {}
    pairs = {name: (there[name]["value"], here[name]["value"]) for name in MEASURES if name in there and name in here}
    return {
        name: {"before": before, "here": now, "kept": now / before} for name, (before, now) in pairs.items() if before
    }
