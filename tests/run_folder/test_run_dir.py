"""Nothing but a run's own files is replaced in `run_dir`; a key has one value; every command checks its keys."""

from __future__ import annotations

import re

import polars as pl
import pytest
from omegaconf import OmegaConf

from ehr_embed.config.check import check_config
from ehr_embed.config.keys import ExplainKeys, GenerateKeys, PredictKeys
from ehr_embed.core.errors import UserError
from ehr_embed.experiment.cli import refuse_repeated, refuse_separated
from ehr_embed.experiment.run import run
from ehr_embed.inference.trajectories import write_futures
from ehr_embed.run_folder.checkpoints import read_checkpoint
from ehr_embed.run_folder.contents import refuse_other_contents, remove_results
from ehr_embed.run_folder.resume import claimed, find_run
from tests.helpers.configs import composed
from tests.helpers.entry_points import inside  # noqa: F401 (fixture)
from tests.helpers.refusals import refused
from tests.helpers.ward import SMALL, trained, ward  # noqa: F401 (fixtures)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", ["auto", "force", "overwrite"])
def test_a_dataset_is_not_written_into(ward, how):
    before = files(ward)
    with pytest.raises(UserError, match=r"MEDS dataset.*run_dir=ANOTHER"):
        run(composed("data=meds", f"data.root={ward}", *SMALL, f"run_dir={ward}", f"resume={how}"))
    assert files(ward) == before


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml.bak", "metrics.xlsx", "my_checkpoint_v2.pt", "src/a.py"])
def test_a_folder_of_something_else_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    for how in ("auto", "overwrite"):
        with pytest.raises(UserError, match=r"run_dir=ANOTHER"):
            find_run(tmp_path, {}, how=how)
    assert files(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize(
    "names",
    [(), (".lock",), ("config.yaml",), ("log.txt", "outcome.json"), ("pretrain/config.yaml",), ("metrics.jsonl",)],
)
def test_a_new_folder_and_one_that_a_kill_left_are_taken(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    refuse_other_contents(tmp_path)
    refuse_other_contents(tmp_path / "absent")


def test_overwriting_removes_what_the_run_wrote_and_nothing_else(tmp_path):
    own = (
        "metrics.json", "metrics.jsonl", "summary.json", "best_checkpoint.pt", "latest_checkpoint.pt",
        "checkpoint_epoch_10.pt", "predictions/held_out.parquet", "plots/roc.png", "wandb_id.txt", "config.yaml",
        "environment.json",
    )  # fmt: skip
    mine = ("metrics.xlsx", "my_checkpoint_v2.pt", "predictions/mine.parquet", "plots/paper.png", "notes.md")
    for name in (*own, *mine):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    refuse_other_contents(tmp_path)
    with claimed(tmp_path, is_new=True):
        pass
    left = set(files(tmp_path)) - {".lock"}
    assert left == {*mine, "config.yaml", "environment.json"}, "config.yaml is written over, not removed"
    (tmp_path / "plots" / "paper.png").unlink()
    remove_results(tmp_path)
    assert not (tmp_path / "plots").exists()
    assert (tmp_path / "predictions").exists()


def test_every_result_of_a_run_is_known(trained, tmp_path):
    names = {path.name for path in trained.iterdir() if not path.name.startswith(".")}
    for name in names:
        (tmp_path / name).touch()
    refuse_other_contents(tmp_path)
    for name in names & {"config.yaml", "environment.json", "best_checkpoint.pt", "latest_checkpoint.pt"}:
        (tmp_path / name).unlink()
    refuse_other_contents(tmp_path)


def test_sampled_futures_replace_no_shards(tmp_path):
    pl.DataFrame({"subject_id": [1], "code": ["A"]}).write_parquet(tmp_path / "0.parquet")
    (tmp_path / "2020_notes.parquet").write_text("mine")
    before = files(tmp_path)
    with refused("0.parquet", "output=ANOTHER_FOLDER"):
        write_futures(pl.DataFrame(), tmp_path, n_samples=1)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["model=encoder", "model=gru"], "model=encoder and model=gru.*type: -m model=encoder,gru"),
        (["seed=1", "run_dir=a", "seed=2"], r"seed=\S+ and seed=\d: .*type: -m seed="),
        (["+trainer.x=1", "++trainer.x=2"], r"trainer\.x=1 and trainer\.x=2"),
        (["-m", "seed=1,2", "seed=3"], r"seed=\S+ and seed=\d: .*type: -m seed="),
        (["task.labels=[a]", "task.labels=[b]"], r"task\.labels=\[a\] and task\.labels=\[b\]"),
    ],
)
def test_a_key_is_given_once(arguments, told):
    with pytest.raises(UserError, match=told):
        refuse_repeated(arguments)


