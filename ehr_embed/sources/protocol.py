"""What a source of events must offer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import polars as pl

SPLITS = ("train", "tuning", "held_out")
"""The split names of MEDS 0.4."""


class Source(Protocol):
    """Where events come from: one frame per shard, so that memory is bounded by one shard."""

    writes: bool
    """Whether opening the source writes files, as an import does. A class that says False may be opened from the configuration in
    a run's folder; a class or function that says nothing counts as one that writes."""

    @property
    def name(self) -> str:
        """Short name, used in file names and tags."""
        ...

    @property
    def labels_dir(self) -> Path:
        """Folder with one sub-folder per label set."""
        ...

    @property
    def shards(self) -> Sequence[Path]:
        """The shard files, in reading order."""
        ...

    def read(self, shard: Path) -> pl.DataFrame:
        """Events of one shard, validated: subject_id Int64, time Datetime[us] (null = static), code String,
        numeric_value Float32, split String. A subject is contiguous and its events are ordered by time."""
        ...

    def code_metadata(self) -> pl.DataFrame:
        """code String, description String or null, parent_codes List[String] or null; rows may repeat a code."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able description that changes when the data change."""
        ...
