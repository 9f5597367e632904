"""A study is kept in a storage, and two processes that share it do not spoil it."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from omegaconf import OmegaConf

from ehr_embed.config.instantiate import instantiate
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import write_json
from ehr_embed.core.outcome import Outcome, write_outcome
from ehr_embed.core.secrets import masked
from ehr_embed.search.space import parse_space
from ehr_embed.search.storage import open_storage, storage_url
from ehr_embed.search.study import CONTINUES, DISCARDED, Owner, SharedStudy, open_study
from tests.helpers.refusals import refused
from tests.helpers.search_app.run import counted, distinct, search, start, states, trials_of
from tests.helpers.small_meds import ROOT

SWEEPER = ROOT / "conf" / "hydra" / "sweeper"


def binary(name: str) -> str | None:
    """A program of PostgreSQL's, on the path or where Debian puts it."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(places[-1]) if places else None)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """URL of a server of this module's own on loopback, which ends with it."""
    initdb, postgres = binary("initdb"), binary("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql, as .ci/run does")
    # The folder lies outside pytest's own one, which only the user who runs the tests may enter.
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    user: dict = {}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        account = pwd.getpwnam("nobody")
        os.chown(folder, account.pw_uid, account.pw_gid)
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = folder / "data"
    quiet: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "cwd": folder}
    made = subprocess.run([initdb, "-D", data, "-U", "tester", "--auth=trust", "--no-sync"], **quiet, **user)
    assert made.returncode == 0, made.stdout.decode()
    command = [postgres, "-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    with open(folder / "log", "wb") as log:
        quiet["stdout"] = log
        server = subprocess.Popen(
            [*command, "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"], **quiet, **user
        )
    url = f"postgresql://tester@127.0.0.1:{port}/postgres"
    try:
        for _ in range(200):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
        yield url
    finally:
        # Fast shutdown: SIGTERM would wait for the connections that this process still pools.
        server.send_signal(signal.SIGINT)
        server.wait(timeout=20)
        shutil.rmtree(folder, ignore_errors=True)


def shared(
    url: str, *, n_trials: int = 4, sampler: str = "random", arguments=("x=interval(0,1)",), **extra
) -> SharedStudy:
    space, fixed = parse_space(arguments, {})
    return open_study(
        open_storage(url),
        name="s",
        space=space,
        fixed=fixed,
        directions=["minimize"],
        facts={},
        n_trials=n_trials,
        sampler=instantiate(OmegaConf.merge(OmegaConf.load(SWEEPER / "sampler" / f"{sampler}.yaml"), extra)),
        pruner=optuna.pruners.NopPruner(),
    )


def run_all(study: SharedStudy) -> list[optuna.trial.FrozenTrial]:
    while (trial := study.ask()) is not None:
        value = sum(float(v) ** 2 for v in trial.params.values())
        study.finish(trial.number, Outcome("finished", [value], seconds=1.0))
    return study.study.trials


def test_storage_url_prefers_what_is_typed(monkeypatch, tmp_path):
    monkeypatch.setenv("OPTUNA_STORAGE", "sqlite:///env.db")
    assert storage_url(None, tmp_path) == "sqlite:///env.db"
    assert storage_url("journal:here/j", tmp_path) == str(Path.cwd() / "here" / "j")
    monkeypatch.delenv("OPTUNA_STORAGE")
    assert storage_url(None, tmp_path) == str(tmp_path / "study.journal")
    assert (
        masked("connection to postgresql+psycopg://a:b@h/d failed")
        == "connection to postgresql+psycopg://a:***@h/d failed"
    )


def test_sqlite_from_the_environment(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    search("x=interval(0,1)", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2", cwd=tmp_path, OPTUNA_STORAGE=url)
    assert states(trials_of(tmp_path, storage=url)) == ["COMPLETE"] * 3
    assert not (tmp_path / "multirun" / "app" / "study.journal").exists()


@pytest.mark.slow
def test_two_processes_share_postgresql(postgresql, tmp_path):
    """Both make the tables at once, take turns, and report through the server."""
    # Without a pruner: after five trials the default one stops whichever draws a bad point, as it should.
    study = ("hydra.sweeper.n_trials=6", f"hydra.sweeper.storage={postgresql}", "hydra/sweeper/pruner=none")
    arguments = ("x=interval(0,1)", *study, "epochs=2")
    both = [start(*arguments, "seconds=0.1", cwd=tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    trials = trials_of(tmp_path, storage=storage_url(postgresql, tmp_path))
    assert states(trials) == ["COMPLETE"] * 6
    assert distinct(trials) == 6
    assert all(len(trial.intermediate_values) == 2 for trial in trials)
    assert len({trial.user_attrs["owner"]["pid"] for trial in trials}) == 2


def test_a_server_that_is_not_there(tmp_path):
    with refused("ann:***@127.0.0.1:9", "Connection refused", "Check that the server runs") as error:
        open_storage(storage_url("postgresql://ann:secret@127.0.0.1:9/x", tmp_path))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp", "cmaes", "qmc", "nsga2"])
def test_no_sampler_repeats_its_points_on_another_day(tmp_path, sampler):
    """Each is seeded; continued by a second process, it must neither start again nor fail."""
    arguments = ("x=interval(0,1)", "y=interval(0,1)")
    for n_trials in (3, 6):
        trials = run_all(shared(str(tmp_path / "j"), n_trials=n_trials, sampler=sampler, arguments=arguments))
        assert states(trials) == ["COMPLETE"] * n_trials
        assert distinct(trials) == n_trials


def test_a_seeded_search_repeats_from_the_start(tmp_path):
    first, second = (run_all(shared(str(tmp_path / name))) for name in "ab")
    assert [trial.params for trial in first] == [trial.params for trial in second]


def test_tpe_learns(tmp_path):
    trials = run_all(shared(str(tmp_path / "j"), n_trials=30, sampler="tpe", arguments=("x=interval(0,100)",)))
    values = [trial.value for trial in trials]
    assert sum(values[20:]) < sum(values[:10])


@pytest.mark.parametrize("sampler", ["tpe", "grid", "random"])
def test_a_small_space_is_covered_without_repetition(tmp_path, sampler):
    study = shared(str(tmp_path / "j"), n_trials=99, sampler=sampler, arguments=("x=1,2,3", "y=range(0,3)"))
    trials = counted(run_all(study))
    assert states(trials) == ["COMPLETE"] * 9
    assert distinct(trials) == 9


def test_optunas_own_grids_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"Type: hydra/sweeper/sampler=grid"):
        shared(str(tmp_path / "j"), _target_="optuna.samplers.BruteForceSampler")


def test_the_dead_are_told_from_the_living(tmp_path):
    study = shared(str(tmp_path / "j"), n_trials=4)
    mine, dead, reused, elsewhere = (study.ask() for _ in range(4))
    me = Owner.this_process()
    dead.set_user_attr("owner", vars(me) | {"pid": 2**22 + 1})
    dead.set_user_attr("folder", str(tmp_path / "1"))
    # The number of a process that ended may be given to another one, which started later.
    reused.set_user_attr("owner", vars(me) | {"started": "1"})
    elsewhere.set_user_attr("owner", vars(me) | {"host": "another", "pid": 1})
    study.end_running(lambda owner: owner is None or owner.is_dead([]))
    trials = study.study.trials
    assert states(trials) == ["RUNNING", "FAIL", "FAIL", "RUNNING", "WAITING", "WAITING"]
    assert [t.user_attrs[DISCARDED] for t in trials[1:3]] == ["interrupted"] * 2
    assert [t.system_attrs["fixed_params"] for t in trials[4:]] == [dead.params, reused.params]
    assert [t.user_attrs.get(CONTINUES) for t in trials[4:]] == [str(tmp_path / "1"), None]
    study.end_running(lambda owner: owner is None or owner.is_dead(["another"]))
    assert states(study.study.trials)[3] == "FAIL"
    assert mine.number == 0


def test_what_a_dead_search_left_is_told_with_its_objectives(tmp_path):
    study = shared(str(tmp_path / "j"), n_trials=1)
    study.objectives = ["tuning.auroc"]
    trial = study.ask()
    trial.set_user_attr("folder", str(tmp_path / "0"))
    (tmp_path / "0").mkdir()
    write_outcome(tmp_path / "0", Outcome("finished", [0.1], seconds=1.0))
    write_json(tmp_path / "0" / "metrics.json", {"tuning": {"auroc": {"value": 0.75, "low": 0.5, "high": 0.9}}})
    study.end_running(lambda owner: True)
    (told,) = study.study.trials
    assert (told.state.name, told.value) == ("COMPLETE", 0.75)
    assert told.user_attrs["results"]["tuning/auroc/low"] == 0.5


def test_a_process_killed_while_it_took_a_trial_blocks_nobody(tmp_path):
    """Neither a trial without owner nor one without a point is left running or run again empty."""
    study = shared(str(tmp_path / "j"), n_trials=2)
    study.study.ask()
    study.end_running(lambda owner: owner is None or owner.is_dead([]))
    assert states(study.study.trials) == ["FAIL"]
    assert len(counted(run_all(study))) == 2
