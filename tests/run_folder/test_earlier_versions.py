"""Runs, checkpoints and searches of a version with another layout are opened, resumed, replayed and continued."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from omegaconf import OmegaConf

import ehr_embed
from ehr_embed.comparison.compare import compare
from ehr_embed.comparison.results import read_config
from ehr_embed.config.instantiate import check_stored, instantiate
from ehr_embed.core.errors import UserError
from ehr_embed.core.moved import DEFINITIONS, MODULES, PACKAGE, new_name, renamed
from ehr_embed.run_folder.checkpoints import read_checkpoint
from ehr_embed.run_folder.resume import differences
from tests.helpers.entry_points import inside, metrics_of  # noqa: F401
from tests.helpers.small_meds import ROOT

LEFT = ROOT / "tests" / "fixtures" / "ab44340"
SMALL = (
    "embedder=hashing",
    "embedder.embedding_dim=16",
    "data.n_subjects=200",
    "model.n_layers=1",
    "model.model_dim=16",
)
SMALL += ("trainer.batch_size=8", "trainer.n_bootstrap=20", "trainer.precision=32-true", "trainer.save_every=100")
OLD_SETTINGS = "ehr_embed.trainer.TrainerSettings"
ROUNDING = 2e-3
"""Between processors, on metrics and probabilities; 30 subjects make an AUROC move by no less than 0.006."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder as the earlier version's user has it; the cohort is made by the first run here."""
    folder = tmp_path_factory.mktemp("earlier")
    for name in ("finished", "unfinished"):
        shutil.copytree(LEFT / name, folder / "runs" / name)
    shutil.copytree(LEFT / "search", folder / "multirun" / "rates")
    return folder


@pytest.fixture
def cohort(place, inside) -> str:
    if not (place / "cache" / "demo-200-0").exists():
        inside("embed.py", *SMALL[:3], cwd=place)
    return str(place / "cache" / "demo-200-0")


def test_every_module_and_target_of_the_earlier_version_is_found():
    for name in (LEFT / "names.txt").read_text().split():
        now = new_name(name)
        parts = now.split(".")
        if parts[-1][0].isupper() or parts[-1].endswith("_source"):
            assert callable(getattr(importlib.import_module(".".join(parts[:-1])), parts[-1])), now
        else:
            importlib.import_module(now)


@pytest.mark.parametrize("table", [DEFINITIONS, MODULES], ids=["definitions", "modules"])
def test_a_new_name_exists_is_final_and_is_ours(table):
    for old, new in table.items():
        now = new_name(f"{PACKAGE}.{old}")
        assert now == f"{PACKAGE}.{new}"
        assert new_name(now) == now
        module, _, name = now.rpartition(".")
        found = getattr(importlib.import_module(module), name) if table is DEFINITIONS else importlib.import_module(now)
        assert found is not None


def test_no_new_name_leads_out_of_what_a_stored_configuration_may_build():
    for target in (
        "ehr_embed.files.os.system",
        "ehr_embed.unpickle.pickle.loads",
        "ehr_embed.trainer.signal.raise_signal",
    ):
        with pytest.raises(UserError, match="_target_"):
            instantiate(OmegaConf.create({"_target_": target}))
    for group in ("model", "task", "embedder"):
        stored = {group: {"_target_": OLD_SETTINGS}}
        with pytest.raises(UserError, match="_target_"):
            check_stored(renamed(stored), group)


def test_an_old_target_of_ones_own_yaml_is_built(place):
    config = OmegaConf.load(place / "runs" / "finished" / "config.yaml")
    assert config.trainer["_target_"] == OLD_SETTINGS
    assert instantiate(config.trainer).epochs == 3
    config.trainer.epochs = "three"
    with pytest.raises(UserError, match=r"trainer\.epochs=three: expected .*got the text 'three'"):
        instantiate(config.trainer)


def test_a_new_name_is_no_other_setting(place):
    there = {"trainer": {"_target_": OLD_SETTINGS}, "model": {"_target_": "ehr_embed.models.encoder.Encoder"}}
    here = {"trainer": {"_target_": new_name(OLD_SETTINGS)}, "model": {"_target_": "ehr_embed.models.gru.GRU"}}
    changed = ["model._target_ was ehr_embed.models.encoder.Encoder, now ehr_embed.models.gru.GRU"]
    assert differences(there, here) == changed
    assert differences(here, there)[0].endswith("now ehr_embed.models.encoder.Encoder")
    assert read_config(place / "runs" / "finished")["trainer._target_"] == new_name(OLD_SETTINGS)
    assert read_checkpoint(place / "runs" / "finished")[1]["config"]["trainer"]["_target_"] == new_name(OLD_SETTINGS)


