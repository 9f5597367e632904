"""The number of threads follows the cores that are free, and stays that of the run where it goes on."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ehr_embed.core import threads
from ehr_embed.core.errors import UserError
from ehr_embed.core.stopping import Stopped
from ehr_embed.core.threads import Choice, choose, free_cores, usable_cores, use, use_threads
from ehr_embed.experiment.inputs import embed
from ehr_embed.experiment.run import pretraining, run
from ehr_embed.explain import explain
from ehr_embed.generate import generate_trajectories
from ehr_embed.predict import predict
from ehr_embed.training.settings import TrainerSettings
from ehr_embed.training.state import Progress
from ehr_embed.training.threads import RATE, SlowEpochWarning, use_threads_of_run
from tests.helpers.configs import composed
from tests.helpers.planted import planted, train  # noqa: F401
from tests.helpers.stopped_runs import after_steps, dataset, settings, terminate, what_is_left  # noqa: F401

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's counters")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Pretend to be on a machine; call it with its cores, those that are free, and the number that torch comes with."""
    before = torch.get_num_threads()
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_memory", threads._Memory())

    def pretend(cores: float | None, free: float, comes: int | None = None) -> None:
        monkeypatch.setattr(threads, "usable_cores", lambda: cores)
        monkeypatch.setattr(threads, "_free_cores", lambda seconds: free)
        if comes is not None:
            torch.set_num_threads(comes)

    yield pretend
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "free", "comes", "n_processes", "expected"),
    [
        (2, 2.0, 2, 1, 2),
        (2, 1.7, 2, 1, 2),  # what an idle machine's own housekeeping takes
        (2, 1.0, 2, 1, 1),
        (2, 0.0, 2, 1, 1),
        (16, 12.5, 8, 1, 8),  # two logical cores to a core: torch takes one thread for both
        (16, 5.2, 8, 1, 5),
        (1.5, 1.5, 64, 1, 1),  # a quota on a large machine, of which torch knows nothing
        (8, 8.0, 2, 4, 2),  # processes that have their share already
        (8, 4.0, 8, 4, 1),
        (8, 8.0, 8, 4, 2),  # started by srun, which divides nothing
        (None, 0.0, 4, 1, 4),  # no Linux
    ],
)
def test_a_thread_for_every_free_core_and_no_more_than_torch_takes(machine, cores, free, comes, n_processes, expected):
    machine(cores, free, comes)
    assert choose(n_processes=n_processes).n == expected


def test_what_the_user_chose_is_taken(machine, monkeypatch):
    machine(4, 0.0, 3)
    assert choose(4).n == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose() == Choice(3, "as OMP_NUM_THREADS says")
    assert choose(kept=2).n == 3
    assert choose(2).n == 2


def test_load_that_is_over_in_a_second_lowers_nothing(machine, monkeypatch):
    machine(2, 2.0, 2)
    monkeypatch.setattr(threads, "_free_cores", lambda seconds: 1.0 if seconds == threads.FIRST_LOOK_S else 1.9)
    assert choose().n == 2


def test_one_run_s_choice_is_not_taken_for_the_user_s_by_the_next(machine):
    machine(4, 1.0, 4)
    use_threads()
    assert torch.get_num_threads() == 1
    machine(4, 4.0)
    use_threads()
    assert torch.get_num_threads() == 4
    torch.set_num_threads(2)  # by the program that calls us
    assert choose().n == 2


def test_a_gpu_leaves_torch_as_it_is(machine):
    machine(4, 1.0, 3)
    use_threads(device="cuda")
    assert torch.get_num_threads() == 3
    use_threads(2, device="cuda")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("wrong", ["two", 0, 1.5, True, None])
def test_what_is_no_number_of_threads_is_refused(wrong):
    with pytest.raises(UserError, match=r"trainer\.threads=.*(trainer\.threads=auto|auto chooses)"):
        TrainerSettings(threads=wrong)


def test_a_run_goes_on_with_the_number_it_had(machine, caplog):
    machine(2, 1.0, 2)
    with caplog.at_level(logging.INFO):
        use(choose(kept=2))
    assert torch.get_num_threads() == 2
    assert "2 CPU threads: as before in this run" in caplog.text
    assert "1.0 of 2 cores are free" in caplog.text
    assert "trainer.threads=1" in caplog.text
    machine(2, 2.0)
    assert choose(kept=2).reason == "as before in this run"
    there = choose(kept=16)
    assert there.n == 2, "16 threads on 2 cores would hardly move"
    assert "had 16" in there.reason


