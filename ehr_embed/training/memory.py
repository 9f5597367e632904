"""The most memory that was in use, and what is free."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

KIB_A_MIB, BYTES_A_MIB = 2**10, 2**20


def peak_memory_mib(device: torch.device) -> float:
    """The most memory in use so far, MiB: of tensors on a GPU, else of this process, its libraries included.

    >>> peak_memory_mib(torch.device("cpu")) > 100
    True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / BYTES_A_MIB
    # Where there is /proc, since getrusage there also counts what the process was before it started this program.
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / KIB_A_MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (BYTES_A_MIB if sys.platform == "darwin" else KIB_A_MIB)


def available_memory() -> float | None:
    """Return the bytes that this process could still take without swapping, of the machine and of its control group; None where
    the system does not say.

    >>> (available_memory() or 1) > 0
    True
    """
    found = []
    if (meminfo := Path("/proc/meminfo")).exists() and (
        free := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    ):
        found.append(float(free[1]) * 2**10)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        limit = "max"
    if limit != "max":
        found.append(float(limit) - float(used) + float(cached[1] if cached else 0))
    return min(found, default=None)
