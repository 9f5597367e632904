"""Composing and training in Python, as a notebook does, gives the run of the command line, its results and figures."""

from __future__ import annotations

import json
import re

import polars as pl
import pytest
from matplotlib.figure import Figure

import ehr_embed
from ehr_embed.core.errors import UserError
from tests.helpers.configs import composed
from tests.helpers.entry_points import metrics_of
from tests.helpers.small_meds import ROOT


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EHR_EMBED_CACHE", str(tmp_path / "cache"))
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    run = names["run"]
    assert run.metrics == metrics_of(tmp_path / "runs" / "notebook")
    assert re.fullmatch(r"FinishedRun\('runs/notebook', auroc: held_out 0\.\d+, tuning 0\.\d+\)", repr(run))
    assert len(run.predictions("tuning")) == run.metrics["tuning"]["n"] == 150
    assert run.history["epoch"].to_list() == [1, 2, 3]
    for figure in (run.plot_loss(), run.plot_roc(), run.plot_precision_recall(), run.plot_calibration()):
        assert isinstance(figure, Figure)
        assert figure._repr_png_().startswith(b"\x89PNG")
    assert pl.read_ndjson(tmp_path / "runs" / "notebook" / "metrics.jsonl").equals(run.history)


def test_it_composes_what_the_command_line_composes():
    cfg, expected = ehr_embed.compose("model=gru", "seed=3", "run_dir=x"), composed("model=gru", "seed=3", "run_dir=x")
    assert cfg == expected
    assert "${now" not in ehr_embed.compose().run_dir


def test_options_of_ones_own_are_found(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("_target_: ehr_embed.models.gru.GRU\nmax_length: 8\n")
    assert ehr_embed.compose("model=mine", config_dir=tmp_path).model.max_length == 8


def test_mistakes_are_told_as_on_the_command_line(tmp_path):
    with pytest.raises(UserError, match="model 'n_layer': did you mean 'n_layers'"):
        ehr_embed.compose("model.n_layer=2")
    with pytest.raises(UserError, match=r"seed=1 and seed=2.*type: -m seed=1,2"):
        ehr_embed.compose("seed=1", "seed=2")
    with pytest.raises(UserError, match=r'Type: train\(compose\("seed=1"'):
        ehr_embed.train(ehr_embed.compose(), "seed=2")
    from ehr_embed.reports.finished_run import FinishedRun

    with pytest.raises(UserError, match=r"metrics\.json.*Type: python train\.py run_dir=RUN_DIR"):
        FinishedRun(tmp_path)
