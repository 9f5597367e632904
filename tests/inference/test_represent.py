"""`ehr-embed represent`: what the head reads is written, per record or per event, and nothing later than the prediction time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

import ehr_embed
from ehr_embed.core.errors import UserError
from ehr_embed.experiment.run import run
from ehr_embed.represent import represent
from tests.helpers.configs import CONF, composed
from tests.helpers.entry_points import inside  # noqa: F401 (a fixture)
from tests.helpers.homonyms import KINDS, write_homonyms
from tests.helpers.small_meds import day, write_labels

PRETRAIN = ("task=next_event", "model=decoder_small", "trainer=pretrain_short", "trainer.epochs=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset `set` and runs on it, named by their models."""
    folder = tmp_path_factory.mktemp("place")
    root = write_homonyms(folder / "set")
    for name, overrides in {
        "encoder": (),
        "cls": ("model.pooling=cls",),
        "gru": ("model=gru", "model.pooling=mean"),
        "mean_pool": ("model=mean_pool", "~model.n_layers"),
        "gbm": ("model=gbm", "~model.n_layers", "~model.model_dim"),
    }.items():
        removed = [key.removeprefix("~") for key in overrides if key.startswith("~")]
        kept = [key for key in overrides if not key.startswith("~")]
        run(trained(root, folder / name, *kept, without=removed))
    run(trained(root, folder / "decoder", *PRETRAIN, "task.monitor=perplexity", task=()))
    return folder


def trained(root: Path, run_dir: Path, *overrides: str, without=(), task=("task.labels=case", "task.monitor=auroc")):
    small = [
        "model.model_dim=16",
        "model.n_layers=1",
        "model.max_length=16",
        "trainer.n_bootstrap=0",
        "trainer.epochs=2",
    ]
    small = [key for key in small if key.split("=")[0] not in without]
    chosen = [key for key in overrides if key.startswith(("model=", "trainer=", "task="))]
    groups = {"model": "model=encoder_small", "trainer": "trainer=short"} | {key.split("=")[0]: key for key in chosen}
    rest = [key for key in overrides if key not in chosen]
    return composed(
        "data=meds", f"data.root={root}", "data.min_count=1", *groups.values(), *task, *small, *KINDS["frozen"],
        "trainer.precision=32-true", f"run_dir={run_dir}", f"cache_dir={root.parent / 'cache'}", *rest,
    )  # fmt: skip


def vectors(folder: Path, name: str, *overrides: str) -> pl.DataFrame:
    given = (f"run={folder / name}", f"data.root={folder / 'set'}", f"output={folder / 'out' / 'v.parquet'}")
    return pl.read_parquet(represent(composed(*given, *overrides, name="represent")))


@pytest.mark.parametrize("name", ["encoder", "cls", "gru"])
def test_the_classes_are_a_linear_map_of_the_vectors(folder, name):
    found = vectors(folder, name, "task.labels=case", "split=held_out")
    assert found.columns == ["subject_id", "prediction_time", "boolean_value", "vector"]
    predictor = ehr_embed.load(folder / name)
    classes = predictor.run.model.head.classes
    logits = found["vector"].to_numpy() @ classes.weight.detach().numpy().T + classes.bias.detach().numpy()
    odds = np.exp(logits[:, 1] - logits[:, 0])
    expected = predictor.predict_proba(str(folder / "set"), labels="case", split="held_out")
    expected = expected.join(found.select("subject_id"), on="subject_id", how="right")
    np.testing.assert_allclose(odds / (1 + odds), expected["probability_true"], atol=1e-6)
    assert found["boolean_value"].to_list() == [subject % 2 == 0 for subject in found["subject_id"]]


def test_the_file_holds_lists_of_a_fixed_size(folder):
    vectors(folder, "mean_pool")
    kind = pq.read_schema(folder / "out" / "v.parquet").field("vector").type
    assert pa.types.is_fixed_size_list(kind)
    assert (kind.list_size, kind.value_type) == (16, pa.float32())


@pytest.mark.parametrize("name", ["encoder", "cls", "gru"])
def test_a_row_per_event_holds_the_events_that_were_visible(folder, name, tmp_path):
    write_labels(tmp_path / "times", [(200, 1.5, True), (201, 99.0, False), (202, 0.0, True)])
    found = vectors(folder, name, f"task.labels={tmp_path / 'times'}", "per=event")
    data = pl.read_parquet(folder / "set" / "data" / "held_out" / "*.parquet")
    asked = found.select("subject_id", "prediction_time").unique()
    expected = data.join(asked, on="subject_id").filter(pl.col("time") <= pl.col("prediction_time"))
    keys = ["subject_id", "time", "code"]
    assert found.select(keys).sort(keys).equals(expected.select(keys).sort(keys))
    assert (found["time"] <= found["prediction_time"]).all()


