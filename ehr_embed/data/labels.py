"""Read label sets in MEDS' label schema: subject_id, prediction_time, and one value column."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.sources.meds_files import microseconds, out_of_range, readable
from ehr_embed.sources.meds_remedies import without_zone
from ehr_embed.sources.protocol import SPLITS

VALUE_COLUMNS = ("boolean_value", "integer_value", "float_value", "categorical_value")
NUMBER_COLUMNS = ("float_value", "integer_value")
"""Columns whose values can be numbers; integers may be classes too."""


TASK_LABELS = "task_labels"
"""A second folder for label sets beside `labels`, where MEDS-DEV and its examples have them."""


@dataclass(frozen=True)
class LabelSet:
    """Labels of all splits together; the event store knows the split of each subject.

    Attributes:
        name: the label set's name.
        frame: subject_id Int64, prediction_time Datetime[us], value String ("true"/"false" for booleans, null without values);
            sorted.
        value_column: the one of `VALUE_COLUMNS` from which the values were read; None = the files give prediction times only.
        are_numbers: whether the task that read them takes the values as numbers; otherwise they are classes.
    """

    name: str
    frame: pl.DataFrame
    value_column: str | None
    are_numbers: bool = False

    @property
    def is_boolean(self) -> bool:
        return self.value_column == "boolean_value"

    def in_meds(self) -> pl.DataFrame:
        """Return subject_id, prediction_time and, where there are labels, the column of their values as MEDS has it."""
        keys, values = self.frame.drop("value"), self.frame["value"]
        if self.value_column is None:
            return keys
        if self.is_boolean:
            values = values == "true"
        elif self.value_column in NUMBER_COLUMNS:
            values = values.cast(pl.Int64 if self.value_column == "integer_value" else pl.Float64)
        return keys.with_columns(values.alias(self.value_column))


def available_labels(labels_dir: Path) -> list[str]:
    """Return the names of a dataset's label sets, sorted.

    A label set is a folder in `labels_dir`, or in `task_labels` beside it. Its name is the path to the folder that holds its
    parquet files or their splits, so that names may be nested.
    """
    return sorted(_folders(labels_dir))


def _folders(labels_dir: Path) -> dict[str, list[Path]]:
    """Return the folders of each label set, by its name: several where `labels` and `task_labels` both have one of the name."""
    found: dict[str, list[Path]] = {}
    for base in (labels_dir, labels_dir.with_name(TASK_LABELS)):
        names = {path.name for path in base.iterdir() if path.is_dir()} if base.is_dir() else set()
        nested = {_nested_name(file.relative_to(base).parts[:-1]) for file in base.glob("*/*/**/*.parquet")}
        # A folder of which only deeper folders are label sets is none itself.
        names -= {name.split("/")[0] for name in nested if "/" in name} - {
            path.parent.name for path in base.glob("*/*.parquet")
        }
        for name in sorted(names | nested):
            found.setdefault(name, []).append(base / name)
    return found


def _nested_name(folders: tuple[str, ...]) -> str:
    """Return the name of the label set whose files lie below these folders: what stands before a split, or else the first folder.

    >>> _nested_name(("mortality", "in_icu", "first_24h", "train")), _nested_name(("mortality", "0")), _nested_name(("x", "train"))
    ('mortality/in_icu/first_24h', 'mortality', 'x')
    """
    for number, folder in enumerate(folders):
        if folder in SPLITS and number:
            return "/".join(folders[:number])
    return folders[0]


def read_labels(labels: str | None, labels_dir: Path, *, needs_values: bool = True) -> LabelSet:
    """Read a label set by name (a folder in `labels_dir` or in `task_labels` beside it) or by path (a folder or one parquet file).

    Args:
        labels: the name or path; None = the only label set that there is.
        labels_dir: the folder `labels` of the dataset, which need not be there.
        needs_values: whether a file without a value column, which gives prediction times only, is refused.

    Raises:
        UserError: the name is unknown (the message lists the valid ones), columns or dtypes are wrong, or rows are null
            or repeated.
    """
    names = _folders(labels_dir)
    remedy = "Type: python train.py ... task.labels=NAME, or a path to a folder or parquet file."
    if labels is None:
        if len(names) != 1:
            raise UserError(
                f"task.labels is not set and {labels_dir} holds {len(names)} label sets: {', '.join(names)}. {remedy}"
            )
        (labels,) = names
    path = _place(labels, names, labels_dir)
    if not path.exists():
        raise unknown_name("task.labels", labels, names, remedy)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: expected parquet files with labels, found none. {remedy}")
    found = [
        read for file in files if (read := _read_file(file, values="needed" if needs_values else "wanted")) is not None
    ]
    if not found:
        raise UserError(f"{path}: the label files have no rows. {remedy}")
    frames, value_columns = zip(*found, strict=True)
    if len(set(value_columns)) > 1:
        raise UserError(
            f"{path}: files disagree on the value column: {', '.join(sorted(map(str, set(value_columns))))}. Use one kind of label."
        )
    frame = pl.concat(frames).sort("subject_id", "prediction_time")
    repeated = frame.filter(pl.struct("subject_id", "prediction_time").is_duplicated())
    if len(repeated):
        raise _repeated(path, repeated, value_columns[0])
    return LabelSet(labels if labels in names else path.stem, frame, value_columns[0])


def _repeated(path: Path, rows: pl.DataFrame, value_column: str | None) -> UserError:
    """Return the error for rows of a label set that share their subject and prediction time, equal or contradictory ones."""
    keys = ["subject_id", "prediction_time"]
    by_time = rows.group_by(keys, maintain_order=True).agg(values=pl.col("value").unique().sort())
    contradictory = by_time.filter(pl.col("values").list.len() > 1)
    told = f"{len(rows)} rows of the label set share subject and prediction_time with another row"
    if not len(contradictory):
        subject, time = rows.row(0)[:2]
        return UserError(
            f"{path}: subject {subject} has several labels at {time} ({told}, and its label); expected one label per subject and "
            "time. Drop the copies: polars.read_parquet(FILE).unique().write_parquet(FILE)"
        )
    subject, time, values = contradictory.row(0)
    return UserError(
        f"{path}: subject {subject} has several labels at {time} that contradict each other, {' and '.join(values)} ({told}; "
        f"times with a contradiction: {len(contradictory)}); expected one label per subject and time. Find out in the task's "
        f"definition which of them holds, or keep one: polars.read_parquet(FILE).group_by({keys})"
        f".agg(polars.col({value_column!r}).max()).write_parquet(FILE) takes the larger, which is true before false."
    )


def _place(labels: str, names: dict[str, list[Path]], labels_dir: Path) -> Path:
    """Return the folder or file that a name or path of a label set means.

    Raises:
        UserError: `labels` and `task_labels` both hold a label set of this name.
    """
    folders = names.get(labels, [])
    if len({folder.resolve() for folder in folders}) > 1:
        raise UserError(
            f"task.labels={labels}: {' and '.join(map(str, folders))} both hold a label set of this name, and they may differ. "
            f"Type: task.labels={folders[0]}"
        )
    if folders:
        return folders[0]
    path = Path(labels).expanduser()
    # A folder above several label sets, which all belong to what is asked for, or a part of a label set.
    inside = [base / labels for base in (labels_dir, labels_dir.with_name(TASK_LABELS)) if (base / labels).is_dir()]
    return inside[0] if inside and not path.exists() else path


def read_times(times: str, labels_dir: Path) -> pl.DataFrame:
    """Read prediction times: those of a label set (by name or path), or of a parquet file without a value column.

    Returns:
        subject_id Int64, prediction_time Datetime[us]; sorted, without repetitions.

    Raises:
        UserError: the name is unknown (the message lists the valid ones), or columns, dtypes or rows are wrong.
    """
    names = _folders(labels_dir)
    path = _place(times, names, labels_dir)
    if not path.exists():
        raise unknown_name(
            "task.times",
            times,
            names,
            "Type: task.times=NAME of a label set, or a parquet file of subject_id, prediction_time.",
        )
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    found = [read[0] for file in files if (read := _read_file(file, values="ignored")) is not None]
    if not found:
        raise UserError(f"task.times={times}: {path} holds no prediction times: it has no rows.")
    return pl.concat(found).select("subject_id", "prediction_time").unique().sort("subject_id", "prediction_time")


def _read_file(file: Path, *, values: str = "needed") -> tuple[pl.DataFrame, str | None] | None:
    """Read the labels of a file and the name of their value column; return None for a file without rows.

    Args:
        file: a parquet file.
        values: `needed`, `wanted` (a file may have none), or `ignored`.
    """
    with readable(file):
        frame = pl.read_parquet(file, glob=False)
    expected = "expected subject_id (integer), prediction_time (datetime)"
    expected += f" and one of {', '.join(VALUE_COLUMNS)}" if values == "needed" else ""
    for column, good in (
        ("subject_id", lambda d: d.is_integer()),
        ("prediction_time", lambda d: isinstance(d, pl.Datetime) and d.time_zone is None),  # event times have no zone
    ):
        if column not in frame.columns:
            raise UserError(f"{file}: column `{column}` is missing, found {', '.join(frame.columns)}; {expected}.")
        if isinstance(found := frame.schema[column], pl.Datetime) and found.time_zone is not None:
            raise UserError(f"{file}: column `{column}` has dtype {found}; {expected}. {without_zone(column, found)}")
        if not good(frame.schema[column]):
            raise UserError(f"{file}: column `{column}` has dtype {frame.schema[column]}; {expected}.")
    if not len(frame):
        return None
    # A file in MEDS may have all value columns, of which only one is filled.
    filled = [name for name in VALUE_COLUMNS if name in frame.columns and frame[name].null_count() < len(frame)]
    if values == "ignored" or (values == "wanted" and not filled):
        return _checked(file, frame, pl.lit(None, pl.String)), None
    if len(filled) != 1:
        raise UserError(
            f"{file}: {len(filled)} filled value columns ({', '.join(filled) or 'none'}), "
            f"found {', '.join(frame.columns)}; {expected}."
        )
    column, dtype = filled[0], frame.schema[filled[0]]
    right = {
        "boolean_value": dtype == pl.Boolean,
        "integer_value": dtype.is_integer(),
        "float_value": dtype.is_float(),
    }.get(column, dtype in (pl.String, pl.Categorical))
    if not right:
        raise UserError(f"{file}: `{column}` has dtype {dtype}; {expected} with the dtype that its name states.")
    return _checked(file, frame, pl.col(column).cast(pl.String)), column


def _checked(file: Path, frame: pl.DataFrame, value: pl.Expr) -> pl.DataFrame:
    """Return subject_id, prediction_time and value of the rows of a file.

    Raises:
        UserError: a row lacks one of them, or its subject or time cannot be one.
    """
    wanted = frame.select(
        pl.col("subject_id").cast(pl.Int64, strict=False),
        microseconds("prediction_time", frame.schema["prediction_time"], up=False),
        value.alias("value"),
    )
    needed = pl.all() if value.meta.root_names() else pl.exclude("value")
    if n := wanted["subject_id"].null_count() - frame["subject_id"].null_count():
        raise UserError(f"{file}: {n} values of `subject_id` do not fit Int64, the dtype of MEDS 0.4. Give other ids.")
    if nulls := wanted.select(needed).null_count().sum_horizontal().item():
        row = wanted.with_row_index("row").filter(pl.any_horizontal(needed.is_null()))["row"][0]
        raise UserError(
            f"{file}, row {row}: {nulls} null fields; every label needs a subject, a time and a value. Drop those rows."
        )
    if len(wrong := wanted.with_row_index("row").filter(out_of_range(pl.col("prediction_time")))):
        raise UserError(
            f"{file}, row {wrong['row'][0]}: prediction_time lies outside the years 1 to 9999 ({len(wrong)} such rows), so it "
            "is no date of a record. Mend or drop those rows."
        )
    return wanted
