"""Mistakes of first-time users: each is refused with what to type, and a strange but legal path just works."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from ehr_embed.core.errors import UserError
from ehr_embed.data.labels import read_labels
from ehr_embed.experiment.cli import _unknown_key
from ehr_embed.sources.meds import MedsSource
from tests.helpers.entry_points import inside  # noqa: F401  (a fixture)
from tests.helpers.refusals import refused
from tests.helpers.small_meds import write_meds

SMALL = ("data=meds", "task.labels=x", "model=mean_pool", "embedder=hashing", "trainer.epochs=1", "trainer.n_bootstrap=10",
         "trainer.threads=1", "audit=off", "cache_dir=cache", "data.aligned_to=none")  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    splits: dict[str, list] = {"train": [], "tuning": [], "held_out": []}
    for subject in range(60):
        split = "train" if subject < 30 else "tuning" if subject < 45 else "held_out"
        splits[split] += [(subject, float(k), f"C//{(subject + k) % 5}", float(k)) for k in range(3)]
    return write_meds(
        tmp_path_factory.mktemp("first") / "data [1],b=c",
        splits,
        codes=[(f"C//{i}", f"Finding {i}", None) for i in range(5)],
        labels={"x": [(subject, 5.0, subject % 2 == 0) for subject in range(60)]},
        subject_splits=False,
    )


@pytest.fixture
def data(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "data")


def rewrite(root: Path, pattern: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Path:
    """Change every file of a dataset that the pattern names, and return the last of them."""
    for file in sorted(root.glob(pattern)):
        change(pl.read_parquet(file, glob=False)).write_parquet(file)
    return file


def read(root: Path) -> None:
    source = MedsSource(root=root)
    for shard in source.shards:
        source.read(shard)


def test_numbers_in_place_of_codes_name_the_stage_of_meds_transforms(data):
    rewrite(data, "data/*/*.parquet", lambda frame: frame.with_columns(pl.col("code").str.slice(3).cast(pl.UInt16)))
    with refused("UInt16", "numericalised", "`normalization`", "Set data.root"):
        read(data)


def test_csv_in_a_split_is_not_left_out(data, caplog):
    file = data / "data" / "train" / "0.parquet"
    pl.read_parquet(file).write_csv(file.with_suffix(".csv"))
    read(data)
    assert "are not read" in caplog.text, "beside parquet it may be a copy"
    file.unlink()
    with refused("train/0.csv", "expected parquet", "read_csv(FILE, try_parse_dates=True).write_parquet"):
        read(data)


def test_folders_of_other_names_get_the_right_ones(data):
    (data / "data" / "tuning").rename(data / "data" / "val")
    (data / "data" / "held_out").rename(data / "data" / "test")
    with refused("data/test/ (for held_out?)", f"mv '{data}/data/val' '{data}/data/tuning'") as caught:
        read(data)
    shell = str(caught.value).partition("Type: ")[2]
    for command in shell.split(" && "):
        _, old, _, new, _ = command.split("'")
        Path(old).rename(new)
    read(data)


def test_labels_given_twice_say_whether_they_contradict_each_other(data):
    rewrite(data, "labels/x/*.parquet", lambda frame: pl.concat([frame, frame.head(2)]))
    with refused("subject 0", "Drop the copies", ".unique()"):
        read_labels("x", data / "labels")
    file = rewrite(data, "labels/x/*.parquet", lambda frame: frame.unique())
    rewrite(data, "labels/x/*.parquet", lambda frame: pl.concat([frame, frame.with_columns(~pl.col("boolean_value"))]))
    with refused("false and true", ": 60", "boolean_value", ".max()") as caught:
        read_labels("x", data / "labels")
    code = str(caught.value).partition("keep one: ")[2].partition(" takes")[0]
    exec(code.replace("FILE", "file"), {"polars": pl, "file": file})
    assert len(read_labels("x", data / "labels").frame) == 60


@pytest.mark.parametrize("pattern", ["labels/x/*.parquet", "data/*/*.parquet"])
def test_times_with_a_zone_are_refused_with_both_ways_out(data, pattern):
    column = "time" if pattern.startswith("data") else "prediction_time"
    rewrite(data, pattern, lambda frame: frame.with_columns(pl.col(column).dt.replace_time_zone("Europe/Berlin")))
    with refused(f"`{column}`", "Europe/Berlin", 'convert_time_zone("UTC")'):
        read_labels("x", data / "labels")
        read(data)


def test_slurms_launcher_without_slurm_ends_in_one_line(tmp_path, inside, monkeypatch):
    monkeypatch.setenv("PATH", "")
    output = inside("train.py", "-m", *SMALL, "data.root=x", "hydra/launcher=submitit_slurm", cwd=tmp_path, code=2)
    assert "no Slurm on this machine" in output
    assert "hydra/launcher=submitit_local" in output


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["model=gru,gbm"], ["one run takes one", "train.py -m model=gru,gbm"]),
        (["seed=0,1"], ["-m seed=0,1", "'seed=[0,1]'"]),
        (["data.root=/a/b,c"], ["\"data.root='/a/b,c'\""]),
        (["data.root=a[1]"], ["inside the quotes of the shell", "\"data.root='a[1]'\""]),
        (["-m", "hydra/launcher=joblib"], ["pip install 'ehr_embed[launchers]'"]),
    ],
)
def test_a_mistake_on_the_command_line_ends_in_what_to_type(words, parts, tmp_path, inside, monkeypatch):
    Plugins.instance()
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], "joblib.yaml", raising=False)
    output = inside("train.py", *words, cwd=tmp_path, code=2)
    assert [part for part in parts if part not in output] == [], output


def test_a_path_with_signs_of_its_own_trains_and_predicts_as_quoted(whole, tmp_path, inside):
    root, run = f"data.root='{whole}'", tmp_path / "runs [2]" / "a=b"
    inside("train.py", *SMALL, root, f"run_dir='{run}'", cwd=tmp_path)
    inside("-m", "ehr_embed.predict", root, f"run='{run}'", "output='[x].parquet'", "threads=1", cwd=tmp_path)
    assert len(pl.read_parquet(tmp_path / "[x].parquet", glob=False)) == 60
    with pytest.raises(UserError, match=r"data\.splits=\S*\[y\]\.parquet"):
        MedsSource(root=whole, splits=tmp_path / "[y].parquet")


def test_a_misspelt_key_of_an_option_of_ones_own_names_the_nearest(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own.yaml").write_text("_target_: my.own.Own\nwidth: 3\nmax_length: 16\n")
    told = _unknown_key("model.widht", "train", ["--config-dir", str(tmp_path), "model=own"])
    assert "did you mean 'width'? Valid: max_length, width" in told


def test_an_outcome_beside_those_of_an_experiment_says_how_to_add_and_how_to_replace(inside, tmp_path):
    preset = ["train.py", "experiment=nafld", "data.root=DIR"]
    asked = ["--cfg", "job", "--package", "task"]
    told = inside(*preset, "task.outcomes={mi: {codes: [X]}}", *asked, cwd=tmp_path, code=2)
    assert "task.outcomes holds death already" in told
    added, _, replaced = told.partition("To have both, type: ")[2].partition("   To have the new one alone: ")
    both = inside(*preset, *shlex.split(added), *asked, cwd=tmp_path)
    alone = inside(*preset, *shlex.split(replaced), *asked, cwd=tmp_path)
    assert "\n  mi:" in both
    assert "\n  mi:" in alone
    assert "\n  death:" in both
    assert "\n  death:" not in alone
