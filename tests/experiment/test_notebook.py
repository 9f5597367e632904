"""Composing and training in Python, as a notebook does, gives the run of the command line, its results and figures."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import polars as pl
import pytest
from matplotlib.figure import Figure

import ehr_embed
from docs.hooks import notebook_page
from docs.notebooks import digest
from ehr_embed.core.errors import UserError
from tests.helpers.configs import composed
from tests.helpers.entry_points import metrics_of
from tests.helpers.small_meds import ROOT

NOTEBOOKS = sorted(path.name for path in (ROOT / "docs").glob("*.ipynb"))


def cells(name: str) -> list[dict]:
    notebook = json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The names after all cells of a notebook ran in a folder; a cell that ends in a value must hold what it shows."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EHR_EMBED_CACHE", str(folder / "cache"))
    names: dict = {}
    for cell in cells(name):
        body = ast.parse("".join(cell["source"]))
        last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
        exec(compile(body, name, "exec"), names)
        kept = [output["data"] for output in cell["outputs"] if output["output_type"] == "execute_result"]
        if last is None:
            assert kept == [], cell["source"]
            continue
        value = eval(compile(ast.Expression(last.value), name, "eval"), names)
        if value is not None:
            assert len(kept) == 1, cell["source"]
            assert ("image/png" in kept[0]) == isinstance(value, Figure)
            assert ("text/html" in kept[0]) == isinstance(value, pl.DataFrame)
    return names


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_holds_what_its_cells_gave(name):
    notebook = json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))
    assert notebook["metadata"]["executed"]["code"] == digest(notebook), (
        "a cell changed. Type: python docs/notebooks.py"
    )
    outputs = [output for cell in cells(name) for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    results = [output["data"] for output in outputs if output["output_type"] == "execute_result"]
    tables = [data for data in results if "<table" in "".join(data.get("text/html", []))]
    pictures = [data for data in results if "image/png" in data]
    assert tables
    page = notebook_page(notebook, name)
    assert (page.count("<table>"), page.count('src="data:image/png;base64,iVBOR')) == (len(tables), len(pictures))
    assert not re.search(r"(?<![\w.])/(?:tmp|home|root|work)/", page), "a folder of a machine"


def test_the_notebook_runs(tmp_path, monkeypatch):
    run = executed("notebook.ipynb", tmp_path, monkeypatch)["run"]
    assert run.metrics == metrics_of(tmp_path / "runs" / "notebook")
    assert re.fullmatch(r"FinishedRun\('runs/notebook', auroc: held_out 0\.\d+, tuning 0\.\d+\)", repr(run))
    assert len(run.predictions("tuning")) == run.metrics["tuning"]["n"] == 150
    assert run.history["epoch"].to_list() == [1, 2, 3]
    for figure in (run.plot_loss(), run.plot_roc(), run.plot_precision_recall(), run.plot_calibration()):
        assert isinstance(figure, Figure)
        assert figure._repr_png_().startswith(b"\x89PNG")
    assert pl.read_ndjson(tmp_path / "runs" / "notebook" / "metrics.jsonl").equals(run.history)


@pytest.mark.slow
def test_the_notebook_of_ones_own_data_runs(tmp_path, monkeypatch):
    names = executed("notebook_data.ipynb", tmp_path, monkeypatch)
    assert names["transformer"].metrics["held_out"]["auroc"]["value"] > 0.7, "the signs of illness are learned"
    assert names["risk"][0] > names["risk"][1] + 0.1, "words that were never seen are understood"


@pytest.mark.slow
def test_the_notebook_of_questions_runs(tmp_path, monkeypatch):
    names = executed("notebook_asking.ipynb", tmp_path, monkeypatch)
    assert len(names["answers"].questions) == 2


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
