import json
import logging
import re
import sys
from pathlib import Path

import hydra.utils
import numpy as np
import optuna
import pytest
import wandb
from matplotlib import pyplot as plt
from omegaconf import OmegaConf

from ehr_embed.core.errors import UserError
from ehr_embed.trackers import wandb as wandb_module
from ehr_embed.trackers.jsonl import JsonlTracker
from ehr_embed.trackers.wandb import WandbTracker
from tests.helpers.no_account import no_account  # noqa: F401 (fixtures)
from tests.helpers.small_meds import ROOT
from tests.helpers.wandb_offline import OfflineRun, offline_files, read_offline_runs

CONF = ROOT / "conf" / "tracker"
TAGS = ["data=demo", "model=encoder"]


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def offline(run_dir: Path, **changes) -> WandbTracker:
    return WandbTracker(**{"run_dir": run_dir, "config": {"seed": 3}, "mode": "offline"} | changes)


def only_run(run_dir: Path) -> OfflineRun:
    (run,) = read_offline_runs(run_dir)
    return run


def test_jsonl_rows_and_summary(tmp_path):
    with JsonlTracker(run_dir=tmp_path / "run", tags=TAGS, table_digest="abc") as tracker:
        tracker.log({"epoch": 1, "train/loss": np.float32(0.5)}, step=1)
        assert len(rows(tmp_path / "run")) == 1, "a row must be on disk as soon as it is logged"
        tracker.log({"epoch": 2, "train/loss": float("nan")}, step=2)
        tracker.summarise({"best/tuning/auroc": 0.8, "best/tuning/auprc": float("inf")})
    assert rows(tmp_path / "run") == [
        {"epoch": 1, "train/loss": 0.5},
        {"epoch": 2, "train/loss": None},
    ]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {
        "state": "finished",
        "tags": TAGS,
        "table_digest": "abc",
        "values": {"best/tuning/auroc": 0.8, "best/tuning/auprc": None},
    }


def test_jsonl_resume_replaces_the_rows_it_repeats(tmp_path):
    with JsonlTracker(run_dir=tmp_path) as tracker:
        for epoch in (1, 2, 3):
            tracker.log({"step": 100 * epoch, "loss": 1.0}, step=epoch)
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"epoch": 4, "lo')
    with JsonlTracker(run_dir=tmp_path) as tracker:
        for epoch in (3, 4):
            tracker.log({"loss": 0.5}, step=epoch)
    assert [(row["epoch"], row["loss"]) for row in rows(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5)]


@pytest.mark.parametrize(("error", "state"), [(optuna.TrialPruned, "pruned"), (ValueError, "failed")])
def test_jsonl_marks_how_a_run_ended(tmp_path, error, state):
    with pytest.raises(error), JsonlTracker(run_dir=tmp_path):
        raise error
    assert json.loads((tmp_path / "summary.json").read_text())["state"] == state


@pytest.mark.parametrize("option", ["jsonl", "wandb"])
def test_both_options_take_the_experiments_arguments(tmp_path, option):
    # Nothing in a run's own config may be built or resolved.
    config = {"model": {"_target_": "nowhere.Model"}, "hydra": {"run": {"dir": "${run_dir}"}}}
    make = hydra.utils.instantiate(OmegaConf.load(CONF / f"{option}.yaml"), _partial_=True)
    table = tmp_path / "table.npy"
    with make(run_dir=tmp_path, config=config, tags=TAGS, table_digest="abc", table_path=table) as tracker:
        tracker.log({"epoch": 1, "loss": 1.0}, step=1)
    assert len(rows(tmp_path)) == 1
    runs = read_offline_runs(tmp_path)
    assert [run.config["model"] for run in runs] == ([config["model"]] if option == "wandb" else [])


