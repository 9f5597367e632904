"""Mistakes that a second can find are refused before the event store is built; check=true says what would be done."""

from __future__ import annotations

import json
import math
import re
import sys

import polars as pl
import pytest
import torch
from omegaconf import open_dict

from ehr_embed.core.errors import UserError
from ehr_embed.experiment import stage
from ehr_embed.experiment.preflight import check_model
from ehr_embed.experiment.run import run
from tests.helpers.configs import CONF, composed
from tests.helpers.small_meds import write_labels

MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
SMALL = ("model=encoder_small", "trainer=short", "trainer.epochs=1", "trainer.n_bootstrap=0", "embedder=hashing")


@pytest.fixture
def refused(tiny, tmp_path, monkeypatch):
    """Run the tiny dataset with overrides, and return the message with which it is refused before any data are prepared."""

    def fail(*arguments, **options):
        raise AssertionError("the store was asked for")

    monkeypatch.setattr(stage, "prepare_from", fail)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)

    def message(*overrides: str) -> str:
        given = [key for key in SMALL if key.split("=")[0] not in {o.split("=")[0] for o in overrides}]
        cfg = composed(
            "data=meds", f"data.root={tiny}", "data.min_count=1", f"cache_dir={tmp_path / 'cache'}",
            f"run_dir={tmp_path / 'run'}", *given, *overrides,
        )  # fmt: skip
        with pytest.raises(UserError) as error:
            run(cfg)
        assert not (tmp_path / "run").exists()
        assert not (tmp_path / "cache").exists()
        return str(error.value)

    return message


def test_a_misspelt_label_set(refused):
    assert re.search(r"unknown task\.labels 'outcom': did you mean 'outcome'", refused("task.labels=outcom"))


def test_a_label_of_a_wrong_dtype(refused, tiny):
    (tiny / "labels" / "scores").mkdir()
    labels = pl.read_parquet(tiny / "labels" / "outcome" / "0.parquet")
    labels.with_columns(boolean_value=pl.lit(0.5)).write_parquet(tiny / "labels" / "scores" / "0.parquet")
    assert "`boolean_value` has dtype Float64" in refused("task.labels=scores")


def test_heads_that_do_not_divide(refused):
    assert re.search(r"n_heads=5.*model_dim", refused("model.n_heads=5", "model.model_dim=16"))


