"""Choose how many threads torch computes with on a CPU that other programs may be using.

OpenMP threads that wait for each other spin. Where another program occupies a core, the thread without a core keeps all
others spinning, and two threads are several times slower than one (docs/speed.md has the figures). So the number of
threads is chosen at the start from the cores that are free at that moment, unless the user has chosen it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ehr_embed.core.settings import Told, check_setting

log = logging.getLogger(__name__)
AUTO = "auto"
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables by which a user, torchrun or a search may already have chosen the number of threads."""
Threads = Annotated[
    Literal["auto"] | Annotated[int, Field(ge=1, le=4096)],
    Told("auto, or 1 to 4096 threads", example="auto", remedy="auto chooses by what else runs on the machine."),
]
FIRST_LOOK_S, SECOND_LOOK_S = 0.2, 0.8
"""Seconds over which the load is measured first, and again before the number of threads is lowered: a load that is over
within a second must not slow down a run of hours."""
IDLE_ENOUGH = 0.6
"""Share of a core that must be free for one of our threads to use the core."""
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass
class _Memory:
    """Remember this process's numbers of threads, lest a run mistake an earlier run's choice for the user's.

    Attributes:
        as_it_comes: torch's number of threads before this module first set one.
        chosen: the number that this module set last.
    """

    as_it_comes: int | None = None
    chosen: int | None = None


_memory = _Memory()


@dataclass(frozen=True)
class Choice:
    """Number of threads and the reason for it.

    Attributes:
        n: number of threads.
        reason: why this number was chosen, for the log.
        is_lowered: whether the load of other programs took threads away.
    """

    n: int
    reason: str
    is_lowered: bool = False


