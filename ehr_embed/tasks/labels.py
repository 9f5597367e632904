"""Label sets in MEDS' label schema: subject_id, prediction_time, and one value column."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ehr_embed.errors import UserError, unknown_name

VALUE_COLUMNS = ("boolean_value", "integer_value", "categorical_value")


@dataclass(frozen=True)
class LabelSet:
    """Labels of all splits together; the store says which split a subject is in.

    Attributes:
        name: the label set's name.
        frame: subject_id Int64, prediction_time Datetime[us], value String ("true"/"false" for booleans); sorted.
        value_column: which of `VALUE_COLUMNS` the values came from.
    """

    name: str
    frame: pl.DataFrame
    value_column: str

    @property
    def is_boolean(self) -> bool:
        return self.value_column == "boolean_value"


def available_labels(labels_dir: Path) -> list[str]:
    """Names of the label sets of a dataset."""
    return sorted(path.name for path in labels_dir.iterdir() if path.is_dir()) if labels_dir.is_dir() else []


def read_labels(labels: str | None, labels_dir: Path) -> LabelSet:
    """Read a label set by name (a folder in `labels_dir`) or by path (a folder or one parquet file).

    Raises:
        UserError: unknown name (lists those present), wrong columns or dtypes, null or repeated rows.
    """
    names = available_labels(labels_dir)
    remedy = "Type: python train.py ... task.labels=NAME, or a path to a folder or parquet file."
    if labels is None:
        if len(names) != 1:
            raise UserError(
                f"task.labels is not set and {labels_dir} holds {len(names)} label sets: {', '.join(names)}. {remedy}"
            )
        labels = names[0]
    path = labels_dir / labels if labels in names else Path(labels).expanduser()
    if not path.exists():
        raise unknown_name("task.labels", labels, names, remedy)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: expected parquet files with labels, found none. {remedy}")
    frames, value_columns = zip(*(_read_file(file) for file in files), strict=True)
    if len(set(value_columns)) > 1:
        raise UserError(
            f"{path}: files disagree on the value column: {', '.join(sorted(set(value_columns)))}. Use one kind of label."
        )
    frame = pl.concat(frames).sort("subject_id", "prediction_time")
    repeated = frame.filter(pl.struct("subject_id", "prediction_time").is_duplicated())
    if len(repeated):
        subject, time = repeated.row(0)[:2]
        raise UserError(
            f"{path}: subject {subject} at {time} has {len(repeated)} rows among repeated ones; expected one label each."
        )
    return LabelSet(path.stem, frame, value_columns[0])


def _read_file(file: Path) -> tuple[pl.DataFrame, str]:
    try:
        frame = pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({error}). Write the labels again.") from error
    expected = "expected subject_id (integer), prediction_time (datetime) and one of " + ", ".join(VALUE_COLUMNS)
    for column, good in (
        ("subject_id", lambda d: d.is_integer()),
        ("prediction_time", lambda d: isinstance(d, pl.Datetime)),
    ):
        if column not in frame.columns:
            raise UserError(f"{file}: column `{column}` is missing, found {', '.join(frame.columns)}; {expected}.")
        if not good(frame.schema[column]):
            raise UserError(f"{file}: column `{column}` has dtype {frame.schema[column]}; {expected}.")
    # MEDS allows all value columns to be present with only one filled.
    filled = [name for name in VALUE_COLUMNS if name in frame.columns and frame[name].null_count() < len(frame)]
    if len(filled) != 1:
        raise UserError(
            f"{file}: {len(filled)} filled value columns ({', '.join(filled) or 'none'}), "
            f"found {', '.join(frame.columns)}; {expected}."
        )
    column, dtype = filled[0], frame.schema[filled[0]]
    right = {"boolean_value": dtype == pl.Boolean, "integer_value": dtype.is_integer()}.get(
        column, dtype in (pl.String, pl.Categorical)
    )
    if not right:
        raise UserError(f"{file}: `{column}` has dtype {dtype}; {expected} with the dtype its name says.")
    wanted = frame.select(
        pl.col("subject_id").cast(pl.Int64),
        pl.col("prediction_time").cast(pl.Datetime("us")),
        pl.col(column).cast(pl.String).alias("value"),
    )
    if nulls := wanted.null_count().sum_horizontal().item():
        row = wanted.with_row_index("row").filter(pl.any_horizontal(pl.all().is_null()))["row"][0]
        raise UserError(
            f"{file}, row {row}: {nulls} null fields; every label needs a subject, a time and a value. Drop those rows."
        )
    return wanted, column
