"""Read the parquet files of a MEDS dataset, and refuse columns, times and orders of rows that MEDS 0.4 does not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from ehr_embed.core.errors import UserError
from ehr_embed.sources.meds_remedies import wrong_dtype

FIRST_TIME, LAST_TIME = -62_135_596_800_000_000, 253_402_300_799_999_999
"""Microseconds since 1970-01-01 of the first and the last instant of the years 1 to 9999."""
COLUMNS = {"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32}


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the errors that polars raises for an unreadable parquet file into a `UserError`.

    Damage of the data shows only when they are read, not when the file is opened, so the context must include the
    reading.

    Raises:
        UserError: the file cannot be read; the message names it.
    """
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: not a readable parquet file ({told}). It may be truncated; write it again."
        ) from error


def read_columns(path: Path, schema: dict[str, Any]) -> pl.DataFrame:
    """Read exactly the columns of `schema`; if numeric_value is absent, it is null in every row."""
    with readable(path):
        return _scan(path, schema).collect()


def microseconds(name: str, dtype: pl.DataType, *, up: bool) -> pl.Expr:
    """Convert a time of any unit to whole microseconds; nanoseconds are rounded up or down.

    With event times rounded up and prediction times rounded down, no event becomes visible before it happened. A time
    that is too large for microseconds does not wrap around but becomes one outside `FIRST_TIME` to `LAST_TIME`, which
    is refused.

    Args:
        name: the column.
        dtype: dtype of the column.
        up: whether to round up.
    """
    number = pl.col(name).cast(pl.Int64)
    if dtype == pl.Datetime("ns"):
        number = -((-number) // 1000) if up else number // 1000
    elif dtype == pl.Datetime("ms"):
        number = number.clip(-(2**63) // 1000 + 1, 2**63 // 1000) * 1000
    return number.cast(pl.Datetime("us")).alias(name)


def out_of_range(time: pl.Expr) -> pl.Expr:
    """Return an expression for whether a time lies outside the years 1 to 9999."""
    number = time.cast(pl.Int64)
    return (number < FIRST_TIME) | (number > LAST_TIME)


def _scan(path: Path, schema: dict[str, Any]) -> pl.LazyFrame:
    frame = pl.scan_parquet(path, glob=False)
    present = frame.collect_schema()
    for name, dtype in schema.items():
        if name == "numeric_value" and name not in present:
            frame = frame.with_columns(pl.lit(None, dtype=pl.Float32).alias(name))
            continue
        if name not in present:
            raise UserError(f"{path}: column `{name}` is missing; found {', '.join(present)}. MEDS 0.4 requires it.")
        if not _castable(present[name], dtype):
            raise wrong_dtype(path, name, present[name], dtype)
        if present[name] == pl.UInt64 or present[name] in (pl.Int128, pl.UInt128):
            _refuse_large(frame, name, path)
    return frame.select(
        microseconds(name, present[name], up=True) if dtype == pl.Datetime("us") else pl.col(name).cast(dtype)
        for name, dtype in schema.items()
    )


def _refuse_large(frame: pl.LazyFrame, name: str, path: Path) -> None:
    found = frame.select(pl.col(name).cast(pl.Int64, strict=False).is_null().sum() - pl.col(name).is_null().sum())
    if n := found.collect().item():
        raise UserError(f"{path}: {n} values of `{name}` do not fit Int64, the dtype of MEDS 0.4. Give other ids.")


def _castable(found: pl.DataType, wanted: Any) -> bool:
    if wanted == pl.Datetime("us"):
        return isinstance(found, pl.Datetime) and found.time_zone is None
    if wanted == pl.String:
        return found == pl.String or isinstance(found, pl.Categorical | pl.Enum)
    if wanted == pl.Float32:
        return found.is_numeric() or found == pl.Null
    return found.is_integer()


def check_events(events: pl.DataFrame, shard: Path) -> None:
    """Refuse events that MEDS does not allow.

    Raises:
        UserError: a row has no subject or no code, a number is NaN or infinite, a time lies outside the years 1 to 9999, or a
            subject's rows are not contiguous or not ordered by time.
    """

    def refuse(rows: pl.DataFrame, expected: str) -> None:
        if len(rows):
            raise UserError(
                f"{shard}, row {rows['row'][0]}: {expected} ({len(rows)} such rows). Mend the ETL; nothing was written."
            )

    rows = events.with_row_index("row")
    refuse(rows.filter(pl.col("subject_id").is_null()), "subject_id is null, and every event needs a subject")
    refuse(
        rows.filter(pl.col("code").is_null() | (pl.col("code") == "")),
        "code is null or empty, and every event needs a code",
    )
    refuse(
        rows.filter(pl.col("numeric_value").is_nan() | pl.col("numeric_value").is_infinite()),
        "numeric_value is NaN or infinite as float32 (which ends at 3.4e38); a missing value is null in MEDS",
    )
    refuse(
        rows.filter(out_of_range(pl.col("time"))),
        "time lies outside the years 1 to 9999, so it is no date of a record; a static event has a null time in MEDS",
    )
    new_subject = pl.col("subject_id") != pl.col("subject_id").shift()
    starts = rows.filter(new_subject.fill_null(True))
    refuse(
        starts.filter(~pl.col("subject_id").is_first_distinct()),
        "a subject's events are not contiguous, as MEDS requires; sort by subject_id, time",
    )
    # Static events (null time) come first in MEDS, so here they get a time below every real one.
    time = pl.col("time").fill_null(pl.lit(-(2**62)).cast(pl.Datetime("us")))
    refuse(
        rows.filter(~new_subject & (time < time.shift())),
        "events of a subject are not ordered by time (static ones first), as MEDS requires; sort by subject_id, time",
    )