def test_everything_lands_in_the_offline_file(tmp_path):
    plots = [tmp_path / "roc.png", tmp_path / "loss.png"]
    for path in plots:
        plt.imsave(path, np.zeros((4, 4)))
    table = tmp_path / "table.npy"
    np.save(table, np.zeros((3, 2), np.float32))
    run_dir = tmp_path / "run"
    config = {
        "seed": 3,
        "data": {"root": str(tmp_path), "n_bins": 10},
        # Longer than one 32 KiB block of the file.
        "texts": ["x" * 50_000],
    }
    tracker = offline(
        run_dir, config=config, tags=[*TAGS, "y" * 80], name="first", project="p", group="study", job_type="search",
        table_digest="abc123", log_table=True, table_path=table,
    )  # fmt: skip
    with tracker:
        for epoch in (1, 2):
            tracker.log({"train/loss": 1 / epoch, "tuning/auroc": float("nan")}, step=epoch)
        tracker.summarise({"best/tuning/auroc": 0.8, "train/precision": "bf16-mixed"})
        tracker.add_plots(plots)

    run = only_run(run_dir)
    assert (run.name, run.project, run.group, run.job_type) == ("first", "p", "study", "search")
    assert run.tags == [*TAGS, "y" * 64]
    assert run.config["seed"] == 3
    assert run.config["data"] == {"root": tmp_path.name, "n_bins": 10}
    assert run.config["texts"] == config["texts"]
    assert run.config["table_digest"] == "abc123"
    logged = [row for row in run.history if "train/loss" in row]
    assert [(row["epoch"], row["train/loss"], row["tuning/auroc"]) for row in logged] == [
        (1, 1.0, None),
        (2, 0.5, None),
    ]
    assert run.summary["best/tuning/auroc"] == 0.8
    assert run.summary["train/loss"] == 0.5
    assert run.summary["train/precision"] == "bf16-mixed"
    assert run.summary["state"] == "finished"
    assert run.exit_code == 0
    images = run.history[-1]
    assert {images[f"plots/{name}"]["_type"] for name in ("roc", "loss")} == {"image-file"}
    assert {images[f"plots/{name}"]["path"] for name in ("roc", "loss")} == set(run.files)
    assert all((path.parent / "files" / file).exists() for path in offline_files(run_dir) for file in run.files)
    assert run.artifacts == [{"name": "embedding_table", "type": "embeddings", "digest": "abc123"}]
    assert [row["epoch"] for row in rows(run_dir)] == [1, 2]


def test_neither_machine_nor_code_is_recorded(tmp_path):
    with offline(tmp_path, config={"run_dir": str(tmp_path), "seed": 0}) as tracker:
        tracker.log({"loss": 1.0}, step=1)
    run = only_run(tmp_path)
    assert run.exit_code == 0
    assert not run.kinds & {"environment", "stats", "output", "output_raw"}
    assert (run.host, run.files) == ("", [])
    (file,) = offline_files(tmp_path)
    data = file.read_bytes()
    for secret in (str(tmp_path), sys.executable, str(Path.cwd()), sys.argv[0]):
        assert secret.encode() not in data, secret


def test_two_runs_in_one_process_are_two_files(tmp_path):
    for seed in (1, 2):
        with offline(tmp_path / str(seed), config={"seed": seed}) as tracker:
            tracker.log({"loss": float(seed)}, step=1)
    runs = [only_run(tmp_path / str(seed)) for seed in (1, 2)]
    assert [run.config["seed"] for run in runs] == [1, 2]
    assert [[row["loss"] for row in run.history] for run in runs] == [[1.0], [2.0]]
    assert wandb.run is None


@pytest.mark.parametrize(
    ("error", "state", "exit_code"), [(optuna.TrialPruned, "pruned", 0), (ValueError, "failed", 1)]
)
def test_the_end_of_a_run_is_marked(tmp_path, error, state, exit_code):
    with pytest.raises(error), offline(tmp_path):
        raise error
    run = only_run(tmp_path)
    assert (run.summary["state"], run.exit_code) == (state, exit_code)
    assert json.loads((tmp_path / "summary.json").read_text())["state"] == state


def warnings_of(caplog) -> list[str]:
    # pytest taps W&B's own logger too; outside pytest that one reaches only its debug.log.
    ours = (record for record in caplog.records if record.name.startswith("ehr_embed"))
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


def test_auto_without_a_key_is_offline_with_one_warning(tmp_path, caplog):
    with offline(tmp_path, mode="auto") as tracker:
        tracker.log({"loss": 1.0}, step=1)
    (warning,) = warnings_of(caplog)
    assert "wandb login" in warning
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in warning
    assert only_run(tmp_path).config["seed"] == 3


