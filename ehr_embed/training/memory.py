"""Measures the peak memory of this process and the memory that is free."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

KIB_A_MIB, BYTES_A_MIB = 2**10, 2**20
STATUS = Path("/proc/self/status")
"""File in which Linux reports the memory use of this process."""


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory so far, in MiB: that of tensors on a GPU, or that of this process with its libraries.

    >>> peak_memory_mib(torch.device("cpu")) > 100
    True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / BYTES_A_MIB
    # /proc is preferred, because getrusage on Linux also counts the memory of the process before it started this
    # program.
    if STATUS.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())):
        return int(found[1]) / KIB_A_MIB
    try:
        import resource  # which Windows does not have
    except ImportError:
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / BYTES_A_MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (BYTES_A_MIB if sys.platform == "darwin" else KIB_A_MIB)


def available_memory() -> float | None:
    """Return the bytes that this process can still take without swapping; None on a system that does not report them.

    They are bounded by the free memory of the machine and by the limit of the process's control group.

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
