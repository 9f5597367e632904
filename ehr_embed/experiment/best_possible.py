"""Say what the true risks of a synthetic cohort reach on a run's samples, beside what its model reaches."""

from __future__ import annotations

from collections.abc import Container

from ehr_embed.sources.demo import bayes_auroc
from ehr_embed.sources.demo_times import bayes_concordance
from ehr_embed.sources.protocol import EVALUATED, Source
from ehr_embed.tasks.protocol import Task

KNOWN = {"auroc": bayes_auroc, "concordance": bayes_concordance}
"""Functions that compare samples with those that were drawn with the risks, by the metric that they return."""


def best_possible(metrics: Container[str], source: Source, task: Task) -> dict[str, dict[str, float]]:
    """Return the best possible values of the metrics of which they are known, as `bayes_METRIC`, per evaluated split.

    Args:
        metrics: names of the metrics that the run has.
        source: source of the data.
        task: after `setup`.

    Returns:
        Nothing for a metric where the true risk of one sample is not known.
    """
    samples = {split: task.samples[split] for split in EVALUATED}
    found: dict[str, dict[str, float]] = {}
    for name in (name for name in KNOWN if name in metrics):
        best = {
            split: KNOWN[name](source.labels_dir.parent, asked.meds_keys, asked.labels)
            for split, asked in samples.items()
        }
        known = {split: value for split, value in best.items() if value is not None}
        if len(known) == len(best):
            found[f"bayes_{name}"] = known
    return found
