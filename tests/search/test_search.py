"""The study sweeper on a toy objective, in processes of its own: what a search must survive and refuse."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from tests.helpers.entry_points import inside  # noqa: F401 (a fixture)
from tests.helpers.overrides import last_of_each
from tests.helpers.search_app.run import (
    APP,
    STUDY,
    counted,
    distinct,
    environment,
    finished,
    search,
    start,
    started,
    states,
    trials_of,
)
from tests.helpers.small_meds import ROOT

X = "x=interval(0,1)"


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_same_command_ends_at_its_total_and_repeats_nothing(tmp_path):
    search(X, "hydra.sweeper.n_trials=2", cwd=tmp_path)
    assert states(trials_of(tmp_path)) == ["COMPLETE"] * 2
    search(X, "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2", cwd=tmp_path)
    output = search(X, "hydra.sweeper.n_trials=3", cwd=tmp_path)
    trials = trials_of(tmp_path)
    assert states(trials) == ["COMPLETE"] * 3
    assert distinct(trials) == 3, "the sampler is seeded, and must not draw its first points again"
    assert "3 runs, best first" in output
    table = pd.read_csv(tmp_path / "multirun" / "app" / "summary.csv")
    assert list(table["objective"]) == sorted(trial.value for trial in trials)
    assert [float(x) for x in table["x"]] == [t.params["x"] for t in sorted(trials, key=lambda t: t.value)]


def test_kill_9_loses_no_finished_trial_and_repeats_none(tmp_path):
    log = tmp_path / "started"
    arguments = (X, "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=2", f"started={log}", "seconds=0.5")
    process = start(*arguments, cwd=tmp_path)
    wait_for(lambda: len(started(log)) >= 4)
    process.kill()
    process.communicate()
    before = [trial.params for trial in finished(trials_of(tmp_path))]
    assert len(before) >= 2
    wait_for(lambda: not any(is_alive(job["pid"]) for job in started(log)), 10)
    search(*arguments, cwd=tmp_path)
    done = finished(trials_of(tmp_path))
    assert len(done) == len(counted(trials_of(tmp_path))) == 6
    assert distinct(done) == 6
    assert all(params in [trial.params for trial in done] for params in before)
    interrupted = [trial.params for trial in trials_of(tmp_path) if "discarded" in trial.user_attrs]
    assert interrupted, "the kill came too late to test anything"
    assert all(params in [trial.params for trial in done] for params in interrupted), "its point must be run again"


def test_a_trial_that_ended_while_its_search_was_dead_is_not_run_again(tmp_path):
    """The job's own outcome counts, not whether the search lived to read it."""
    log = tmp_path / "started"
    arguments = (X, "hydra.sweeper.n_trials=1", f"started={log}", "seconds=1.5")
    process = start(*arguments, cwd=tmp_path)
    wait_for(lambda: len(started(log)) == 1)
    process.send_signal(signal.SIGSTOP)
    wait_for((tmp_path / "multirun" / "app" / "0" / "outcome.json").exists)
    process.kill()
    process.communicate()
    assert states(trials_of(tmp_path)) == ["RUNNING"]
    search(*arguments, cwd=tmp_path)
    assert states(trials_of(tmp_path)) == ["COMPLETE"]
    assert len(started(log)) == 1


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_interrupting_ends_the_jobs_and_keeps_what_is_finished(tmp_path, number, code):
    log = tmp_path / "started"
    arguments = (X, "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2", f"started={log}")
    search(X, "hydra.sweeper.n_trials=1", cwd=tmp_path)
    process = start(*arguments, "+note=slow", "seconds=60", "hydra.sweeper.study_name=slow", cwd=tmp_path)
    wait_for(lambda: len(started(log)) == 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    assert "Traceback" not in output, output
    assert not any(is_alive(job["pid"]) for job in started(log))
    assert sorted(states(trials_of(tmp_path, "slow"))) == ["FAIL", "FAIL", "WAITING", "WAITING"]
    assert (tmp_path / "multirun" / "slow" / "summary.csv").exists()
    assert states(trials_of(tmp_path)) == ["COMPLETE"]


@pytest.mark.slow
def test_two_processes_share_a_journal_without_repeating_a_point(tmp_path):
    arguments = (X, "n=int(interval(1,100))", "hydra.sweeper.n_trials=8", "seconds=0.2")
    both = [start(*arguments, cwd=tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    trials = trials_of(tmp_path)
    assert states(trials) == ["COMPLETE"] * 8
    assert distinct(trials) == 8
    assert len({trial.user_attrs["owner"]["pid"] for trial in trials}) == 2, "one process did all the work"


def test_no_trial_waits_for_the_slowest(tmp_path):
    """One slow trial beside four fast ones: batches would take two rounds of the slow one's time."""
    log = tmp_path / "started"
    arguments = ("seconds=12,0.1,0.2,0.3", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=2", f"started={log}")
    search(*arguments, cwd=tmp_path)
    trials = {trial.params["seconds"]: trial for trial in trials_of(tmp_path)}
    slow = trials.pop("12")
    assert all(trial.datetime_complete < slow.datetime_complete for trial in trials.values())
    # The cores are shared out between the slots; here there are fewer than two for each, or the tests have set one.
    assert {job["threads"] for job in started(log)} == {os.environ["OMP_NUM_THREADS"]}


@pytest.mark.slow
def test_each_slot_has_its_own_device_and_each_trial_is_alone(tmp_path):
    """A search that Slurm started as one of two tasks is a process on a study, and its trials are no parts of one run."""
    log = tmp_path / "started"
    arguments = ("x=0,1,2,3", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=2", f"started={log}", "seconds=0.5")
    search(*arguments, cwd=tmp_path, CUDA_VISIBLE_DEVICES="5,7", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0")
    assert {job["gpu"] for job in started(log)} == {"5", "7"}
    assert {job["n_launched"] for job in started(log)} == {1}


def test_pruning_stops_a_planted_bad_trial_early(tmp_path):
    search(
        "x=0.1,0.2,0.3,9",
        "hydra/sweeper/sampler=grid",
        "epochs=20",
        "hydra.sweeper.pruner.n_startup_trials=2",
        cwd=tmp_path,
    )
    trials = {trial.params["x"]: trial for trial in trials_of(tmp_path)}
    bad = trials["9"]
    assert bad.state.name == "PRUNED"
    assert len(bad.intermediate_values) < 5
    assert len(trials["0.1"].intermediate_values) == 20
    table = pd.read_csv(tmp_path / "multirun" / "app" / "summary.csv")
    assert list(table["state"])[-1] == "pruned"


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["hyperband", "asha", "none"])
def test_every_pruner_of_epochs_runs(tmp_path, pruner):
    search("x=0.1,0.2,5,6", "hydra/sweeper/sampler=grid", f"hydra/sweeper/pruner={pruner}", "epochs=9", cwd=tmp_path)
    found = states(trials_of(tmp_path))
    assert found.count("PRUNED") == 0 if pruner == "none" else "PRUNED" in found


def test_a_finite_space_is_exhausted_once(tmp_path):
    """A sampler that repeats itself is given another point, and the search ends when none is left."""
    output = search("kind=square,shifted", "x=0,1", "hydra.sweeper.n_trials=10", cwd=tmp_path)
    done = counted(trials_of(tmp_path))
    assert states(done) == ["COMPLETE"] * 4
    assert distinct(done) == 4
    assert "4 runs, best first" in output


def test_groups_conditions_and_exact_texts_reach_the_job(tmp_path):
    log = tmp_path / "started"
    search(
        "kind=square,shifted",
        'kind.only_shifted=tag("kind=shifted",choice(2,3))',
        "text=null,'null','a,b'",
        "hydra/sweeper/sampler=grid",
        "hydra.sweeper.n_jobs=2",
        f"started={log}",
        cwd=tmp_path,
    )
    trials = trials_of(tmp_path)
    # kind.only_shifted is no key of kind=square: a job given it would have failed.
    assert states(trials) == ["COMPLETE"] * (3 + 2 * 3)
    assert {job["text"] for job in started(log)} == {None, "null", "a,b"}


def test_seeds_are_averaged_and_a_bad_trial_stops_after_a_few(tmp_path):
    search(
        "x=0.1,0.2,9",
        "hydra/sweeper/sampler=grid",
        "hydra.sweeper.seeds=[0,1,2]",
        "hydra.sweeper.pruner.n_startup_trials=2",
        "hydra.sweeper.pruner.n_warmup_steps=0",
        cwd=tmp_path,
    )
    trials = {trial.params["x"]: trial for trial in trials_of(tmp_path)}
    assert trials["0.1"].value == pytest.approx(0.1**2 + 0.01)
    assert trials["9"].state.name == "PRUNED"
    assert len(trials["9"].intermediate_values) == 1
    table = pd.read_csv(tmp_path / "multirun" / "app" / "summary.csv").set_index("x")
    assert table.loc[0.1, "objective_sd"] == pytest.approx(0.01)


@pytest.mark.slow
def test_wilcoxon_judges_seeds(tmp_path):
    search(
        "x=0.1,9",
        "hydra/sweeper/sampler=grid",
        "hydra/sweeper/pruner=wilcoxon",
        "hydra.sweeper.seeds=[0,1,2,3,4,5]",
        cwd=tmp_path,
    )
    trials = trials_of(tmp_path)
    assert states(trials) == ["COMPLETE", "PRUNED"]
    assert len(trials[1].intermediate_values) < 6


@pytest.mark.slow
def test_several_objectives(tmp_path):
    script = tmp_path / "app.py"
    script.write_text(APP.read_text().replace("return value\n", "return value, abs(cfg.x - 1)\n"))
    (tmp_path / "conf").symlink_to(APP.parent / "conf")
    arguments = ["-m", "hydra/sweeper=study", "hydra/sweeper/sampler=nsga2", "hydra.sweeper.n_trials=4", X, "y=0,1"]
    arguments += ["hydra.sweeper.direction=[minimize,minimize]", "hydra.sweeper.has_plots=true"]
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(len(trial.values) == 2 for trial in trials_of(tmp_path))
    folder = tmp_path / "multirun" / "app"
    table = pd.read_csv(folder / "summary.csv")
    assert table["is_best"].iloc[0]
    assert not (table["is_best"] & (table["y"].astype(float) == 1)).any(), "y=1 is worse at the same x"
    assert {"pareto_front.png", "slice_objective_1.html"} <= {path.name for path in (folder / "plots").iterdir()}


def test_failed_jobs_are_recorded_and_the_search_goes_on(tmp_path):
    """One raises, one is killed, one returns NaN, in one search."""
    failing = ("raise_above=8.5", "die_above=7.5", "nan_above=6.5", "hydra.sweeper.max_failure_rate=0.6")
    search("x=0,1,7,8,9", "hydra/sweeper/sampler=grid", *failing, "hydra.sweeper.n_jobs=2", cwd=tmp_path)
    trials = {trial.params["x"]: trial for trial in trials_of(tmp_path)}
    assert states([trials[x] for x in "01"]) == ["COMPLETE"] * 2
    table = pd.read_csv(tmp_path / "multirun" / "app" / "summary.csv").set_index("x")
    messages = {"9": "RuntimeError: CUDA out of memory", "8": "killed by SIGKILL", "7": "the objective is nan"}
    for x, message in messages.items():
        assert trials[x].state.name == "FAIL"
        assert message in trials[x].user_attrs["error"]
        assert message in table.loc[int(x), "error"]


def test_too_many_failures_stop_the_search(tmp_path):
    arguments = ("x=6,7,8,9,1", "hydra/sweeper/sampler=grid", "raise_above=5", "hydra.sweeper.max_failure_rate=0.2")
    output = search(*arguments, cwd=tmp_path, code=2)
    assert "2 of 5 trials failed, more than hydra.sweeper.max_failure_rate=0.2 allows. Trial 1:" in output
    assert "CUDA out of memory" in output
    assert states(trials_of(tmp_path)) == ["FAIL"] * 2
    log = (tmp_path / "multirun" / "app" / "0" / "log.txt").read_text()
    assert "Traceback" in log
    assert "in main" in log, "the place in the user's code"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers_run_batches(tmp_path, launcher):
    arguments = ("x=0.1,0.2,9", f"hydra/launcher={launcher}", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=2")
    search(*arguments, "epochs=4", "hydra.sweeper.pruner.n_startup_trials=2", cwd=tmp_path)
    trials = {trial.params["x"]: trial for trial in trials_of(tmp_path)}
    assert states([trials["0.1"], trials["0.2"]]) == ["COMPLETE"] * 2
    assert trials["9"].state.name == "PRUNED", "the trial's number must reach the launcher's process"
    assert (tmp_path / "multirun" / "app" / "2" / "outcome.json").exists()


def test_basic_sweeper_still_works_and_leaves_a_summary(tmp_path):
    command = [sys.executable, str(APP), "-m", "x=2,1", "kind=square,shifted"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "multirun" / "plain"
    table = pd.read_csv(folder / "summary.csv")
    assert sorted(table["objective"]) == [0, 1, 1, 4]
    assert {"run", "state", "x", "kind", "error"} <= set(table.columns)
    report = json.loads((folder / "study.json").read_text())
    assert report["n_by_state"] == {"finished": 4}
    names = ("optimization_history", "param_importances", "parallel_coordinate", "slice")
    plots = {f"{name}.{form}" for name in names for form in ("html", "png")}
    assert plots <= {path.name for path in (folder / "plots").iterdir()}
    assert all((folder / "plots" / name).stat().st_size > 1000 for name in plots)


STORED = (X, "kind=square,shifted", "hydra.sweeper.n_trials=1")


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    search(*STORED, cwd=folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["xx=1,2"], r"could not override 'xx'"),
        (["kind=square,shiftd"], r"unknown option of kind 'shiftd': did you mean 'shifted'\?"),
        (["n=range(5,1)"], r"the range from 5 to 1 \(left out\) is empty"),
        (["x=1,2", "hydra.sweeper.direction=up"], r"unknown hydra.sweeper.direction 'up'.*maximize, minimize"),
        (["hydra.sweeper.direction=maximize"], r"the stored study has minimize, this command maximize"),
        (["kind=square"], r"kind: the stored study searches square, shifted, this command not at all"),
        (["x=interval(0,2)"], r"x: the stored study searches 0\.0 to 1\.0, this command 0\.0 to 2\.0"),
        (["epochs=3"], r"fixed: the stored study has \[.*\], this command \['epochs=3'"),
        (["hydra.sweeper.storage=postgresql://ann:secret@127.0.0.1:9/none"], r"ann:\*\*\*@127\.0\.0\.1.*No trial was"),
        (["hydra.sweeper.storage=/proc/none/study.journal"], r"cannot be opened"),
        (["hydra.sweeper.storage=mysql://host/name"], r"expected a journal file, sqlite:///FILE or postgresql"),
        (["hydra.sweeper.sampler._target_=os.system"], r"_target_=os\.system is outside the trusted packages"),
        (["hydra/sweeper/sampler=grid"], r"a grid needs a finite space"),
        (["hydra.sweeper.n_trials=null"], r"n_trials is not set.*Type: hydra\.sweeper\.n_trials=20"),
        (["hydra.sweeper.seeds=[0,1]", "seed=3"], r"seeds and an override of seed exclude each other"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_the_first_trial(stored, arguments, message, tmp_path, inside, monkeypatch):
    monkeypatch.setenv("EHR_EMBED_CONF", str(ROOT / "conf"))
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    before = (stored / "multirun" / "app" / "study.journal").read_bytes()
    log = tmp_path / "started"
    typed = last_of_each([*STUDY, *STORED, "hydra.sweeper.n_trials=9", f"started={log}", *arguments])
    output = inside(str(APP), *typed, cwd=stored, code=2)
    assert re.search(message, output), output
    assert "secret" not in output
    assert not log.exists(), "a trial was started"
    assert (stored / "multirun" / "app" / "study.journal").read_bytes() == before
