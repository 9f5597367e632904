"""Build a table of a few records with their predictions; it contains patient text, so trackers keep it on request only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ehr_embed.data.store import EventStore
from ehr_embed.tasks.protocol import Outputs, Task

MAX_EXAMPLES = 20
MAX_EVENTS = 20


def examples_of(task: Task, store: EventStore, outputs: Outputs, *, split: str = "held_out") -> pd.DataFrame:
    """Return the first samples of a split, at most `MAX_EXAMPLES`, with their texts, labels and predictions.

    Args:
        task: the task, after its `setup`.
        store: the event store.
        outputs: (n, n_outputs) outputs of the model for the n samples of the split.
        split: name of the split.

    Returns:
        One row per sample: subject_id, prediction_time, label, events (texts of the last `MAX_EVENTS` visible events, oldest
        first), and probability_<class> for each class if the task has classes, or predicted_<label set> for numbers.
    """
    samples, texts, events = task.samples[split], store.vocabulary.texts, store.split(split)
    rows = range(min(len(samples), MAX_EXAMPLES))
    are_numbers = samples.labels.ndim == 1 and np.issubdtype(samples.labels.dtype, np.floating)
    seen = [
        np.concatenate(
            [
                events.token_ids[samples.static_start[row] : samples.static_stop[row]],
                events.token_ids[samples.start[row] : samples.stop[row]],
            ]
        )[-MAX_EVENTS:]
        for row in rows
    ]
    table = pd.DataFrame(
        {
            "subject_id": samples.subject_ids[: len(rows)],
            "prediction_time": samples.prediction_times[: len(rows)].astype("datetime64[us]").astype(str),
            "label": [_label(samples.labels[row], task.class_names) for row in rows],
            "events": ["; ".join(texts[token] for token in tokens) for tokens in seen],
        }
    )
    for column, name in enumerate(task.class_names):
        table[f"{'predicted' if are_numbers else 'probability'}_{name}"] = outputs[: len(rows), column]
    return table


def _label(label: Any, class_names: list[str]) -> str:
    """Return the name of a class, or a number or several labels as text."""
    is_class = class_names and np.ndim(label) == 0 and np.issubdtype(np.asarray(label).dtype, np.integer)
    return class_names[int(label)] if is_class else str(label)
