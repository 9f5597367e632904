"""Prompts for generation from the planted dataset."""

from __future__ import annotations

import numpy as np

from ehr_embed.data.batches import BatchDataset
from ehr_embed.data.store import encode_split
from ehr_embed.inference.trained_run import samples_to_predict
from ehr_embed.sources.meds import MedsSource


def prompts(planted, split: str = "held_out", max_length: int = 12):
    store, root = planted
    events = encode_split(MedsSource(root=str(root)), store.vocabulary, split)
    samples = samples_to_predict(events, None, root / "labels", max_length=max_length)
    return BatchDataset(events, samples)[np.arange(len(samples))], samples