def test_the_mean_over_events_is_the_record(folder):
    record = vectors(folder, "encoder", "task.labels=case", "split=held_out").sort("subject_id")["vector"].to_numpy()
    events = vectors(folder, "encoder", "task.labels=case", "split=held_out", "per=event").sort(
        "subject_id", maintain_order=True
    )
    means = np.stack(
        [part["vector"].to_numpy().mean(0) for part in events.partition_by("subject_id", maintain_order=True)]
    )
    np.testing.assert_allclose(means, record, atol=1e-5)
    largest = vectors(folder, "encoder", "task.labels=case", "split=held_out", "pooling=max").sort("subject_id")
    assert (largest["vector"].to_numpy() >= means - 1e-5).all()


def test_what_follows_a_prediction_time_changes_nothing(folder, tmp_path):
    """A pretrained, causal model: an event's vector is the same at an early and at a late prediction time."""
    pl.DataFrame({"subject_id": [200, 200], "prediction_time": [day(1.5), day(99.0)]}).write_parquet(
        tmp_path / "t.parquet"
    )
    found = vectors(folder, "decoder", f"task.labels={tmp_path / 't.parquet'}", "per=event")
    assert found.columns == ["subject_id", "prediction_time", "time", "code", "vector"]
    early, late = (part["vector"].to_numpy() for part in found.partition_by("prediction_time", maintain_order=True))
    assert (len(early), len(late)) == (2, 5)
    np.testing.assert_allclose(early, late[:2], atol=1e-5)
    last = vectors(folder, "decoder", f"task.labels={tmp_path / 't.parquet'}")["vector"].to_numpy()
    np.testing.assert_allclose(last, np.stack([early[-1], late[-1]]), atol=1e-5)


def test_a_subject_has_one_row_at_its_last_time(folder, tmp_path):
    rows = [(200, 1.5, True), (200, 3.0, False), (201, 2.0, True)]
    write_labels(tmp_path / "two", rows)
    found = vectors(folder, "encoder", f"task.labels={tmp_path / 'two'}", "per=subject").sort("subject_id")
    assert found["prediction_time"].to_list() == [day(3.0), day(2.0)]
    assert found["boolean_value"].to_list() == [False, True]
    assert len(vectors(folder, "encoder", "per=subject")) == 150, "all subjects at their last event"


def test_a_model_that_counts_codes_says_that_it_does_not_see_new_texts(folder, caplog):
    predictor = ehr_embed.load(folder / "gbm")
    known = predictor.run.vocabulary.texts[5]
    predictor.predict_proba([[known]])
    assert "does not see" not in caplog.text
    first, second = predictor.predict_proba([["Never heard of"], ["Nor of this"]])
    assert first.tolist() == second.tolist()
    assert "2 of the texts, such as 'Never heard of'" in caplog.text
    assert "GBM counts codes" in caplog.text
    assert "does not see" in caplog.text


def test_it_is_refused_where_there_is_no_vector(folder):
    for name, overrides, message in (
        ("gbm", (), "GBM .*Choose a run"),
        ("mean_pool", ("per=event",), "per=event: .*Type: per=prediction_time"),
        ("mean_pool", ("pooling=max",), "pooling=max: .*Type: pooling=auto"),
        ("encoder", ("per=evnt",), "unknown per 'evnt': did you mean 'event'"),
        ("encoder", ("pooling=first",), "unknown pooling 'first'"),
    ):
        with pytest.raises(UserError, match=message):
            vectors(folder, name, *overrides, f"output={folder / 'none.parquet'}")
    assert not (folder / "none.parquet").exists()


def test_the_probe_of_the_help_runs(folder, inside):
    for split in ("train", "held_out"):
        arguments = ("run=encoder", "data.root=set", "task.labels=case", f"split={split}", f"output={split}.parquet")
        assert "50 vectors in" in inside("-m", "ehr_embed.represent", *arguments, cwd=folder)
    header = OmegaConf.load(CONF / "represent.yaml").hydra.help.header
    probe = re.search(r"^( +import polars.*)", header, re.DOTALL | re.MULTILINE)
    assert probe
    lines = [line.strip() for line in probe[1].strip().splitlines()]
    assert len(lines) == 5
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=folder, capture_output=True, text=True, check=True
    )
    assert 0 <= float(done.stdout.split()[1]) <= 1
