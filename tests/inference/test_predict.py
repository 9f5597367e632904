"""`python -m ehr_embed.predict`: new subjects, new codes, no splits, a run that was moved."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import ehr_embed
from ehr_embed.core.errors import UserError
from ehr_embed.experiment.run import run
from ehr_embed.predict import predict
from ehr_embed.sources.meds import MedsSource
from tests.helpers.configs import composed
from tests.helpers.entry_points import inside  # noqa: F401 (a fixture)
from tests.helpers.homonyms import KINDS, config, write_homonyms
from tests.helpers.small_meds import Event, write_labels, write_meds


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run trained with lookups, then moved away from its dataset, cache and lookups, which are gone."""
    folder, before = tmp_path_factory.mktemp("place"), tmp_path_factory.mktemp("before")
    root = write_homonyms(before / "set")
    pl.DataFrame({"code": ["N1", "LATE"], "term": ["Cough", "Broken leg"]}).write_csv(before / "lookups.csv")
    lookups = f"data.lookups=[{before / 'lookups.csv'}]"
    run(config(root, before / "runs" / "first", *KINDS["residual"], "trainer.epochs=3", lookups))
    shutil.copytree(root, folder / "set")
    (before / "runs" / "first").rename(folder / "moved")
    shutil.rmtree(before)
    return folder


@pytest.fixture(scope="module")
def new(folder) -> Path:
    """Subjects without any split, one shard, codes LATE (in the run's lookups), NEW (described) and N1."""
    events: list[Event] = [
        (s, float(d), code, None) for s, code in ((1, "LATE"), (2, "NEW"), (3, "N1")) for d in (0, 1)
    ]
    root = write_meds(folder / "new", {"part-0": events}, codes=[("NEW", "Asthma", None)], subject_splits=False)
    write_labels(root / "labels" / "later", [(1, 0.5, True), (3, 5.0, False)])
    return root


def predicted(folder: Path, *overrides: str) -> pl.DataFrame:
    given = (f"run={folder / 'moved'}", f"output={folder / 'out' / 'p.parquet'}")
    return pl.read_parquet(predict(composed(*given, *overrides, name="predict")))


def test_its_own_labels_come_back_as_the_run_wrote_them(folder):
    found = predicted(folder, f"data.root={folder / 'set'}", "task.labels=case", "split=held_out")
    expected = pl.read_parquet(folder / "moved" / "predictions" / "held_out.parquet")
    assert found.schema == expected.schema
    name = "predicted_boolean_probability"
    assert found.drop(name).equals(expected.drop(name)), "the threshold is that of tuning"
    np.testing.assert_allclose(found[name], expected[name], atol=1e-6)
    assert len(predicted(folder, f"data.root={folder / 'set'}", "task.labels=case")) == 150, "all splits"


def test_new_subjects_need_no_split_and_new_codes_have_their_texts(folder, new):
    found = predicted(folder, f"data.root={new}")
    assert found.columns == ["subject_id", "prediction_time", "probability_false", "probability_true"]
    assert found["subject_id"].to_list() == [1, 2, 3]
    predictor = ehr_embed.load(folder / "moved")
    vectors = predictor.run.embedding.table
    known = vectors[predictor.run.vocabulary.strings.index("N1")].numpy()
    by_text = predictor.records.embedder.embed(["Broken leg", "Asthma"])
    records = [np.stack([vector, vector]) for vector in (*by_text, known)]
    np.testing.assert_allclose(found["probability_true"], predictor.predict_proba(records)[:, 1], atol=1e-3)
    assert found["probability_true"].n_unique() == 3


def test_lookups_of_the_new_dataset_win(folder, new, tmp_path):
    pl.DataFrame({"code": ["NEW", "LATE"], "term": ["Rash", "Rash"]}).write_csv(tmp_path / "l.csv")
    p = predicted(folder, f"data.root={new}", f"data.lookups=[{tmp_path / 'l.csv'}]")["probability_true"]
    assert p[0] == pytest.approx(p[1], abs=1e-6)
    assert p[0] != pytest.approx(predicted(folder, f"data.root={new}")["probability_true"][0], abs=1e-4)


