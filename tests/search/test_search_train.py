"""A search of real trainings: what is pruned, recorded, summarised and compared."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from ehr_embed.compare import compare
from ehr_embed.compare import main as compare_main
from ehr_embed.experiment.searched import SearchedRuns
from ehr_embed.search.checks import chosen_directions, example_overrides
from ehr_embed.search.plugin import SWEEPS, register
from ehr_embed.search.space import parse_space
from tests.helpers.search_app.run import trials_of
from tests.helpers.searches import train
from tests.helpers.small_meds import ROOT
from tests.helpers.wandb_offline import OfflineRun, read_offline_runs

SMALL = ("embedder=hashing", "model.n_layers=1", "model.model_dim=16", "data.n_subjects=400", "trainer.n_bootstrap=50")
GOOD, OTHER, BAD = "0.01", "0.005", "1e-08"


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    """Three learning rates, one of them hopeless, recorded by W&B without a network; once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "searched"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            search_rates(folder)
    return folder


def search_rates(folder: Path) -> None:
    output = train(
        "-m",
        "hydra/sweeper=study",
        "hydra/sweeper/sampler=grid",
        "hydra.sweeper.study_name=rates",
        "hydra.sweeper.pruner.n_startup_trials=2",
        "hydra.sweeper.pruner.n_warmup_steps=0",
        f"trainer.learning_rate={GOOD},{OTHER},{BAD}",
        "trainer.epochs=5",
        "trainer.schedule=constant",
        "trainer.warmup_steps=0",
        "tracker=wandb",
        "tracker.mode=offline",
        *SMALL,
        cwd=folder,
    )
    assert "3 runs, best first" in output


def test_a_hopeless_training_is_pruned(searched):
    trials = {trial.params["trainer.learning_rate"]: trial for trial in trials_of(searched, "rates")}
    assert [trials[rate].state.name for rate in (GOOD, OTHER, BAD)] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert len(trials[BAD].intermediate_values) < 5
    folder = searched / "multirun" / "rates"
    assert not (folder / "2" / "metrics.json").exists()
    assert json.loads((folder / "2" / "summary.json").read_text())["state"] == "pruned"
    metrics = json.loads((folder / "0" / "metrics.json").read_text())
    assert trials[GOOD].value == metrics["tuning"]["auroc"]["value"], "the direction and value are the task's"


def test_the_summary_has_metrics_with_intervals_speed_and_size(searched):
    folder = searched / "multirun" / "rates"
    table = pd.read_csv(folder / "summary.csv").set_index("trainer.learning_rate")
    metrics = json.loads((folder / "0" / "metrics.json").read_text())
    best = table.loc[float(GOOD)]
    for end, name in (("value", "held_out/auroc"), ("low", "held_out/auroc/low"), ("high", "held_out/auroc/high")):
        assert best[name] == pytest.approx(metrics["held_out"]["auroc"][end])
    assert best["n_parameters"] == metrics["train"]["n_parameters"]
    assert best["events_per_s"] == pytest.approx(metrics["train"]["events_per_s"])
    assert table["seconds"].notna().all()
    assert table["state"].iloc[-1] == "pruned"
    report = json.loads((folder / "study.json").read_text())
    assert report["best"][0]["run"] in ("0", "1")
    assert report["n_by_state"] == {"finished": 2, "pruned": 1}
    assert "-m hydra/sweeper=study" in report["command"]


def wandb_runs(searched: Path) -> dict[str, OfflineRun]:
    folder = searched / "multirun" / "rates"
    runs = [run for place in (folder / "0", folder / "1", folder / "2", folder) for run in read_offline_runs(place)]
    return {run.run_id: run for run in runs}


def test_wandb_has_one_run_a_trial_and_one_for_the_search(searched):
    runs = wandb_runs(searched)
    assert list(runs) == ["rates-0", "rates-1", "rates-2", "rates-search"]
    assert {run.group for run in runs.values()} == {"rates"}
    assert [run.job_type for run in runs.values()] == ["trial"] * 3 + ["search"]
    assert [run.name for run in runs.values()] == list(runs)
    assert "embedder=hashing" in runs["rates-0"].tags
    assert runs["rates-0"].config["trainer"]["learning_rate"] == float(GOOD)
    assert [run.summary["state"] for run in runs.values()] == ["finished", "finished", "pruned", "finished"]
    assert "pruned" in runs["rates-2"].tags
    assert "pruned" not in runs["rates-0"].tags
    assert len([row for row in runs["rates-2"].history if "tuning/auroc" in row]) < 5


def test_the_search_run_holds_the_table_of_trials(searched):
    run = wandb_runs(searched)["rates-search"]
    table = next(row["tables/trials"] for row in run.history if "tables/trials" in row)
    page = next(row["report/search"] for row in run.history if "report/search" in row)
    assert page["_type"] == "html-file"
    assert (table["_type"], table["nrows"]) == ("table-file", 3)
    (path,) = (searched / "multirun" / "rates").glob(f"wandb/offline-run-*/files/{table['path']}")
    stored = json.loads(path.read_text())
    assert stored["columns"][:3] == ["run", "state", "objective"]
    assert [row[1] for row in stored["data"]] == ["finished", "finished", "pruned"]
    assert run.summary["best/trial"] in ("0", "1")


