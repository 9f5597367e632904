"""The demo cohort: valid MEDS, repeatable, and as hard as it says."""

from __future__ import annotations

import shutil

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from meds import CodeMetadataSchema, DataSchema, LabelSchema, SubjectSplitSchema
from sklearn.metrics import roc_auc_score

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import read_json
from ehr_embed.sources.cohort import LABELS, write_demo_cohort
from ehr_embed.sources.cohort_codes import OUTCOMES
from ehr_embed.sources.demo import bayes_auroc
from ehr_embed.sources.protocol import SPLITS


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("cohort") / "demo"
    write_demo_cohort(root=root, n_subjects=2000, seed=0)
    return root


def all_events(root):
    return pl.concat([pl.read_parquet(root / "data" / split / "0.parquet") for split in SPLITS])


def test_files_are_valid_meds(cohort):
    for split in SPLITS:
        DataSchema.validate(pq.read_table(cohort / "data" / split / "0.parquet"))
        LabelSchema.validate(pq.read_table(cohort / "labels" / LABELS / split / "0.parquet"))
    SubjectSplitSchema.validate(pq.read_table(cohort / "metadata" / "subject_splits.parquet"))
    codes = pl.read_parquet(cohort / "metadata" / "codes.parquet")
    CodeMetadataSchema.validate(pq.read_table(cohort / "metadata" / "codes.parquet"))
    assert set(all_events(cohort)["code"]) <= set(codes["code"])
    assert codes["description"].null_count() == 0


def test_it_has_what_a_record_has(cohort):
    events = all_events(cohort)
    assert events["subject_id"].n_unique() == 2000
    static = events.filter(pl.col("time").is_null())
    assert len(static) == 4000
    assert events["numeric_value"].is_not_null().mean() > 0.2
    gaps = events.drop_nulls("time").select(gap=pl.col("time").diff().over("subject_id")).drop_nulls()["gap"]
    assert gaps.dt.total_days().n_unique() > 100, "times are irregular"
    rare = events.group_by("code").len().filter(pl.col("len") < 100)
    assert len(rare) >= 3


def test_the_same_seed_writes_the_same_cohort(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_demo_cohort(root=tmp_path / name, n_subjects=120, seed=seed)
    assert all_events(tmp_path / "a").equals(all_events(tmp_path / "b"))
    assert not all_events(tmp_path / "a").equals(all_events(tmp_path / "c"))


def test_the_best_possible_auroc_is_that_of_the_true_risk(cohort):
    risk = pl.read_parquet(cohort / "extra" / "bayes_risk.parquet")
    for split in SPLITS:
        labels = pl.read_parquet(cohort / "labels" / LABELS / split / "0.parquet")
        both = labels.join(risk, on="subject_id")
        auroc = roc_auc_score(both["boolean_value"], both["risk"])
        assert auroc == pytest.approx(read_json(cohort / "extra" / "bayes.json")["auroc"][split])
        assert 0.8 < auroc < 0.95
        assert both["boolean_value"].mean() == pytest.approx(both["risk"].mean(), abs=0.05), "risks are calibrated"


def test_the_best_possible_auroc_is_that_of_the_drawn_labels_alone(cohort, tmp_path):
    """A bound that belongs to another question would be a wrong number in every report."""
    rows = pl.read_parquet(cohort / "labels" / LABELS / "held_out" / "0.parquet")
    labels = rows["boolean_value"].cast(pl.Int64).to_numpy()
    keys = {name: rows[name].to_numpy() for name in ("subject_id", "prediction_time")}
    best = read_json(cohort / "extra" / "bayes.json")["auroc"]["held_out"]
    assert bayes_auroc(cohort, keys, labels) == pytest.approx(best)
    assert bayes_auroc(cohort, {name: column[:100] for name, column in keys.items()}, labels[:100]) is not None
    assert bayes_auroc(cohort, keys, 1 - labels) is None, "another label"
    later = keys | {"prediction_time": keys["prediction_time"] + np.timedelta64(1, "D")}
    assert bayes_auroc(cohort, later, labels) is None, "another prediction time"
    assert bayes_auroc(cohort, keys, np.stack([labels, labels], axis=1)) is None, "two labels"
    assert bayes_auroc(tmp_path, keys, labels) is None, "another dataset"
    shutil.copytree(cohort, tmp_path / "edited")
    rewritten = rows.with_columns(~pl.col("boolean_value"))
    rewritten.write_parquet(tmp_path / "edited" / "labels" / LABELS / "held_out" / "0.parquet")
    assert bayes_auroc(tmp_path / "edited", keys, 1 - labels) is None, "a label set of the same name"


def test_what_follows_the_outcome_would_leak_and_lies_after_the_prediction(cohort):
    labels = pl.concat([pl.read_parquet(cohort / "labels" / LABELS / split / "0.parquet") for split in SPLITS])
    outcomes = (
        all_events(cohort).filter(pl.col("code").is_in([code for code, _ in OUTCOMES])).join(labels, on="subject_id")
    )
    assert outcomes["boolean_value"].all()
    assert len(outcomes) == labels["boolean_value"].sum()
    assert (outcomes["time"] > outcomes["prediction_time"]).all()


def test_a_small_cohort_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="expected 100 to"):
        write_demo_cohort(root=tmp_path / "demo", n_subjects=10, seed=0)
    assert not list(tmp_path.iterdir())