def test_auto_follows_the_environment(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with offline(tmp_path, mode="auto") as tracker:
        tracker.log({"loss": 1.0}, step=1)
        tracker.summarise({"best/tuning/auroc": 0.8})
    assert not warnings_of(caplog)
    assert not read_offline_runs(tmp_path)
    assert len(rows(tmp_path)) == 1


def test_online_without_a_key_is_refused_rather_than_asked(tmp_path):
    with pytest.raises(UserError, match=r"wandb login, or tracker\.mode=auto"), offline(tmp_path, mode="online"):
        pass


def fail_in(monkeypatch, *modes: str) -> None:
    real = wandb.init

    def init(**arguments):
        if arguments["mode"] in modes:
            raise wandb.errors.CommError("connection refused\nsecond line")
        return real(**arguments)

    monkeypatch.setattr(wandb_module, "_has_key", lambda: True)
    monkeypatch.setattr(wandb, "init", init)


def test_no_network_is_offline_with_one_warning(tmp_path, monkeypatch, caplog):
    fail_in(monkeypatch, "online")
    with offline(tmp_path, mode="auto") as tracker:
        tracker.log({"loss": 1.0}, step=1)
    (warning,) = warnings_of(caplog)
    assert "cannot be reached (connection refused)" in warning
    assert len(only_run(tmp_path).history) == 1


def test_a_server_that_refuses_connections(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_module, "INIT_TIMEOUT_S", 2.0)
    wandb.teardown()
    try:
        with offline(tmp_path, mode="auto") as tracker:
            tracker.log({"loss": 1.0}, step=1)
    finally:
        wandb.teardown()
    (warning,) = warnings_of(caplog)
    assert "cannot be reached" in warning
    assert len(only_run(tmp_path).history) == 1


def test_not_even_offline_leaves_the_jsonl_files(tmp_path, monkeypatch, caplog):
    fail_in(monkeypatch, "offline")
    with offline(tmp_path) as tracker:
        tracker.log({"loss": 1.0}, step=1)
        tracker.add_plots([])
    (warning,) = warnings_of(caplog)
    assert "metrics.jsonl alone" in warning
    assert len(rows(tmp_path)) == 1


def test_a_misspelt_mode_lists_the_valid_ones(tmp_path):
    with pytest.raises(UserError, match=r"did you mean 'offline'\? Valid: auto, disabled, offline, online"):
        offline(tmp_path, mode="ofline")


def test_log_table_needs_the_table(tmp_path):
    with pytest.raises(UserError, match="log_table"):
        offline(tmp_path, log_table=True)


def test_the_report_is_sent_as_a_page_and_without_codes_unless_asked(tmp_path):
    def make(*, has_codes: bool = True) -> str:
        return "<p>CODE//1</p>" if has_codes else "<p>no codes</p>"

    for name, wanted in (("private", False), ("shared", True)):
        with offline(tmp_path / name, log_examples=wanted) as tracker:
            tracker.add_report(make)
        run = only_run(tmp_path / name)
        assert any("report/run" in row for row in run.history)
        (page,) = (path for path in (tmp_path / name).rglob("*.html"))
        assert ("CODE//1" in page.read_text()) is wanted
    with offline(tmp_path / "search", job_type="search") as tracker:
        tracker.add_report(make)
    assert any("report/search" in row for row in only_run(tmp_path / "search").history)


def test_a_sweep_of_wandb_types_overrides_that_compose():
    """W&B's agent makes the command line; what it makes is composed here, without an account."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    from tests.helpers.configs import composed

    sweep = OmegaConf.to_container(OmegaConf.load(ROOT / "sweeps" / "wandb" / "encoder.yaml"), resolve=False)
    assert sweep["program"] == "train.py"
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["metric"]["name"].startswith("best/tuning/"), "held_out is not chosen by"
    values = {
        key: {"value": given["values"][-1] if "values" in given else given["max"]}
        for key, given in sweep["parameters"].items()
    }
    made = create_sweep_command_args({"args": values})
    sweep_vars = {
        "interpreter": ["python"], "program": [sweep["program"]], "args": made["args"],
        "args_no_hyphens": made["args_no_hyphens"], "env": ["/usr/bin/env"],
    }  # fmt: skip
    typed: list[str] = []
    for word in sweep["command"]:
        name = word.removeprefix("${").removesuffix("}") if re.fullmatch(r"\$\{\w+\}", word) else None
        typed += sweep_vars[name] if name else [word]
    assert typed[:3] == ["/usr/bin/env", "python", "train.py"]
    cfg = composed(*typed[3:])
    assert cfg.model.n_layers == 3
    assert cfg.trainer.learning_rate == 0.01
    assert cfg.tracker["_target_"].endswith("WandbTracker")
    assert re.fullmatch(r"runs/wandb/\d{4}-\d\d-\d\d/[\d-]+", cfg.run_dir)
