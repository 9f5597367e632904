"""The demo cohort with times: the demo's own records, times that follow the stated hazard, and the best possible concordance."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from meds import CodeMetadataSchema, DataSchema
from sksurv.metrics import concordance_index_censored

from ehr_embed.experiment.run import run
from ehr_embed.sources.cohort import LABELS, write_demo_cohort
from ehr_embed.sources.demo_times import (
    END,
    OUTCOME,
    SCALE_DAYS,
    SHAPE,
    TIMES,
    bayes_concordance,
    demo_times_source,
)
from ehr_embed.sources.protocol import SPLITS
from tests.helpers.configs import composed
from tests.helpers.entry_points import metrics_of

N = 1500


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("times") / "demo_times"
    demo_times_source(root=str(root), n_subjects=N, seed=0)
    return root


def read(root, folder="data"):
    return pl.concat([pl.read_parquet(root / folder / split / "0.parquet") for split in SPLITS])


def test_files_are_valid_meds_and_all_codes_have_texts(cohort):
    for split in SPLITS:
        DataSchema.validate(pq.read_table(cohort / "data" / split / "0.parquet"))
    CodeMetadataSchema.validate(pq.read_table(cohort / "metadata" / "codes.parquet"))
    codes = pl.read_parquet(cohort / "metadata" / "codes.parquet").drop_nulls("description")
    assert set(read(cohort)["code"]) <= set(codes["code"])


def test_records_up_to_the_prediction_are_those_of_the_demo(cohort, tmp_path):
    write_demo_cohort(root=tmp_path / "demo", n_subjects=N, seed=0)
    labels = read(cohort, f"labels/{LABELS}")
    assert labels.equals(read(tmp_path / "demo", f"labels/{LABELS}"))
    seen = [
        read(root)
        .join(labels, on="subject_id")
        .filter(pl.col("time").is_null() | (pl.col("time") <= pl.col("prediction_time")))
        for root in (cohort, tmp_path / "demo")
    ]
    assert seen[0].equals(seen[1])


def test_times_follow_the_stated_hazard(cohort):
    people = pl.read_parquet(cohort / TIMES)
    days, event, log_hazard = (people[name].to_numpy() for name in ("days", "is_event", "log_hazard"))
    assert 0.2 < event.mean() < 0.6
    # An event is expected as often as the cumulative hazard at the end of the observation says: within three standard
    # deviations in all subjects, and in those of low and of high hazard.
    expected = (days / SCALE_DAYS) ** SHAPE * np.exp(log_hazard)
    for group in (log_hazard > -np.inf, log_hazard < 0, log_hazard > 1):
        assert abs(event[group].sum() - expected[group].sum()) < 3 * np.sqrt(expected[group].sum())
    assert event[log_hazard > 1].mean() > 2 * event[log_hazard < 0].mean()


def test_the_events_say_what_the_table_of_times_says(cohort):
    labels = read(cohort, f"labels/{LABELS}").select("subject_id", "prediction_time")
    people = pl.read_parquet(cohort / TIMES).join(labels, on="subject_id")
    events = read(cohort).join(labels, on="subject_id").drop_nulls("time")
    days = (pl.col("time") - pl.col("prediction_time")).dt.total_microseconds() / 86_400_000_000
    happened = events.filter(code=OUTCOME).select("subject_id", found=days).join(people, on="subject_id")
    assert len(happened) == people["is_event"].sum()
    assert happened["is_event"].all()
    assert np.allclose(happened["found"], happened["days"])
    ends = events.filter(code=END).select("subject_id", end="time")
    assert ends["subject_id"].is_unique().all()
    assert len(ends) == N
    assert (events.join(ends, on="subject_id")["time"] <= events.join(ends, on="subject_id")["end"]).all()


def test_the_best_possible_concordance_is_printed_and_not_exceeded(cohort, tmp_path, capsys):
    def metrics(name, *overrides):
        run(composed("experiment=demo_times", f"data.n_subjects={N}", f"data.root={cohort}", f"cache_dir={tmp_path / 'cache'}",
                     f"run_dir={tmp_path / name}", "embedder=hashing", "model=cox", "audit=off", "trainer.n_bootstrap=10",
                     *overrides))  # fmt: skip
        return metrics_of(tmp_path / name)

    found = metrics("cox")
    assert "best possible concordance" in capsys.readouterr().out
    people = pl.read_parquet(cohort / TIMES)
    for split in ("held_out", "tuning"):
        own = people.filter(split=split)
        days, happened, log_hazard = (own[name].to_numpy() for name in ("days", "is_event", "log_hazard"))
        best = concordance_index_censored(happened, days, log_hazard)[0]
        assert found["bayes_concordance"][split] == pytest.approx(best)
        assert best - 0.06 < found[split]["concordance"]["value"] < best + 0.01, "better than possible: a leak"
    # For another question nobody knows the best possible concordance, so the run states none.
    other = metrics("other", "task.times=null")
    assert "bayes_concordance" not in other


def test_the_best_possible_concordance_is_that_of_the_drawn_times_alone(cohort):
    predicted = read(cohort, f"labels/{LABELS}").select("subject_id", "prediction_time")
    rows = pl.read_parquet(cohort / TIMES).filter(split="held_out").join(predicted, on="subject_id")
    keys = {name: rows[name].to_numpy() for name in ("subject_id", "prediction_time")}
    labels = np.stack([rows["days"].to_numpy(), rows["is_event"].to_numpy()], axis=1).astype(np.float32)
    assert bayes_concordance(cohort, keys, labels) is not None
    assert bayes_concordance(cohort, keys, labels * [2, 1]) is None, "another follow-up"
    assert bayes_concordance(cohort, keys, np.stack([labels[:, 0], 1 - labels[:, 1]], axis=1)) is None, (
        "another outcome"
    )
    assert bayes_concordance(cohort, keys, labels[:, [0, 0, 1, 1]]) is None, "two outcomes"
    later = keys | {"prediction_time": keys["prediction_time"] + np.timedelta64(1, "D")}
    assert bayes_concordance(cohort, later, labels) is None, "another prediction time"
