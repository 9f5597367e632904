"""Metrics of each dataset of a pool beside those of all of them together."""

from __future__ import annotations

from typing import Any

import numpy as np

from ehr_embed.data.pool import Pool
from ehr_embed.evaluation.metrics import binary_metrics
from ehr_embed.reports.transfer_metrics import RANKING
from ehr_embed.tasks.protocol import Outputs, Task


def by_dataset(task: Task, outputs: dict[str, Outputs], pool: Pool, *, n_bootstrap: int) -> dict[str, Any]:
    """Return the ranking measures of each dataset's samples in each split, with intervals.

    Args:
        task: after `setup`.
        outputs: the task's outputs (n, n_outputs) of each split.
        pool: the datasets.
        n_bootstrap: replicates of the intervals.

    Returns:
        Dataset -> split -> `n`, `n_positive` and, where both classes occur, each measure with value, low and high. Empty where the
        labels are not binary.
    """
    found: dict[str, Any] = {}
    for split, (labels, probabilities) in task.curves(outputs).items():
        ids = task.samples[split].subject_ids
        number = pool.of_subjects(ids)
        for name in pool.read:
            own = np.flatnonzero(number == pool.names.index(name))
            n, n_positive = len(own), int(labels[own].sum())
            entry: dict[str, Any] = {"n": n, "n_positive": n_positive}
            if 0 < n_positive < n:
                measured = binary_metrics(
                    labels[own],
                    probabilities[own],
                    threshold=0.5,
                    subject_ids=ids[own],
                    n_bootstrap=n_bootstrap,
                    split_name=f"{split} of {name}",
                )
                entry |= {measure: measured[measure] for measure in RANKING}
            found.setdefault(name, {})[split] = entry
    return found
