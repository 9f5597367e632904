"""A few records with what was predicted for them: patient text, for those who ask a tracker to keep it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ehr_embed.store import EventStore
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
    first_n = np.maximum(samples.start, samples.stop - MAX_EVENTS)
    seen = [events.token_ids[first_n[row] : samples.stop[row]] for row in rows]
    table = pd.DataFrame(
        {
            "subject_id": samples.subject_ids[: len(rows)],
            "prediction_time": pd.to_datetime(samples.prediction_times[: len(rows)], unit="us").astype(str),
            "label": [str(samples.labels[row]) for row in rows],
            "events": ["; ".join(texts[token] for token in tokens) for tokens in seen],
        }
    )
    for column, name in enumerate(task.class_names):
        table[f"probability_{name}"] = outputs[: len(rows), column]
    return table
