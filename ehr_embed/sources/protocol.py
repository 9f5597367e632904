"""Define the protocol of a source of events, and the names of the splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import polars as pl
from meds import birth_code, death_code

SPLITS = ("train", "tuning", "held_out")
"""The split names of MEDS 0.4."""
EVALUATED = SPLITS[1:]
"""The splits that a run is evaluated on."""
SHARED = (birth_code, death_code)
"""Codes that MEDS itself gives a meaning, the same in all datasets: a record without its birth has no age, whatever its codes."""


class Source(Protocol):
    """Source of the events of a dataset; it yields one frame per shard, so that memory is bounded by one shard."""

    writes: bool
    """True if opening the source writes files, as an import does. A class that says False may be opened from the
    configuration in a run's folder; a class or function that says nothing counts as one that writes."""

    @property
    def name(self) -> str:
        """Return a short name for file names and tags."""
        ...

    @property
    def labels_dir(self) -> Path:
        """Return the folder with one sub-folder per label set."""
        ...

    @property
    def shards(self) -> Sequence[Path]:
        """Return the shard files, in the order in which they are read."""
        ...

    def read(self, shard: Path) -> pl.DataFrame:
        """Return the validated events of one shard.

        The columns are subject_id Int64, time Datetime[us] (null = static), code String, numeric_value Float32, split
        String. The events of a subject are contiguous and ordered by time, static ones first.
        """
        ...

    def code_metadata(self) -> pl.DataFrame:
        """Return code String, description String or null, parent_codes List[String] or null; rows may repeat a code."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return a JSON-able description that changes when the data change."""
        ...
