"""Small MEDS datasets, written by hand, and where the repository and the open real datasets are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("EHR_EMBED_TEST_DATA", ROOT.parent / "shared" / "data"))
Event = tuple[int, float | None, str, float | None]


def day(days: float | None) -> datetime | None:
    """A time `days` after the start of 2020; None stays None (a static event)."""
    return None if days is None else datetime(2020, 1, 1) + timedelta(days=days)


def event_frame(events: Sequence[Event]) -> pl.DataFrame:
    """Events from (subject, day or None, code, value or None)."""
    schema: dict[str, Any] = {
        "subject_id": pl.Int64,
        "time": pl.Datetime("us"),
        "code": pl.String,
        "numeric_value": pl.Float32,
    }
    return pl.DataFrame([(s, day(t), c, v) for s, t, c, v in events], schema=schema, orient="row")


def write_meds(
    root: Path,
    splits: Mapping[str, Sequence[Event]],
    *,
    codes: Sequence[tuple[str, str | None, list[str] | None]] = (),
    labels: Mapping[str, Sequence[tuple[int, float, Any]]] | None = None,
    subject_splits: bool = True,
) -> Path:
    """Write a MEDS dataset; `labels` maps a name to (subject, day, value) rows, in one file without splits."""
    for split, events in splits.items():
        folder = root / "data" / split
        folder.mkdir(parents=True, exist_ok=True)
        event_frame(events).write_parquet(folder / "0.parquet")
    (root / "metadata").mkdir(exist_ok=True)
    schema: dict[str, Any] = {"code": pl.String, "description": pl.String, "parent_codes": pl.List(pl.String)}
    pl.DataFrame(list(codes), schema=schema, orient="row").write_parquet(root / "metadata" / "codes.parquet")
    if subject_splits:
        rows = sorted({(event[0], split) for split, events in splits.items() for event in events})
        frame = pl.DataFrame(rows, schema={"subject_id": pl.Int64, "split": pl.String}, orient="row")
        frame.write_parquet(root / "metadata" / "subject_splits.parquet")
    for name, rows_of in (labels or {}).items():
        write_labels(root / "labels" / name, rows_of)
    return root


def write_labels(folder: Path, rows: Sequence[tuple[int, float, Any]]) -> Path:
    """Write a label set; the value's type chooses the column."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = type(rows[0][2])
    column, dtype = {
        bool: ("boolean_value", pl.Boolean),
        int: ("integer_value", pl.Int64),
        float: ("float_value", pl.Float64),
        str: ("categorical_value", pl.String),
    }[kind]
    schema: dict[str, Any] = {"subject_id": pl.Int64, "prediction_time": pl.Datetime("us"), column: dtype}
    pl.DataFrame([(s, day(t), v) for s, t, v in rows], schema=schema, orient="row").write_parquet(folder / "0.parquet")
    return folder
