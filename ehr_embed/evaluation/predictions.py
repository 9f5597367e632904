"""Writes and reads tables of predictions, in the format of meds-evaluation for binary tasks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path
from ehr_embed.core.manifest import checked
from ehr_embed.sources.meds_files import readable

KEYS = ["subject_id", "prediction_time"]


def write_predictions(
    path: str | os.PathLike[str],
    *,
    subject_ids: npt.ArrayLike,
    prediction_times: npt.NDArray[np.datetime64],
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    threshold: float,
) -> None:
    """Write the predictions of a binary task atomically, as meds-evaluation reads them.

    The columns are exactly: subject_id int64, prediction_time timestamp[us], boolean_value bool,
    predicted_boolean_value bool (probability >= threshold), predicted_boolean_probability float64. Source:
    `meds_evaluation.schema.PredictionSchema`, which takes float32 and float64 in 0.0.6, and float64 alone in 0.0.3, the version
    that MEDS-DEV 0.0.14 pins.

    Args:
        path: the parquet file.
        subject_ids: (n,) integers.
        prediction_times: (n,) datetime64, any unit.
        labels: (n,) 0/1.
        probabilities: (n,) probability of the positive class.
        threshold: probability from which on a sample is predicted positive.

    Raises:
        UserError: lengths differ, or the file cannot be written.
    """
    p = np.asarray(probabilities)
    columns = _key_columns(subject_ids, prediction_times) | {
        "boolean_value": pa.array(np.asarray(labels).astype(bool)),
        "predicted_boolean_value": pa.array(p.astype(np.float64) >= threshold),
        "predicted_boolean_probability": pa.array(p.astype(np.float64)),
    }
    _write(path, columns)


def write_multiclass_predictions(
    path: str | os.PathLike[str],
    *,
    subject_ids: npt.ArrayLike,
    prediction_times: npt.NDArray[np.datetime64],
    labels: npt.ArrayLike,
    probabilities: npt.ArrayLike,
    class_names: Sequence[str],
) -> None:
    """Write the predictions over C exclusive classes atomically.

    The columns are: subject_id int64, prediction_time timestamp[us], label and predicted_label (names, string), and
    probability_<class> float64 for each class. meds-evaluation 0.0.6 has no multi-class schema to follow.

    Args:
        path: the parquet file.
        subject_ids: (n,) integers.
        prediction_times: (n,) datetime64, any unit.
        labels: (n,) integers in 0 ... C - 1.
        probabilities: (n, C).
        class_names: C distinct names, in column order.

    Raises:
        UserError: shapes disagree, names repeat, or the file cannot be written.
    """
    p, y, names = np.asarray(probabilities), np.asarray(labels).astype(np.intp), [str(name) for name in class_names]
    if p.ndim != 2 or p.shape[1] != len(names):
        raise UserError(f"{path}: expected probabilities (n, {len(names)}), one column per class, got {p.shape}.")
    if len(set(names)) != len(names):
        raise UserError(f"{path}: class names repeat, and each names a column: {', '.join(names)}.")
    if len(y) and not (y.min() >= 0 and y.max() < len(names)):
        raise UserError(f"{path}: labels must lie in 0 ... {len(names) - 1}, got {y.min()} ... {y.max()}.")
    name_of = np.array(names, dtype=object)
    columns = _key_columns(subject_ids, prediction_times) | {
        "label": pa.array(name_of[y], type=pa.string()),
        "predicted_label": pa.array(name_of[p.argmax(axis=1)], type=pa.string()),
    }
    for index, name in enumerate(names):
        columns[f"probability_{name}"] = pa.array(np.ascontiguousarray(p[:, index], dtype=np.float64))
    _write(path, columns)


def write_number_predictions(
    path: str | os.PathLike[str],
    *,
    subject_ids: npt.ArrayLike,
    prediction_times: npt.NDArray[np.datetime64],
    labels: npt.ArrayLike,
    predicted: npt.ArrayLike,
) -> None:
    """Write predicted numbers atomically.

    The columns are: subject_id int64, prediction_time timestamp[us], float_value and predicted_float_value float64.
    meds-evaluation 0.0.6 has no schema of numbers to follow; the names are those of MEDS' label schema.

    Args:
        path: the parquet file.
        subject_ids: (n,) integers.
        prediction_times: (n,) datetime64, any unit.
        labels: (n,).
        predicted: (n,), in the labels' unit.

    Raises:
        UserError: lengths differ, or the file cannot be written.
    """
    columns = _key_columns(subject_ids, prediction_times) | {
        "float_value": pa.array(np.asarray(labels, np.float64)),
        "predicted_float_value": pa.array(np.asarray(predicted, np.float64)),
    }
    _write(path, columns)


def _key_columns(subject_ids: npt.ArrayLike, prediction_times: npt.NDArray[np.datetime64]) -> dict[str, Any]:
    """Return the two columns that identify a prediction: the subject and the prediction time.

    Raises:
        UserError: the ids are no integers, or the times are no datetime64.
    """
    ids, times = np.asarray(subject_ids), np.asarray(prediction_times)
    if not np.issubdtype(ids.dtype, np.integer) or not np.issubdtype(times.dtype, np.datetime64):
        raise UserError(
            f"predictions need integer subject_ids and datetime64 prediction_times, got {ids.dtype} and {times.dtype}; "
            "MEDS and meds-evaluation accept nothing else."
        )
    return {
        "subject_id": pa.array(ids.astype(np.int64)),
        "prediction_time": pa.array(times.astype("datetime64[us]"), type=pa.timestamp("us")),
    }


def _write(path: str | os.PathLike[str], columns: dict[str, Any]) -> None:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
        raise UserError(f"{path}: columns differ in length: {lengths}. Each row is one sample.")
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


@dataclass(frozen=True)
class Predictions:
    """Predictions of a run on a split, sorted by subject and prediction time.

    Attributes:
        keys: (n,) rows of subject_id and prediction_time.
        labels: (n, C) True where the sample has the class; C = 1 for a binary task. Float64 (n, 1) for numbers.
        probabilities: (n, C) probability of each class; for numbers the prediction, (n, 1).
    """

    keys: pl.DataFrame
    labels: npt.NDArray[np.bool_] | npt.NDArray[np.float64]
    probabilities: npt.NDArray[np.float64]

    @property
    def are_numbers(self) -> bool:
        """Return whether numbers are predicted instead of classes."""
        return self.labels.dtype != np.bool_

    def refuse_other_samples(self, other: Predictions, name: str, other_name: str) -> None:
        """Refuse to compare predictions of different samples or labels.

        Raises:
            UserError: subjects, prediction times, classes or labels differ.
        """
        if not self.keys.equals(other.keys):
            raise UserError(
                f"{name} and {other_name} predict for different subjects or times ({len(self.keys)} and {len(other.keys)} "
                "predictions), so their difference is no effect of the model. Compare runs on the same dataset and labels."
            )
        if self.labels.shape != other.labels.shape or (self.labels != other.labels).any():
            raise UserError(
                f"{name} and {other_name} have different labels for the same subjects, so they are runs of different "
                "tasks. Compare runs on the same labels."
            )


def read_predictions(path: Path) -> Predictions:
    """Return the predictions of a binary, multi-class, multi-label or regression run.

    Raises:
        UserError: the file holds no such predictions, or differs from the one that the run's manifest lists.
    """
    with readable(path):
        frame = pl.read_parquet(checked(path), glob=False).sort(KEYS)
    if "predicted_boolean_probability" in frame.columns:
        labels = frame["boolean_value"].to_numpy()[:, None]
        probabilities = frame["predicted_boolean_probability"].cast(pl.Float64).to_numpy()[:, None]
        return Predictions(frame.select(KEYS), labels, probabilities)
    if "predicted_float_value" in frame.columns:
        numbers = frame.select("float_value", "predicted_float_value").cast(pl.Float64).to_numpy()
        return Predictions(frame.select(KEYS), numbers[:, :1], numbers[:, 1:])
    if many := [name.removesuffix("/label") for name in frame.columns if name.endswith("/label")]:
        if any(frame[f"{name}/label"].dtype != pl.Boolean or frame[f"{name}/label"].has_nulls() for name in many):
            raise UserError(
                f"{path}: the label sets of task=multitask have samples and kinds of their own, so no single number tells two runs "
                "apart. Type: ehr-embed tabulate FOLDERS --metrics held_out/loss, or compare runs of one label set"
            )
        labels = frame.select(f"{name}/label" for name in many).to_numpy().astype(bool)
        return Predictions(
            frame.select(KEYS), labels, frame.select(f"{name}/probability" for name in many).cast(pl.Float64).to_numpy()
        )
    columns = [name for name in frame.columns if name.startswith("probability_")]
    if "label" not in frame.columns or not columns:
        raise UserError(
            f"{path}: expected the predictions of a task with labels (column label with probability_CLASS, or those of "
            f"write_predictions), got columns {', '.join(frame.columns)}, of which no paired test is known. Type: ehr-embed "
            "tabulate FOLDERS, which compares the metrics of any task, or write such columns in the task's write_predictions"
        )
    names = [name.removeprefix("probability_") for name in columns]
    one_hot = np.stack([(frame["label"] == name).to_numpy() for name in names], axis=1)
    return Predictions(frame.select(KEYS), one_hot, frame.select(columns).cast(pl.Float64).to_numpy())
