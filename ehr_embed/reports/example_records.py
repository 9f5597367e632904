"""A few records with what was predicted for them: patient text, for those who ask a tracker to keep it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ehr_embed.data.store import EventStore
from ehr_embed.tasks.protocol import Outputs, Task

MAX_EXAMPLES = 20
MAX_EVENTS = 20


def examples_of(task: Task, store: EventStore, outputs: Outputs, *, split: str = "held_out") -> pd.DataFrame:
    """The first samples of a split, at most `MAX_EXAMPLES`.

    Args:
        task: after `setup`.
        store: the events.
        outputs: (n, n_outputs) of the split's samples.
        split: its name.

    Returns:
        subject_id, prediction_time, label, events (texts of the last `MAX_EVENTS` visible ones, oldest first), and
        probability_<class> for each class where the task has classes.
    """
    samples, texts, events = task.samples[split], store.vocabulary.texts, store.split(split)
    rows = range(min(len(samples), MAX_EXAMPLES))
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
        table[f"probability_{name}"] = outputs[: len(rows), column]
    return table


def _label(label: Any, class_names: list[str]) -> str:
    """The class's name of a class; several labels as they are."""
    return class_names[int(label)] if class_names and np.ndim(label) == 0 else str(label)
