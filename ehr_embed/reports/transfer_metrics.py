"""Compare the metrics of a trained model on other data with its metrics on the data of its training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ehr_embed.evaluation.metric import Metric
from ehr_embed.evaluation.metrics import binary_metrics
from ehr_embed.run_folder.finish import read_metrics
from ehr_embed.run_folder.layout import FINISHED
from ehr_embed.tasks.protocol import Outputs, Task

RANKING = ("auroc", "auprc")
"""Measures of binary labels that no threshold changes."""


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


def over_all_splits(task: Task, outputs: dict[str, Outputs], *, n_bootstrap: int) -> dict[str, Any]:
    """Return the ranking measures, with intervals, over the samples of all splits together, and their number `n`.

    A model that is only evaluated learned from none of these labels, so that all of them judge it.

    Args:
        task: after `setup`.
        outputs: the task's outputs (n, n_outputs) of each split.
        n_bootstrap: replicates of the intervals.

    Returns:
        Measure -> value, low and high, beside `n`; empty where the labels are not binary.
    """
    curves = task.curves(outputs)
    if not curves:
        return {}
    labels, probabilities = (np.concatenate([part[i] for part in curves.values()]) for i in range(2))
    found = binary_metrics(
        labels,
        probabilities,
        threshold=0.5,
        subject_ids=np.concatenate([task.samples[split].subject_ids for split in curves]),
        n_bootstrap=n_bootstrap,
        split_name="all splits",
    )
    return {name: found[name] for name in RANKING} | {"n": len(labels)}
