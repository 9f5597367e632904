"""Who started this process: torchrun, Slurm's srun, this package, or nobody but the user."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Mapping

TORCHRUN = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
PREFIXES = ("TORCHELASTIC_", "SLURM_NTASKS")


def is_torchrun() -> bool:
    """Whether torchrun started this process, or `run_ranks`, which sets what it sets."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def n_launched() -> int:
    """Processes that were started together with this one; 1 = it is alone."""
    return int(os.environ.get("WORLD_SIZE" if is_torchrun() else "SLURM_STEP_NUM_TASKS", 1))


def alone(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what says that a process is one of several.

    >>> alone({"RANK": "1", "TORCHELASTIC_RUN_ID": "x", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "PATH": "/bin"})
    {'SLURM_JOB_ID': '7', 'PATH': '/bin'}
    """
    return {k: v for k, v in environment.items() if k not in (*TORCHRUN, *SLURM) and not k.startswith(PREFIXES)}


def end_with_parent() -> None:
    """From now on end this process, which another one started by `multiprocessing`, when that one is gone, even by SIGKILL:
    nobody would stop it, and it may hold a device."""

    def wait() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