def test_labels_choose_times_and_are_written_along(folder, new):
    found = predicted(folder, f"data.root={new}", "task.labels=later")
    assert found["boolean_value"].to_list() == [True, False]
    assert found["subject_id"].to_list() == [1, 3]
    write_labels(new / "labels" / "other", [(1, 0.5, "tall")])
    with pytest.raises(UserError, match=r"label set other: classes tall .*\(false, true\)"):
        predicted(folder, f"data.root={new}", "task.labels=other")


def test_unlabelled_times_are_enough(folder, new, tmp_path):
    times = pl.read_parquet(new / "labels" / "later" / "0.parquet").select("subject_id", "prediction_time")
    times.write_parquet(tmp_path / "times.parquet")
    found = predicted(folder, f"data.root={new}", f"task.labels={tmp_path / 'times.parquet'}")
    assert found.columns == ["subject_id", "prediction_time", "probability_false", "probability_true"]
    assert found.select("subject_id", "prediction_time").equals(times)
    labelled = predicted(folder, f"data.root={new}", "task.labels=later")
    np.testing.assert_allclose(found["probability_true"], labelled["predicted_boolean_probability"], atol=1e-6)
    nulls = times.with_columns(boolean_value=pl.lit(None, pl.Boolean))  # as MEDS-DEV and ACES write an empty column
    nulls.write_parquet(tmp_path / "times.parquet")
    assert predicted(folder, f"data.root={new}", f"task.labels={tmp_path / 'times.parquet'}").equals(found)
    nulls.with_columns(subject_id=pl.Series([1, None])).write_parquet(tmp_path / "times.parquet")
    with pytest.raises(UserError, match=r"times\.parquet, row 1: 1 null .*Drop those rows"):
        predicted(folder, f"data.root={new}", f"task.labels={tmp_path / 'times.parquet'}")


def test_a_run_without_its_threshold_gives_probabilities_only(folder, new, tmp_path):
    shutil.copytree(folder / "moved", tmp_path / "moved")
    (tmp_path / "moved" / "metrics.json").unlink()
    assert len(predicted(tmp_path, f"data.root={new}")) == 3
    with pytest.raises(UserError, match=r"metrics\.json: .*Leave task\.labels out"):
        predicted(tmp_path, f"data.root={new}", "task.labels=later")


def test_several_classes_and_labels(tmp_path):
    root = write_homonyms(tmp_path / "set")
    labels = pl.read_parquet(root / "labels" / "case" / "0.parquet")
    kind = ["abc"[i % 3] for i in range(len(labels))]
    (root / "labels" / "kind").mkdir()
    labels.select("subject_id", "prediction_time", categorical_value=pl.Series(kind)).write_parquet(
        root / "labels" / "kind" / "0.parquet"
    )
    run(config(root, tmp_path / "moved", *KINDS["frozen"], "trainer.epochs=1", "task.labels=kind"))
    found = predicted(tmp_path, f"data.root={root}", "task.labels=kind", "split=held_out")
    expected = pl.read_parquet(tmp_path / "moved" / "predictions" / "held_out.parquet")
    assert found.schema == expected.schema
    assert found["label"].equals(expected["label"])


def test_the_command_line(folder, new, inside):
    output = inside("-m", "ehr_embed.predict", "run=moved", "data.root=new", "output=by/cli.parquet", cwd=folder)
    assert "2 codes were not in train; their texts are read" in output
    assert "3 predictions in by/cli.parquet" in output
    for arguments, message in (
        (["run=nowhere", "data.root=new", "output=x"], "run=nowhere: expected the folder of a finished run"),
        (["run=moved", "output=x"], "data.root is not set"),
        (
            ["run=moved", "data.root=new", "output=x", "split=train"],
            "Expected metadata/subject_splits.parquet",
        ),
        (["run=moved", "data.root=new", "output=x", "device=gpu9"], "device=gpu9: expected auto, cpu or cuda"),
        (["run=moved", "data.root=new", "output=x", "label=y"], "unknown key or group 'label'"),
    ):
        output = inside("-m", "ehr_embed.predict", *arguments, cwd=folder, code=2)
        assert message in output, output
    assert not (folder / "x").exists()


def test_a_dataset_for_training_still_needs_its_splits(new):
    with pytest.raises(UserError, match=r"metadata/subject_splits\.parquet"):
        MedsSource(root=str(new)).read(MedsSource(root=str(new)).shards[0])
