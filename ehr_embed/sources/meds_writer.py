"""Write MEDS 0.4 datasets with the exact schemas of the `meds` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
from meds import CodeMetadataSchema, DataSchema, LabelSchema, SubjectSplitSchema

from ehr_embed import __version__
from ehr_embed.core.files import write_json


class MedsWriter:
    """Write a dataset shard by shard into a folder; `finish` writes the files that depend on all shards.

    Args:
        folder: an empty or absent folder.
        name: the dataset's name in dataset.json.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.subjects: list[pl.DataFrame] = []
        self.n_shards: dict[str, int] = {}

    def add_shard(self, split: str, events: pl.DataFrame) -> None:
        """Write subject_id, time, code, numeric_value as the split's next shard; a frame without rows is left out."""
        if not len(events):
            return
        number = self.n_shards.get(split, 0)
        self.n_shards[split] = number + 1
        columns = events.select("subject_id", "time", "code", "numeric_value")
        write_parquet(self.folder / "data" / split / f"{number}.parquet", columns, DataSchema)
        self.subjects.append(events.select("subject_id", split=pl.lit(split)).unique())

    def add_codes(self, codes: pl.DataFrame) -> None:
        """Write code, description (null = none), without parents."""
        frame = codes.select("code", "description", parent_codes=pl.lit(None, dtype=pl.List(pl.String)))
        write_parquet(self.folder / "metadata" / "codes.parquet", frame, CodeMetadataSchema)

    def add_labels(self, name: str, labels: pl.DataFrame) -> None:
        """Write a label set: subject_id, prediction_time and one of MEDS' value columns."""
        write_parquet(self.folder / "labels" / name / "0.parquet", labels.sort("subject_id"), LabelSchema)

    def finish(self) -> None:
        """Write subject_splits.parquet and dataset.json."""
        splits = pl.concat(self.subjects).sort("subject_id")
        write_parquet(self.folder / "metadata" / "subject_splits.parquet", splits, SubjectSplitSchema)
        write_json(self.folder / "metadata" / "dataset.json", dataset_facts(self.name))


def dataset_facts(name: str) -> dict[str, str]:
    """Return the content of MEDS' dataset.json for a dataset that this module writes."""
    return {
        "dataset_name": name,
        "dataset_version": "1",
        "etl_name": "ehr_embed",
        "etl_version": __version__,
        "meds_version": "0.4.1",
    }


def write_parquet(path: Path, frame: pl.DataFrame, schema: Any = None) -> None:
    """Write a parquet file, with the exact Arrow types of a MEDS schema if one is given.

    MEDS' strings are Arrow's `string`, while polars writes `large_string`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    table = frame.to_arrow()
    pq.write_table(table if schema is None else schema.align(table), path)
