"""The most memory that was in use."""

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
