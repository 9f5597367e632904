"""Read the records that `python -m benchmarks.peers` wrote for a peer; it needs numpy and torch alone.

A folder holds `records.npz` (`token_ids` of all records one after the other, `offsets`, `labels`, `order` of an epoch's batches
and `batch_offsets`, `table` of the tokens' vectors) and `sizes.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Records:
    """The records of a folder, in the batches of one epoch.

    Attributes:
        sizes: width, heads, layers, context, vocabulary, share dropped, learning rate, precision.
        table: (V, E) float32, the vector of each token.
        labels: (n,) int64.
    """

    def __init__(self, folder: str) -> None:
        held = np.load(Path(folder) / "records.npz")
        self.sizes: dict[str, Any] = json.loads((Path(folder) / "sizes.json").read_text())
        self.token_ids, self.offsets, self.labels = held["token_ids"], held["offsets"], held["labels"]
        self.table = torch.from_numpy(held["table"])
        self.batches = [held["order"][start:stop] for start, stop in pairwise(held["batch_offsets"])]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return the tokens of a record, oldest first, and its label."""
        tokens = self.token_ids[self.offsets[number] : self.offsets[number + 1]]
        return {"token_ids": torch.from_numpy(tokens.astype(np.int64)), "label": int(self.labels[number])}

    @property
    def n_events(self) -> int:
        """Return the number of events of all batches of the epoch."""
        lengths = np.diff(self.offsets)
        return int(sum(lengths[batch].sum() for batch in self.batches))


def pad(records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return `token_ids` (B, T), 0 = padding after the end, `mask` (B, T), 1 = event, and `labels` (B,)."""
    ids = [record["token_ids"] for record in records]
    return {
        "token_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": torch.tensor([record["label"] for record in records]),
    }


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Return wall and CPU seconds of `work`."""
    began, cpu_began = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - cpu_began


def say(took: tuple[float, float], n_events: int, **facts: Any) -> None:
    """Print the line that `environments.run` reads."""
    print(json.dumps({"seconds": took[0], "cpu_seconds": took[1], "n_events": n_events, **facts}))
