"""Read label sets in MEDS' label schema: subject_id, prediction_time, and one value column."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.sources.meds import microseconds, out_of_range, readable

VALUE_COLUMNS = ("boolean_value", "integer_value", "categorical_value")


@dataclass(frozen=True)
class LabelSet:
    """Labels of all splits together; the event store knows the split of each subject.

    Attributes:
        name: the label set's name.
        frame: subject_id Int64, prediction_time Datetime[us], value String ("true"/"false" for booleans); sorted.
        value_column: the one of `VALUE_COLUMNS` from which the values were read.
    """

    name: str
    frame: pl.DataFrame
    value_column: str

    @property
    def is_boolean(self) -> bool:
        return self.value_column == "boolean_value"


def available_labels(labels_dir: Path) -> list[str]:
    """Return the names of a dataset's label sets, sorted."""
    return sorted(path.name for path in labels_dir.iterdir() if path.is_dir()) if labels_dir.is_dir() else []


def read_labels(labels: str | None, labels_dir: Path) -> LabelSet:
    """Read a label set by name (a folder in `labels_dir`) or by path (a folder or one parquet file).

    Raises:
        UserError: the name is unknown (the message lists the valid ones), columns or dtypes are wrong, or rows are null
            or repeated.
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
    found = [read for file in files if (read := _read_file(file)) is not None]
    if not found:
        raise UserError(f"{path}: the files hold no labels, not one row. {remedy}")
    frames, value_columns = zip(*found, strict=True)
    if len(set(value_columns)) > 1:
        raise UserError(
            f"{path}: files disagree on the value column: {', '.join(sorted(set(value_columns)))}. Use one kind of label."
        )
    frame = pl.concat(frames).sort("subject_id", "prediction_time")
    repeated = frame.filter(pl.struct("subject_id", "prediction_time").is_duplicated())
    if len(repeated):
        subject, time = repeated.row(0)[:2]
        raise UserError(
            f"{path}: subject {subject} has several labels at {time} ({len(repeated)} rows of the label set share subject and "
            "prediction_time with another row); expected one label per subject and time. Drop the other rows."
        )
    return LabelSet(path.stem, frame, value_columns[0])


def read_times(times: str, labels_dir: Path) -> pl.DataFrame:
    """Read prediction times: those of a label set (by name or path), or of a parquet file without a value column.

    Returns:
        subject_id Int64, prediction_time Datetime[us]; sorted, without repetitions.

    Raises:
        UserError: the name is unknown (the message lists the valid ones), or columns, dtypes or rows are wrong.
    """
    names, path = available_labels(labels_dir), Path(times).expanduser()
    if times in names:
        path = labels_dir / times
    if not path.exists():
        raise unknown_name(
            "task.times",
            times,
            names,
            "Type: task.times=NAME of a label set, or a parquet file of subject_id, prediction_time.",
        )
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    found = [read[0] for file in files if (read := _read_file(file, needs_value=False)) is not None]
    if not found:
        raise UserError(f"task.times={times}: {path} holds no prediction times, not one row.")
    return pl.concat(found).select("subject_id", "prediction_time").unique().sort("subject_id", "prediction_time")


def _read_file(file: Path, *, needs_value: bool = True) -> tuple[pl.DataFrame, str] | None:
    """Read the labels of a file and the name of their value column; return None for a file without rows."""
    with readable(file):
        frame = pl.read_parquet(file)
    expected = "expected subject_id (integer), prediction_time (datetime)"
    expected += f" and one of {', '.join(VALUE_COLUMNS)}" if needs_value else ""
    for column, good in (
        ("subject_id", lambda d: d.is_integer()),
        ("prediction_time", lambda d: isinstance(d, pl.Datetime) and d.time_zone is None),  # event times have no zone
    ):
        if column not in frame.columns:
            raise UserError(f"{file}: column `{column}` is missing, found {', '.join(frame.columns)}; {expected}.")
        if not good(frame.schema[column]):
            raise UserError(f"{file}: column `{column}` has dtype {frame.schema[column]}; {expected}.")
    if not len(frame):
        return None
    # A file in MEDS may have all value columns, of which only one is filled.
    filled = [name for name in VALUE_COLUMNS if name in frame.columns and frame[name].null_count() < len(frame)]
    if not needs_value:
        frame, filled = frame.with_columns(pl.lit(True).alias("boolean_value")), ["boolean_value"]
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
        pl.col("subject_id").cast(pl.Int64, strict=False),
        microseconds("prediction_time", frame.schema["prediction_time"], up=False),
        pl.col(column).cast(pl.String).alias("value"),
    )
    if n := wanted["subject_id"].null_count() - frame["subject_id"].null_count():
        raise UserError(f"{file}: {n} values of `subject_id` do not fit Int64, the dtype of MEDS 0.4. Give other ids.")
    if nulls := wanted.null_count().sum_horizontal().item():
        row = wanted.with_row_index("row").filter(pl.any_horizontal(pl.all().is_null()))["row"][0]
        raise UserError(
            f"{file}, row {row}: {nulls} null fields; every label needs a subject, a time and a value. Drop those rows."
        )
    if len(wrong := wanted.with_row_index("row").filter(out_of_range(pl.col("prediction_time")))):
        raise UserError(
            f"{file}, row {wrong['row'][0]}: prediction_time lies outside the years 1 to 9999 ({len(wrong)} such rows), so it "
            "is no date of a record. Mend or drop those rows."
        )
    return wanted, column
