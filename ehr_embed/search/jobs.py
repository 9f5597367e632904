"""Run each job of a search in a process of its own: start it, assign a GPU, watch it, and end it with all its children."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
from hydra.core.singleton import Singleton
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from ehr_embed.core.launchers import alone
from ehr_embed.core.outcome import MAX_MESSAGE_LENGTH, Outcome, read_outcome
from ehr_embed.core.threads import usable_cores

LOG_NAME = "log.txt"
GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL, in which a job closes the files of its tracker."""


@dataclass(frozen=True)
class Job:
    """One training run of a trial.

    Args:
        number: number of the trial.
        overrides: Hydra overrides of the run, including those of Hydra's own keys.
        folder: folder into which the job writes its files.
    """

    number: int
    overrides: list[str]
    folder: Path


class JobRunner:
    """Start jobs as separate Python processes that receive the application and its configuration on standard input.

    Args:
        hydra_context: Hydra's context of the search.
        task_function: function that every job calls with its configuration.
        config: configuration of the search, onto which a job's overrides are composed.
        n_slots: number of jobs that run at the same time; each slot gets an equal share of the cores and its own GPU.
    """

    def __init__(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig, n_slots: int
    ) -> None:
        self._application = {
            "hydra_context": hydra_context,
            "task_function": task_function,
            "config": config,
            "singletons": Singleton.get_state(),
        }
        self._n_slots = n_slots
        self._gpus = visible_gpus() if n_slots > 1 else []

    def start(self, job: Job, slot: int) -> JobProcess:
        """Start a job in a slot and redirect its output to `log.txt` in the job's folder."""
        job.folder.mkdir(parents=True, exist_ok=True)
        payload = cloudpickle.dumps(self._application | {"overrides": job.overrides, "number": job.number})
        with open(job.folder / LOG_NAME, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "ehr_embed.search.worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(slot),
                # A new process group, so that Ctrl-C at the terminal reaches the search only, which then ends its jobs.
                start_new_session=True,
            )
        assert process.stdin is not None
        try:
            process.stdin.write(payload)
            process.stdin.close()
        except BrokenPipeError:  # the job died at once; its log holds the reason
            pass
        return JobProcess(job, process)

    def _environment(self, slot: int) -> dict[str, str]:
        # A launcher such as torchrun or Slurm may have started this search: a trial must not join its distributed run.
        environment = alone(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path or str(Path.cwd()) for path in sys.path))
        if self._n_slots > 1:
            cores = usable_cores() or os.cpu_count() or 1
            environment.setdefault("OMP_NUM_THREADS", str(max(1, int(cores) // self._n_slots)))
        if len(self._gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        return environment


@dataclass
class JobProcess:
    """A job that was started, together with its process."""

    job: Job
    process: subprocess.Popen[bytes]

    def is_running(self) -> bool:
        """Return whether the process has not ended yet."""
        return self.process.poll() is None

    def outcome(self) -> Outcome:
        """Return the outcome that the ended job wrote; without one, a failure with the exit code and the end of the log."""
        outcome = read_outcome(self.job.folder)
        if outcome is not None:
            return outcome
        code = self.process.returncode
        if code < 0:
            name = signal.Signals(-code).name
            reason = f"killed by {name}" + (", as Linux does when memory runs out" if name == "SIGKILL" else "")
        else:
            reason = f"ended with exit code {code}"
        return Outcome("failed", error=f"{reason}; {last_words(self.job.folder / LOG_NAME)}"[:MAX_MESSAGE_LENGTH])

    def kill(self) -> None:
        """End the process and all its children at once (on Windows the process alone); do nothing if they are gone."""
        with contextlib.suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()


def end_all(processes: Sequence[JobProcess]) -> None:
    """Send SIGTERM to every running job, wait up to `GRACE_S` seconds, then send SIGKILL to the jobs and their children."""
    for job in processes:
        if job.is_running():
            job.process.terminate()
    deadline = time.monotonic() + GRACE_S
    while any(job.is_running() for job in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for job in processes:
        job.kill()
        job.process.wait()


def last_words(log: Path, n_lines: int = 3) -> str:
    """Return the last lines of a log file, followed by the path of the file."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-n_lines:]
    except OSError:
        lines = []
    return f"{' | '.join(lines) or 'its log is empty'} ({log})"


def visible_gpus() -> list[str]:
    """Return the names of the CUDA devices, as in CUDA_VISIBLE_DEVICES; empty without a GPU.

    Call `nvidia-smi` rather than torch: loading torch would take seconds, and would open a device in this process.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.split() if done.returncode == 0 else []