def test_compare_a_sweep(searched, capsys):
    output = searched / "compared"
    compare_main([str(searched / "multirun" / "rates"), "--output", str(output), "--n-bootstrap", "200"])
    pairs = pd.read_csv(output / "comparisons.csv")
    assert len(pairs) == 3, "one pair of runs with predictions, three metrics"
    auroc = pairs.set_index("metric").loc["auroc"]
    values = [
        json.loads((Path(auroc[which]) / "metrics.json").read_text())["held_out"]["auroc"]["value"]
        for which in ("run", "other")
    ]
    assert auroc["difference"] == pytest.approx(values[0] - values[1], abs=1e-6)
    assert auroc["low"] <= auroc["difference"] <= auroc["high"]
    assert 0 < auroc["p"] <= auroc["p_holm"] <= 1
    assert "minus each other run on held_out" in " ".join(capsys.readouterr().out.split())
    assert {path.name for path in output.iterdir()} >= {"summary.csv", "study.json", "plots", "comparisons.csv"}


def test_compare_runs_by_what_their_configurations_differ_in(searched, tmp_path):
    runs = [searched / "multirun" / "rates" / number for number in "01"]
    for run in runs:
        (tmp_path / run.name).mkdir()
        for name in ("metrics.json", "config.yaml", "predictions"):
            (tmp_path / run.name / name).symlink_to(run / name)
    pairs = compare([tmp_path / "0", tmp_path / "1"], tmp_path / "out", reference=tmp_path / "1", n_bootstrap=50)
    assert set(pairs["run"]) == {str(tmp_path / "1")}
    table = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert sorted(table["trainer.learning_rate"]) == [float(OTHER), float(GOOD)]
    assert "embedder._target_" not in table.columns, "the same in both"


SWEEP_NAMES = sorted(path.stem for path in SWEEPS.glob("*.yaml"))


@pytest.mark.parametrize("name", SWEEP_NAMES)
def test_every_sweep_says_what_it_asks_and_every_trial_composes(name):
    head = "".join(
        line for line in (SWEEPS / f"{name}.yaml").read_text().splitlines(keepends=True) if line.startswith("#")
    )
    assert all(word in head for word in ("# Question:", f"#   python train.py sweeps={name}", "# Cost:", "# Result:"))
    register(SearchedRuns())
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=[f"sweeps={name}"], return_hydra_config=True)
        assert cfg.hydra.mode.name == "MULTIRUN"
        assert cfg.hydra.sweeper.study_name == name
        space, fixed = parse_space([f"sweeps={name}"], cfg.hydra.sweeper.params, GlobalHydra.instance().config_loader())
        for overrides in example_overrides(space):
            compose("train", overrides=[*fixed, *overrides])
    assert cfg.hydra.sweeper.n_trials is not None or space.points() is not None


def search_commands() -> list[str]:
    """Every search that docs/search.md and the heads of the sweeper's YAMLs tell to type."""
    documents = [ROOT / "docs" / "search.md", *(ROOT / "conf" / "hydra").rglob("*.yaml"), *SWEEPS.glob("*.yaml")]
    lines = [line.removeprefix("#").strip() for path in documents for line in path.read_text().splitlines()]
    return sorted({line.split("    ")[0] for line in lines if line.startswith("python train.py ")})


@pytest.mark.parametrize("line", search_commands())
def test_documented_searches_compose(line, tmp_path):
    arguments = [argument for argument in shlex.split(line)[2:] if argument != "-m"]
    register(SearchedRuns())
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        chosen = [a for a in arguments if a.startswith(("hydra.", "hydra/", "sweeps="))]
        cfg = compose("train", overrides=chosen, return_hydra_config=True)
        assert cfg.hydra.sweeper["_target_"].endswith("StudySweeper")
        task = [a for a in arguments if not a.startswith(("hydra.", "hydra/"))]
        loader = GlobalHydra.instance().config_loader()
        space, fixed = parse_space(task, cfg.hydra.sweeper.params, loader)
        example = compose("train", overrides=[*fixed, *next(example_overrides(space))])
    directions = chosen_directions(cfg.hydra.sweeper.direction, cfg.hydra.sweeper.objectives or [], [example])
    assert len(directions) == len(cfg.hydra.sweeper.objectives or ["the monitored metric"])


def test_a_misspelt_sweep_lists_the_sweeps_from_any_folder(tmp_path):
    output = train("sweeps=encoder_tp", cwd=tmp_path, code=2)
    assert "unknown option of sweeps 'encoder_tp': did you mean 'encoder_tpe'?" in output
    assert all(name in output for name in SWEEP_NAMES)
    assert not list(tmp_path.iterdir())