def choose(asked: int | str = AUTO, *, kept: int | None = None, n_processes: int = 1) -> Choice:
    """Return a number of threads for torch, without setting it.

    Args:
        asked: the number that the user asked for, or `auto`.
        kept: the number that an earlier start of the same run had. It is used again, up to the number of usable cores,
            since the order of sums, and so the last digits of the results, depend on it.
        n_processes: processes of one run on this machine; each gets its share of the free cores.

    Returns:
        The first of these numbers that is given: `asked`; the value of `OMP_NUM_THREADS` or `MKL_NUM_THREADS`; `kept`.
        If none is given, the smaller of torch's own number and this process's share of the free cores.
    """
    comes = _as_it_comes()
    said = [name for name in VARIABLES if os.environ.get(name)]
    if isinstance(asked, int) or said:
        n, reason = (asked, "as asked") if isinstance(asked, int) else (comes, f"as {said[0]} says")
        if kept not in (None, n):
            reason += f"; this run had {kept} before, so its last digits may change"
        return Choice(n, reason)
    cores = usable_cores()
    if cores is None:
        return Choice(kept or comes, "as before in this run" if kept else "torch's own number, as the load is unknown")
    most = max(1, min(comes, int(cores) // n_processes))
    free = free_cores(enough=most * n_processes)
    fitting = max(1, min(most, _whole(free) // n_processes))
    state = f"{free:.1f} of {cores:g} cores are free" + f", for {n_processes} processes" * (n_processes > 1)
    if kept is None:
        return Choice(fitting, state, is_lowered=fitting < most)
    if kept > cores:
        return Choice(
            max(1, int(cores)), f"this run had {kept}, and there are {cores:g} cores; its last digits may change", True
        )
    if fitting == kept:
        return Choice(kept, "as before in this run")
    return Choice(
        kept,
        f"as before in this run, so that it ends with the same digits; now {state}. Other digits and perhaps more speed: "
        f"trainer.threads={fitting}",
        is_lowered=fitting < kept,
    )


def use_threads(asked: int | str = AUTO, *, key: str = "threads", device: str = "cpu") -> None:
    """Choose a number of threads, make torch compute with it, and log it in one line.

    Args:
        asked: a number, or `auto`, which leaves torch as it is if another device than the CPU computes.
        key: the configuration key of `asked`, for messages.
        device: the type of the device that computes.

    Raises:
        UserError: `asked` is neither `auto` nor a valid number.
    """
    check_setting(key, asked, Threads)
    if device == "cpu" or asked != AUTO:
        use(choose(asked))


def use(choice: Choice) -> None:
    """Make torch compute with the chosen number of threads, and log it in one line."""
    import torch  # imported here, so that the command line answers before torch is loaded

    if torch.get_num_threads() != choice.n:
        torch.set_num_threads(choice.n)
    _memory.chosen = choice.n
    said = log.warning if choice.is_lowered else log.info
    said("%d CPU thread%s: %s", choice.n, "s" * (choice.n != 1), choice.reason)


def _as_it_comes() -> int:
    """Return the number of threads that torch has by itself or that other code set; it is never exceeded."""
    import torch

    now = torch.get_num_threads()
    if _memory.as_it_comes is None or now != _memory.chosen:
        _memory.as_it_comes = now
    return _memory.as_it_comes


def usable_cores() -> float | None:
    """Return how many cores CPU affinity and cgroup quotas let this process use; None = unknown."""
    allowed = _affinity()
    if allowed is None:
        return None
    return max(1.0, min([float(len(allowed)), *_quotas().values()]))


def free_cores(*, enough: float) -> float:
    """Return how many usable cores no other program is using.

    The load is measured over 0.2 s, and over another 0.8 s if fewer than `enough` cores were free. Programs of lower
    priority than this one do not count, since they give way.
    """
    free = _free_cores(FIRST_LOOK_S)
    return free if _whole(free) >= enough else _free_cores(SECOND_LOOK_S)


def _whole(free: float) -> int:
    return int(free + 1 - IDLE_ENOUGH)


def _free_cores(seconds: float) -> float:
    """Return the smallest number of cores that the affinity and each quota leave free, averaged over `seconds`."""
    allowed, quotas = _affinity() or set(), _quotas()

    def used() -> list[float | None]:
        return [_busy_seconds(allowed), *(_used_seconds(group) for group in quotas)]

    before, own, began = used(), time.process_time(), time.monotonic()
    time.sleep(seconds)
    after, own, elapsed = used(), time.process_time() - own, time.monotonic() - began
    free = []
    for limit, first, last in zip([float(len(allowed)), *quotas.values()], before, after, strict=True):
        others = 0.0 if first is None or last is None else max(0.0, last - first - own)
        free.append(max(0.0, limit - others / elapsed))
    return min(free)


def _affinity() -> set[int] | None:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def _busy_seconds(cores: set[int]) -> float | None:
    """Return the CPU seconds that these cores were busy or taken by the hypervisor; None without Linux's counters."""
    try:
        return busy_seconds((_PROC / "stat").read_text(), cores, own_nice=os.nice(0)) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


def busy_seconds(text: str, cores: set[int], *, own_nice: int) -> float:
    """Return the clock ticks in which these cores were busy (proc_stat(5): user, nice, system, irq, softirq, steal).

    Args:
        text: content of `/proc/stat`.
        cores: numbers of the cores.
        own_nice: niceness of this process; where it is 0 or below, the work of `nice` programs is not counted.

    Raises:
        ValueError: the text has no line for any of these cores.

    >>> text = "cpu 0 0 0 0\\ncpu0 10 5 2 900 7 1 0 3 0 0\\ncpu1 99 0 0 1 0 0 0 0 0 0"
    >>> busy_seconds(text, {0}, own_nice=0), busy_seconds(text, {0}, own_nice=5)
    (16.0, 21.0)
    """
    total, names = None, {f"cpu{core}" for core in cores}
    for line in text.splitlines():
        name, *fields = line.split() or [""]
        if name in names:
            user, nice, system, _, _, irq, softirq, steal = [int(x) for x in (*fields, "0", "0", "0", "0")[:8]]
            total = (total or 0.0) + user + system + irq + softirq + steal + nice * (own_nice > 0)
    if total is None:
        raise ValueError("no counters of these cores")
    return total


def _quotas() -> dict[Path, float]:
    """Return the quota, in cores, of each cgroup with one among the cgroups of this process and their ancestors."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in (
            [_CGROUPS / name for name in (controllers, "cpu")] if controllers else [_CGROUPS, _CGROUPS / "unified"]
        ):
            folder = root / path.lstrip("/")
            # In a container the path may be that of the host, and the container's own cgroup is mounted at the root.
            for level in {root, folder, *(parent for parent in folder.parents if root in parent.parents)}:
                if (quota := quota_of(_texts(level, "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"))) is not None:
                    found[level] = quota
    return found


def _texts(folder: Path, *names: str) -> dict[str, str]:
    found = {}
    for name in names:
        with contextlib.suppress(OSError):
            found[name] = (folder / name).read_text()
    return found


def _used_seconds(group: Path) -> float | None:
    """Return the CPU seconds that all processes of a cgroup have used; None where the cgroup does not count them."""
    texts = _texts(group, "cpu.stat", "cpuacct.usage")
    fields = dict(line.split(maxsplit=1) for line in texts.get("cpu.stat", "").splitlines() if " " in line)
    if "usage_usec" in fields:
        return int(fields["usage_usec"]) / 1e6
    return int(texts["cpuacct.usage"]) / 1e9 if "cpuacct.usage" in texts else None


def quota_of(texts: Mapping[str, str]) -> float | None:
    """Return a cgroup's quota in cores, from its files of version 2 (`cpu.max`) or 1 (`cpu.cfs_*`); None = no quota.

    >>> quota_of({"cpu.max": "150000 100000"}), quota_of({"cpu.max": "max 100000"})
    (1.5, None)
    >>> quota_of({"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"}), quota_of({"cpu.cfs_quota_us": "-1"})
    (2.0, None)
    """
    fields = texts.get("cpu.max", "").split()
    if not fields:
        fields = [texts.get("cpu.cfs_quota_us", "").strip(), texts.get("cpu.cfs_period_us", "100000").strip()]
    try:
        quota, period = (float(x) for x in fields)
    except ValueError:  # the quota is "max", or a file is missing
        return None
    return quota / period if quota > 0 and period > 0 else None