@linux
def test_a_busy_core_is_seen_and_is_free_when_the_program_has_ended():
    """On whatever else the machine does: the difference that one busy process makes on one core."""
    core = {min(os.sched_getaffinity(0))}
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, core)
    try:
        assert usable_cores() == 1
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # inherits the affinity
        try:
            time.sleep(0.2)
            assert free_cores(enough=1) < 0.2
        finally:
            busy.kill()
            busy.wait()
    finally:
        os.sched_setaffinity(0, before)


@linux
def test_this_process_s_own_work_is_not_load(monkeypatch):
    """A thread of our own that works during the sample is subtracted."""
    ticks = iter([100.0, 100.5])
    monkeypatch.setattr(threads, "_busy_seconds", lambda cores: next(ticks))
    own = iter([7.0, 7.5])
    monkeypatch.setattr(time, "process_time", lambda: next(own))
    monkeypatch.setattr(threads, "_affinity", lambda: {0, 1})
    monkeypatch.setattr(threads, "_quotas", dict)
    assert threads._free_cores(0.05) == 2


def test_a_quota_of_a_group_above_counts_with_what_others_in_it_use(tmp_path, monkeypatch):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("1:memory:/x\n0::/pod/container\n")
    group = tmp_path / "cgroup" / "pod"
    (group / "container").mkdir(parents=True)
    (group / "cpu.max").write_text("300000 100000\n")
    (group / "container" / "cpu.max").write_text("max 100000\n")
    monkeypatch.setattr(threads, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "_affinity", lambda: set(range(64)))
    assert usable_cores() == 3
    (group / "container" / "cpu.max").write_text("150000 100000\n")
    assert usable_cores() == 1.5
    (group / "container" / "cpu.max").unlink()
    (group / "cpu.stat").write_text("usage_usec 1000000\n")

    def sleep(seconds: float) -> None:
        (group / "cpu.stat").write_text(f"usage_usec {1_000_000 + int(seconds * 1e6)}\n")  # one core's worth

    began = iter([0.0, 0.2])
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: next(began))
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    assert threads._free_cores(0.2) == pytest.approx(2.0)


def test_the_first_version_of_cgroups_is_read(tmp_path, monkeypatch):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("4:cpu,cpuacct:/docker/abc\n0::/\n")
    folder = tmp_path / "cpu,cpuacct"  # in a container its own group is the root
    folder.mkdir()
    (folder / "cpu.cfs_quota_us").write_text("250000")
    (folder / "cpu.cfs_period_us").write_text("100000")
    monkeypatch.setattr(threads, "_PROC", tmp_path)
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path)
    monkeypatch.setattr(threads, "_affinity", lambda: set(range(64)))
    assert usable_cores() == 2.5


def test_where_linux_s_counters_are_missing_all_cores_count_as_free(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "_PROC", tmp_path)
    monkeypatch.setattr(threads, "_affinity", lambda: {0, 1, 2})
    assert free_cores(enough=3) == 3


def test_a_stopped_run_ends_with_the_same_digits_on_a_machine_that_has_become_busy(
    dataset,
    tmp_path,
    monkeypatch,
    machine,
    caplog,
):
    machine(2, 2.0, 2)
    run(settings(dataset, tmp_path / "whole"))
    after_steps(monkeypatch, 13, terminate)
    with pytest.raises(Stopped):
        run(settings(dataset, tmp_path / "stopped"))
    monkeypatch.undo()
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    machine(2, 0.9, 1)
    with caplog.at_level(logging.INFO):
        run(settings(dataset, tmp_path / "stopped"))
    assert torch.get_num_threads() == 2
    assert "0.9 of 2 cores are free" in caplog.text
    assert what_is_left(tmp_path / "stopped") == what_is_left(tmp_path / "whole")
    saved = torch.load(tmp_path / "stopped" / "latest_checkpoint.pt", weights_only=True)
    assert saved["threads"] == 2


def test_a_stopped_run_may_go_on_with_fewer_threads_if_asked(dataset, tmp_path, monkeypatch, machine, caplog):
    machine(2, 2.0, 2)
    after_steps(monkeypatch, 13, terminate)
    with pytest.raises(Stopped):
        run(settings(dataset, tmp_path / "run"))
    with caplog.at_level(logging.INFO):
        run(settings(dataset, tmp_path / "run", "trainer.threads=1"))
    assert torch.get_num_threads() == 1
    assert "this run had 2 before" in caplog.text


