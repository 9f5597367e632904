"""Jobs in processes of their own: started, watched, given a device each, and ended with everything they started."""

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

from ehr_embed.comparison.outcome import MAX_MESSAGE_LENGTH, Outcome, read_outcome
from ehr_embed.core.launchers import alone
from ehr_embed.core.threads import usable_cores

LOG_NAME = "log.txt"
GRACE_S = 10.0
"""From SIGTERM to SIGKILL: time to close a tracker's files."""


@dataclass(frozen=True)
class Job:
    """One job of a trial.

    Args:
        number: the trial's.
        overrides: of the task and of Hydra.
        folder: where the job leaves its files.
    """

    number: int
    overrides: list[str]
    folder: Path


class JobRunner:
    """Starts jobs as processes that know the application, its configuration and nothing else.

    Args:
        n_slots: jobs that run at the same time; each slot has its share of the cores and its own GPU.
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
        """Start a job; its output goes to `log.txt` in its folder."""
        job.folder.mkdir(parents=True, exist_ok=True)
        payload = cloudpickle.dumps(self._application | {"overrides": job.overrides, "number": job.number})
        with open(job.folder / LOG_NAME, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "ehr_embed.search.worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(slot),
                # A group of its own: Ctrl-C at the terminal reaches the search alone, which then ends its jobs.
                start_new_session=True,
            )
        assert process.stdin is not None
        try:
            process.stdin.write(payload)
            process.stdin.close()
        except BrokenPipeError:  # it died at once; what it said is in its log
            pass
        return JobProcess(job, process)

    def _environment(self, slot: int) -> dict[str, str]:
        environment = alone(os.environ)  # a trial is a run of its own, however many searches were started together
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path or str(Path.cwd()) for path in sys.path))
        if self._n_slots > 1:
            cores = usable_cores() or os.cpu_count() or 1
            environment.setdefault("OMP_NUM_THREADS", str(max(1, int(cores) // self._n_slots)))
        if len(self._gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        return environment


@dataclass
class JobProcess:
    """A job that was started."""

    job: Job
    process: subprocess.Popen[bytes]

    def is_running(self) -> bool:
        return self.process.poll() is None

    def outcome(self) -> Outcome:
        """How the ended job ended; if it left nothing, as failed with its last words."""
        outcome = read_outcome(self.job.folder)
        if outcome is not None:
            return outcome
        code = self.process.returncode
        if code < 0:
            reason = f"killed by {signal.Signals(-code).name}"
            reason += ", as Linux does when memory runs out" if code == -signal.SIGKILL else ""
        else:
            reason = f"ended with exit code {code}"
        return Outcome("failed", error=f"{reason}; {last_words(self.job.folder / LOG_NAME)}"[:MAX_MESSAGE_LENGTH])

    def signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def end_all(processes: Sequence[JobProcess]) -> None:
    """SIGTERM to every job, then SIGKILL to whatever is left of it and of its own children."""
    for job in processes:
        if job.is_running():
            job.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while any(job.is_running() for job in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for job in processes:
        job.signal_group(signal.SIGKILL)
        job.process.wait()


def last_words(log: Path, n_lines: int = 3) -> str:
    """The last lines of a log, and where the rest is."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-n_lines:]
    except OSError:
        lines = []
    return f"{' | '.join(lines) or 'it said nothing'} ({log})"


def visible_gpus() -> list[str]:
    """CUDA devices as CUDA_VISIBLE_DEVICES names them; empty without any.

    Asks the driver's own program: to load torch for this would take seconds, and open a device in this process.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.split() if done.returncode == 0 else []