def test_what_is_no_repetition_passes():
    refuse_repeated(
        ["seed=1", "seed=1", "--config-dir", "a", "--config-dir=b", "~x=1", "~x=2", "model=gru", "model.n_layers=1"]
    )


def test_options_between_overrides_are_refused_with_the_command_in_order(tmp_path, inside):
    output = inside("train.py", "model=gru", "--config-dir", "my", "seed=1", "run_dir=x", cwd=tmp_path, code=2)
    assert "train.py --config-dir my model=gru seed=1 run_dir=x" in output
    assert list(tmp_path.iterdir()) == []
    for arguments in (["--config-dir", "my", "model=gru", "seed=1"], ["-m", "seed=1,2"], ["model=gru", "--cfg", "job"]):
        refuse_separated(arguments, "train")


def test_two_models_are_refused_by_the_command_line(tmp_path, inside):
    output = inside("train.py", "model=encoder", "model=gru", cwd=tmp_path, code=2)
    assert "model is given twice" in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "override", "told"),
    [
        ("predict", "output=3", r"output=3: expected a file or folder"),
        ("predict", "run=???", r"run is not set"),
        ("predict", "trusted_packages=my", r"trusted_packages=my: expected a list"),
        ("predict", "data.lookups=a.csv", r"data\.lookups=a\.csv: expected a list"),
        ("explain", "tolerance=nan", r"tolerance=nan: expected a finite number"),
        ("explain", "subject=first", r"subject=first: expected a subject_id"),
        ("explain", "max_samples=few", r"max_samples=few: expected 1 or more, got the text 'few'"),
        ("generate", "horizon_days=inf", r"horizon_days=inf: expected a finite number"),
        ("generate", "stop_codes=MEDS_DEATH", r"stop_codes=MEDS_DEATH: expected a list"),
        ("generate", "seed=-1", r"seed=-1: expected a whole number"),
        ("generate", "use_cache=3", r"use_cache=3: expected true or false"),
    ],
)
def test_commands_for_a_finished_run_check_their_keys(tmp_path, monkeypatch, inside, name, override, told):
    wanted = {"run=x", "data.root=x", "output=x"} if name == "predict" else {"run=x"}
    arguments = [line for line in sorted(wanted) if line.partition("=")[0] != override.partition("=")[0]]
    output = inside("-m", f"ehr_embed.{name}", *arguments, override, cwd=tmp_path, code=2)
    assert re.search(told, output), output
    assert list(tmp_path.iterdir()) == []


def test_shipped_configurations_of_the_commands_pass():
    for name, keys, needed in (
        ("predict", PredictKeys, ("run=x", "data.root=x", "output=x")),
        ("explain", ExplainKeys, ("run=x",)),
        ("generate", GenerateKeys, ("run=x",)),
    ):
        check_config(OmegaConf.create(composed(*needed, name=name)), keys)


def test_a_run_without_a_first_epoch_is_told_by_the_key_that_was_typed(tmp_path):
    (tmp_path / "config.yaml").touch()
    with refused(f"run={tmp_path}", "has not finished its first epoch", f"run_dir={tmp_path}"):
        read_checkpoint(tmp_path, key="run")
    with refused(f"init_from={tmp_path / 'absent.pt'}", "Give the run_dir of a finished run"):
        read_checkpoint(tmp_path / "absent.pt")
