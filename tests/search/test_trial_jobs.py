"""Folders count as runs by what lies in them, and a study knows its dataset."""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl
from omegaconf import OmegaConf

from ehr_embed.comparison.results import find_runs
from ehr_embed.config.instantiate import MEDS
from ehr_embed.experiment.searched import SearchedRuns


def test_the_run_of_an_earlier_stage_is_no_rival_of_its_own(tmp_path):
    for folder in ("0", "0/pretrain", "1", "other/2"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "metrics.json").write_text("{}")
    assert find_runs([tmp_path]) == [tmp_path / "0", tmp_path / "1", tmp_path / "other" / "2"]
    assert find_runs([tmp_path / "0" / "pretrain"]) == [tmp_path / "0" / "pretrain"], "asked for by name it is compared"


def test_a_study_knows_its_dataset_wherever_it_lies(tiny, tmp_path):
    def identity(root: Path) -> str | None:
        return SearchedRuns().data_identity(
            OmegaConf.create({"data": {"root": str(root), "source": {"_target_": MEDS}}})
        )

    elsewhere = shutil.copytree(tiny, tmp_path / "elsewhere" / "under_another_name")
    assert identity(tiny) == identity(elsewhere)
    shard = next((elsewhere / "data" / "train").glob("*.parquet"))
    pl.read_parquet(shard).head(-1).write_parquet(shard)
    assert identity(tiny) != identity(elsewhere)
    assert (
        SearchedRuns().data_identity(OmegaConf.create({"data": {"root": "demo", "source": {"_target_": "x.demo"}}}))
        is None
    )
