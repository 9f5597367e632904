"""Prediction files are read, validated and scored by meds-evaluation itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ehr_embed.core.errors import UserError
from ehr_embed.evaluation.metrics import binary_metrics
from ehr_embed.evaluation.predictions import write_multiclass_predictions, write_predictions


def binary_sample(n: int = 80) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    p = rng.random(n)
    return {
        "subject_ids": np.arange(n) // 2 + 1_000_000_000_000,
        "prediction_times": np.datetime64("2020-01-01T00:00:00.000001", "us") + np.arange(n) * np.timedelta64(1, "D"),
        "labels": (rng.random(n) < p).astype(np.int64),
        "probabilities": p,
    }


def test_schema_is_that_of_meds_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "predictions" / "held_out.parquet"
    sample = binary_sample()
    write_predictions(path, **sample, threshold=0.4)
    table = pq.read_table(path)
    assert table.schema.equals(
        pa.schema(
            {
                "subject_id": pa.int64(),
                "prediction_time": pa.timestamp("us"),
                "boolean_value": pa.bool_(),
                "predicted_boolean_value": pa.bool_(),
                "predicted_boolean_probability": pa.float64(),
            }
        )
    )
    assert (table["prediction_time"].to_numpy() == sample["prediction_times"]).all()
    assert table["predicted_boolean_value"].to_pylist() == (sample["probabilities"] >= 0.4).tolist()
    assert [file.name for file in path.parent.iterdir()] == ["held_out.parquet"]


def test_meds_evaluation_accepts_the_file_and_agrees(tmp_path: Path) -> None:
    schema = pytest.importorskip("meds_evaluation.schema")
    evaluate = pytest.importorskip("meds_evaluation.evaluate")
    sample = binary_sample()
    write_predictions(tmp_path / "p.parquet", **sample, threshold=0.4)
    schema.PredictionSchema.align(pq.read_table(tmp_path / "p.parquet"))
    theirs = evaluate.evaluate_binary_classification(pl.read_parquet(tmp_path / "p.parquet"))
    theirs = theirs["samples_equally_weighted"]
    ours = binary_metrics(
        sample["labels"],
        sample["probabilities"],
        threshold=0.4,
        subject_ids=sample["subject_ids"],
        n_bootstrap=0,
        split_name="held_out",
    )
    names = {
        "roc_auc_score": "auroc",
        "average_precision_score": "auprc",
        "f1_score": "f1",
        "binary_accuracy": "accuracy",
        "brier_score": "brier",
    }
    assert {key: theirs[key] for key in names} == pytest.approx(
        {key: ours[name]["value"] for key, name in names.items()}
    )


def test_multiclass_columns(tmp_path: Path) -> None:
    write_multiclass_predictions(
        tmp_path / "p.parquet",
        subject_ids=np.array([3, 4]),
        prediction_times=np.array(["2020-01-01", "2021-01-01"], dtype="datetime64[D]"),
        labels=np.array([1, 0]),
        probabilities=np.array([[0.25, 0.75], [0.125, 0.875]]),
        class_names=["home", "died"],
    )
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.schema.field("prediction_time").type == pa.timestamp("us")
    assert table.schema.field("probability_died").type == pa.float64()
    assert table.drop_columns(["prediction_time"]).to_pylist() == [
        {
            "subject_id": 3,
            "label": "died",
            "predicted_label": "died",
            "probability_home": 0.25,
            "probability_died": 0.75,
        },
        {
            "subject_id": 4,
            "label": "home",
            "predicted_label": "died",
            "probability_home": 0.125,
            "probability_died": 0.875,
        },
    ]


def test_refusals_leave_no_file(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    sample = binary_sample(4)
    with pytest.raises(UserError, match=r"p\.parquet: .*'boolean_value': 2.*Each row is one sample"):
        write_predictions(path, **{**sample, "labels": [0, 1]}, threshold=0.5)
    with pytest.raises(UserError, match="datetime64"):
        write_predictions(path, **{**sample, "prediction_times": np.arange(4)}, threshold=0.5)
    multiclass: dict[str, Any] = {key: sample[key] for key in ("subject_ids", "prediction_times")} | {
        "labels": [0, 1, 0, 1]
    }
    with pytest.raises(UserError, match="names repeat"):
        write_multiclass_predictions(path, **multiclass, probabilities=np.ones((4, 2)), class_names=["a", "a"])
    with pytest.raises(UserError, match=r"\(n, 3\)"):
        write_multiclass_predictions(path, **multiclass, probabilities=np.ones((4, 2)), class_names=["a", "b", "c"])
    with pytest.raises(UserError, match=r"labels .* 0 \.\.\. 0, got 0 \.\.\. 1"):
        write_multiclass_predictions(path, **multiclass, probabilities=np.ones((4, 1)), class_names=["a"])
    assert not list(tmp_path.iterdir())
