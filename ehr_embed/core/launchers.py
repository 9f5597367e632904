"""Find out who started this process: torchrun, Slurm's srun, this package, or the user directly."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Mapping

TORCHRUN = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
PREFIXES = ("TORCHELASTIC_", "SLURM_NTASKS")


def is_torchrun() -> bool:
    """Return whether torchrun started this process, or `run_ranks`, which sets the same environment variables."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def n_launched() -> int:
    """Return how many processes were started together, this one included; 1 if this process is the only one."""
    return int(os.environ.get("WORLD_SIZE" if is_torchrun() else "SLURM_STEP_NUM_TASKS", 1))


def alone(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables that make a process one of several.

    >>> alone({"RANK": "1", "TORCHELASTIC_RUN_ID": "x", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "PATH": "/bin"})
    {'SLURM_JOB_ID': '7', 'PATH': '/bin'}
    """
    return {k: v for k, v in environment.items() if k not in (*TORCHRUN, *SLURM) and not k.startswith(PREFIXES)}


def end_with_parent() -> None:
    """End this process, which another one started by `multiprocessing`, as soon as its parent process has ended.

    A parent that is killed by SIGKILL cannot stop its children, and a child that goes on may hold a GPU's memory.
    """

    def wait() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