def test_a_package_that_is_not_trusted(refused, tmp_path, monkeypatch):
    (tmp_path / "strange_package.py").write_text("class Net: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "trusted_packages=[strange_package]" in refused("model._target_=strange_package.Net")
    assert "strange_package" not in sys.modules


def test_an_empty_tuning_split(refused, tiny):
    path = tiny / "metadata" / "subject_splits.parquet"
    pl.read_parquet(path).with_columns(split=pl.col("split").replace("tuning", "train")).write_parquet(path)
    message = refused("task.labels=outcome")
    assert "the split tuning has no subjects" in message
    assert "data.splits=FILE.parquet" in message


def test_an_empty_tuning_split_of_folders(refused, tiny):
    (tiny / "metadata" / "subject_splits.parquet").unlink()
    (tiny / "data" / "tuning" / "0.parquet").unlink()
    assert "the split tuning has no subjects (found: held_out 3, train 3)" in refused("task.labels=outcome")


def test_a_split_with_one_class(refused, tiny):
    subjects = [10, 11, 12, 20, 21, 22, 30, 31, 32]
    write_labels(tiny / "labels" / "never", [(s, 2.0, s % 2 == 1 and s != 21) for s in subjects])
    assert re.search(r"split tuning: only one class.*false: 3, true: 0", refused("task.labels=never"))
    write_labels(tiny / "labels" / "elsewhere", [(s + 500, 2.0, s % 2 == 1) for s in subjects])
    assert "none of its subjects (such as 510) is in a split" in refused("task.labels=elsewhere")
    write_labels(tiny / "labels" / "untuned", [(s, 2.0, s % 2 == 1) for s in subjects if s // 10 != 2])
    assert "no labels for the tuning split" in refused("task.labels=untuned")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(refused):
    bundled = ("embedder=minilm_l6", "task.labels=outcome")
    assert "embedder.device=cuda: torch finds 0 GPUs here. Type: embedder.device=auto" in refused(
        *bundled, "embedder.device=cuda"
    )
    assert "embedder.device=cuda:3" in refused(*bundled, "embedder.device=[cuda:3]")
    assert "embedder.device=gpu: expected auto, cpu, cuda" in refused(*bundled, "embedder.device=gpu")
    assert "trainer.accelerator=cpu" in refused("trainer.accelerator=cuda", "task.labels=outcome")


def test_weights_and_biases_online_without_a_key(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    message = refused("tracker=wandb", "tracker.mode=online", "task.labels=outcome")
    assert "Type: wandb login, or tracker.mode=auto" in message


def test_the_second_stage_is_checked_before_the_first(refused):
    stages = (
        "experiment=pretrain_then_finetune",
        "task.labels=outcom",
        "embedder=hashing",
        "pretrain.trainer.epochs=1",
    )
    assert "did you mean 'outcome'" in refused(*stages)


@pytest.mark.parametrize("model", MODELS)
def test_no_model_that_can_be_built_is_refused(model):
    n_outputs = 1 if model == "ridge" else 2  # which predicts a number
    check_model(composed("data=meds", f"model={model}"), num_classes=n_outputs)


def test_the_outlook_says_what_would_be_done_and_does_nothing(tiny, tmp_path, capsys):
    overrides = ("data=meds", f"data.root={tiny}", "data.min_count=1", "task.labels=outcome", *SMALL, "check=true")
    where = (f"cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}")
    assert math.isnan(run(composed(*overrides, *where)))
    told = dict(re.split(r" {2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert told["data"] == "tiny: 9 subjects, 45 events in 3 files"
    assert told["label outcome"] == (
        "train 3 (false 2, true 1), tuning 3 (false 2, true 1), held_out 3 (false 2, true 1)"
    )
    assert told["texts"].startswith("5 codes, 1 of them with value bins: at most 15 texts")
    assert re.match(r"[\d.]+% of all events have a text", told["coverage"])
    assert "without a GPU" not in told, "the model is small"
    assert re.fullmatch(r"Encoder, [\d,]+ parameters", told["model"])
    assert told["training"] == "at most 1 epochs of 1 batches of 3 samples, about 5 events each"
    assert re.match(r"about 1 s an epoch on cpu in \S+ with \d+ threads, at most 1 s in all", told["time"])
    assert re.match(r"about \d+\.\d GiB", told["memory"])
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "overrides", [("task=next_event", "model=decoder_small"), ("model=gbm",), ("model=mean_pool",)]
)
def test_the_outlook_of_other_tasks_and_models(tiny, tmp_path, capsys, overrides):
    groups = {key.split("=")[0] for key in overrides}
    small = [key for key in SMALL if key.split("=")[0] not in groups]
    labels = [] if "task" in groups else ["task.labels=outcome"]
    run(
        composed("data=meds", f"data.root={tiny}", *labels, *small, *overrides, "check=true", f"cache_dir={tmp_path}/c")
    )
    output = capsys.readouterr().out
    assert ("not estimated" if "gbm" in overrides[0] else "an epoch on cpu") in output


OWN_TASKS = """
from ehr_embed.api import Classification
class Counts(Classification):
    sizes = {"num_classes": 1}
    def label_sets(self, labels_dir):
        return []
class Late(Counts):
    @property
    def sizes(self):
        return {"num_classes": len(self.found_in_data)}
"""


def test_the_outlook_of_a_task_of_ones_own_counts_its_outputs_or_says_that_it_does_not_know(
    tiny, tmp_path, capsys, monkeypatch
):
    (tmp_path / "tasks_without_labels.py").write_text(OWN_TASKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = ("data=meds", f"data.root={tiny}", *SMALL[1:], "model=mean_pool", "model.model_dim=8", "data.values=bins",
            "check=true")  # fmt: skip
    own = ("trusted_packages=[tasks_without_labels]", f"cache_dir={tmp_path}/c", "embedder.embedding_dim=16")
    run(composed(*data, *own, "task._target_=tasks_without_labels.Counts"))
    weights = 16 * 2 + (16 * 8 + 8) + (8 * 8 + 8) + (8 + 1)  # norm, projection, hidden layer and one output
    output = capsys.readouterr().out
    assert int(re.search(r"MeanPool, ([\d,]+) parameters", output)[1].replace(",", "")) == weights
    run(composed(*data, *own, "task._target_=tasks_without_labels.Late"))
    output = capsys.readouterr().out
    assert "MeanPool; parameters, time and memory not estimated: Late" in output
    run(composed(*data, "task=time_to_event", "task.outcomes={b: {codes: [B]}}", f"cache_dir={tmp_path}/c"))
    assert "not estimated: TimeToEvent" in capsys.readouterr().out


def test_the_outlook_of_an_ensemble_tells_each_member(tiny, tmp_path, capsys):
    members = ("+ensemble.members.own.seeds=2", "+model@ensemble.members.trees.model=gbm",
               "ensemble.members.trees.model.max_length=256")  # fmt: skip
    data = ("data=meds", f"data.root={tiny}", "task.labels=outcome", f"cache_dir={tmp_path / 'cache'}")
    run(composed(*data, *SMALL, *members, "check=true", f"run_dir={tmp_path / 'run'}"))
    models = re.findall(r"^model +(.*), [\d,]+ parameters$", capsys.readouterr().out, flags=re.MULTILINE)
    assert models == ["Ensemble of 3 members", "GBM", "Encoder", "Encoder"]


def test_a_run_after_its_check_is_that_run(tiny, tmp_path):
    """`check` is no setting of the run: what it found is trained without a complaint, and continued later."""
    overrides = ("data=meds", f"data.root={tiny}", "data.min_count=1", "task.labels=outcome", *SMALL)
    where = (f"cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}", "model.model_dim=16")
    run(composed(*overrides, *where, "check=true"))
    value = run(composed(*overrides, *where))
    assert value == json.loads((tmp_path / "run" / "metrics.json").read_text())["tuning"]["auroc"]["value"]
    earlier = composed(*overrides, *where)
    with open_dict(earlier):
        del earlier["check"]  # as a configuration of an earlier version
    assert run(earlier) == value