def test_both_stages_have_the_number_that_was_asked_for():
    cfg = composed("experiment=pretrain_then_finetune", "trainer.threads=3")
    assert pretraining(cfg).trainer.threads == 3
    own = composed("experiment=pretrain_then_finetune", "trainer.threads=3", "pretrain.trainer.threads=2")
    assert pretraining(own).trainer.threads == 2


def test_an_epoch_that_falls_far_below_the_first_is_remarked_on_once(caplog, machine):
    machine(2, 2.0, 2)
    history: list[dict[str, float]] = []
    warn = SlowEpochWarning(torch.device("cpu"), history)
    for epoch, rate in enumerate((1000.0, 900.0, 350.0, 100.0), 1):
        history.append({"epoch": epoch, RATE: rate})
        warn(history[-1])
    assert len(caplog.records) == 1
    assert "epoch 3 ran at 350 events/s and the first at 1,000" in caplog.text
    assert "trainer.threads=1" in caplog.text
    caplog.clear()
    on_gpu = SlowEpochWarning(torch.device("cuda"), history)
    on_gpu(history[-1])
    assert not caplog.records


def test_a_slow_epoch_of_a_real_training_is_remarked_on(planted, tmp_path, caplog, monkeypatch):
    """Its third epoch is held up at every batch, as by another program, five times as long as a batch of the second takes."""
    count = Progress.count
    times = []

    def held_up(self: Progress, batch: Any) -> None:
        if self.epoch == 2:
            times.append(time.perf_counter())
        if self.epoch == 3:
            time.sleep(max(0.05, 5 * (times[-1] - times[0]) / len(times)))
        count(self, batch)

    monkeypatch.setattr(Progress, "count", held_up)
    train(planted, tmp_path / "run", epochs=4)
    assert [record.args[0] for record in caplog.records if "events/s" in record.msg] == [3]


@linux
def test_no_warning_tears_the_progress_bar_of_a_terminal(planted, tmp_path, monkeypatch):
    import termios  # not on every system

    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    shown = io.BytesIO()

    def read() -> None:
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                return
            if not part:
                return
            shown.write(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal, warnings.catch_warnings():
        monkeypatch.setattr(sys, "stderr", terminal)
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, *rest: terminal.write(f"WARNING {message}")  # type: ignore[assignment]
        train(planted, tmp_path / "run", epochs=1)
        monkeypatch.undo()
    reader.join(10)
    os.close(ours)
    text = shown.getvalue().decode()
    assert "loss=" in text, "the bar was drawn"
    assert "requires_grad" not in text


def test_all_processes_of_a_run_take_the_least_number_that_one_of_them_chose(machine, caplog):
    machine(8, 8.0, 4)

    def largest(number: int) -> int:
        assert number == -4, "the number chosen here"
        return -2  # on another machine

    fabric = SimpleNamespace(device=torch.device("cpu"))
    with caplog.at_level(logging.INFO):
        use_threads_of_run(TrainerSettings(), SimpleNamespace(fabric=fabric, largest=largest), None)
    assert torch.get_num_threads() == 2
    assert "another process" in caplog.text
    fabric.device = torch.device("cuda")
    torch.set_num_threads(3)
    use_threads_of_run(TrainerSettings(), SimpleNamespace(fabric=fabric, largest=largest), None)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        (predict, {"run": "none", "device": "cpu"}),
        (explain, {"run": "none", "device": "cpu", "max_samples": 1, "min_samples": 1}),
        (generate_trajectories, {"run": "none", "device": "cpu", "split": "held_out", "trusted_packages": []}),
    ],
)
def test_the_commands_on_a_finished_run_choose_too(machine, command, keys):
    machine(4, 2.0, 4)
    for threads_key, expected in (({"threads": 3}, 3), ({"threads": "auto"}, 2), ({}, 2)):
        with pytest.raises(UserError, match="run=none"):
            command(OmegaConf.create(keys | {"trusted_packages": []} | threads_key))
        assert torch.get_num_threads() == expected
    with pytest.raises(UserError, match="threads=many"):
        command(OmegaConf.create(keys | {"trusted_packages": [], "threads": "many"}))


def test_embedding_follows_the_trainer_s_number(machine, tmp_path):
    machine(4, 1.0, 4)
    embed(
        composed(f"cache_dir={tmp_path}", "data.n_subjects=400", "embedder=hashing", "trainer.threads=2", name="embed")
    )
    assert torch.get_num_threads() == 2