def test_a_finished_run_predicts_as_it_did(place, cohort):
    run = ehr_embed.load(place / "runs" / "finished")
    there = pl.read_parquet(LEFT / "finished" / "predictions" / "held_out.parquet").sort("subject_id")
    label = next((Path(cohort) / "labels").iterdir()).name
    found = run.predict_proba(cohort, labels=label, split="held_out").sort("subject_id")
    assert found["subject_id"].equals(there["subject_id"])
    probabilities = found[f"probability_{run.class_names[1]}"].to_numpy()
    np.testing.assert_allclose(probabilities, there["predicted_boolean_probability"], atol=ROUNDING)


def test_a_finished_run_is_explained(place, cohort, inside):
    arguments = ("run=runs/finished", "max_samples=2", "min_samples=1", "output=explained", "max_steps=64")
    inside("-m", "ehr_embed.explain", *arguments, cwd=place)
    assert len(pl.read_csv(place / "explained" / "texts.csv")) > 2


def test_a_finished_run_is_left_as_it_is(place, cohort, inside):
    output = inside("train.py", *SMALL, "trainer.epochs=3", "run_dir=runs/finished", cwd=place)
    assert "is finished already" in output


def test_an_unfinished_run_ends_as_if_it_had_not_been_stopped(place, cohort, inside):
    own = ("embedder.trainable=residual", "trainer.checkpoint_every=4", "trainer.epochs=3", "run_dir=runs/unfinished")
    output = inside("train.py", *SMALL, *own, cwd=place)
    assert re.search(r"continuing \S*runs/unfinished at epoch 2, batch \d+ \(step 25\)", output)
    there, here = (
        json.loads((LEFT / "uninterrupted" / "metrics.json").read_text()),
        metrics_of(place / "runs" / "unfinished"),
    )
    assert here["train"]["steps"] == there["train"]["steps"]
    for split in ("tuning", "held_out"):
        for name in ("auroc", "brier"):
            assert here[split][name]["value"] == pytest.approx(there[split][name]["value"], abs=ROUNDING), (split, name)


def test_a_run_is_replayed_from_its_config(place, cohort, inside):
    (place / "old").mkdir()
    shutil.copy(LEFT / "finished" / "config.yaml", place / "old")
    inside("train.py", "--config-path", str(place / "old"), "--config-name", "config", "run_dir=runs/again", cwd=place)
    there, here = metrics_of(place / "runs" / "finished"), metrics_of(place / "runs" / "again")
    assert here["held_out"]["auroc"]["value"] == pytest.approx(there["held_out"]["auroc"]["value"], abs=ROUNDING)
    assert here["tuning"]["brier"]["value"] == pytest.approx(there["tuning"]["brier"]["value"], abs=ROUNDING)
    assert OmegaConf.load(place / "runs" / "again" / "config.yaml").trainer["_target_"] == new_name(OLD_SETTINGS)


def test_a_checkpoint_alone_starts_a_run(place, cohort, inside):
    (place / "alone").mkdir()
    shutil.copy(LEFT / "finished" / "best_checkpoint.pt", place / "alone" / "some.pt")
    own = ("trainer.epochs=1", "init_from=alone/some.pt", "run_dir=runs/started")
    output = inside("train.py", *SMALL, *own, cwd=place)
    assert re.search(r"init_from alone/some\.pt \(epoch \d\): \d+ tensors loaded", output)
    assert metrics_of(place / "runs" / "started")["train"]["epochs"] == 1


@pytest.mark.slow
def test_a_search_is_continued(place, cohort, inside):
    space = ("hydra/sweeper=study", "hydra/sweeper/sampler=random", "trainer.learning_rate=interval(0.001,0.01)")
    own = ("hydra.sweeper.study_name=rates", "hydra.sweeper.n_trials=3", "hydra.sweeper.has_plots=false")
    output = inside("train.py", "-m", *SMALL, "trainer.epochs=1", *space, *own, cwd=place)
    assert re.search(r"trial 2 finished", output)
    assert not re.search(r"trial [01] finished", output)
    table = pl.read_csv(place / "multirun" / "rates" / "summary.csv")
    assert table["state"].to_list() == ["finished"] * 3
    pairs = compare([place / "multirun" / "rates"], place / "compared", n_bootstrap=20)
    assert len(pairs) == 6  # two comparisons with the reference, three metrics


def test_a_member_that_imports_an_old_module_is_told_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "mine_of_old.py").write_text("from ehr_embed.gone import Batch\n\n\nclass Model:\n    pass\n")
    monkeypatch.setitem(MODULES, "gone", "data.batches")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match=r"ehr_embed\.gone.*ehr_embed\.data\.batches.*Import what it needs from ehr_embed\.api"
    ):
        instantiate(OmegaConf.create({"_target_": "mine_of_old.Model"}), trusted=["mine_of_old"])
