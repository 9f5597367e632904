"""Profiles a few training batches: shows which operations take the time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ehr_embed.run_folder.layout import PROFILE

log = logging.getLogger(__name__)
SKIPPED, WARM_UP, PROFILED = 2, 1, 8
"""Numbers of batches that are skipped, warm up the profiler, and are profiled; the first allocate and compile."""
SHOWN = 10


@contextmanager
def profiler(run_dir: Path, *, is_on: bool) -> Iterator[Callable[[], None]]:
    """Yield a function that must be called after every batch.

    If `is_on`, `PROFILED` batches from the fourth on are profiled. Profiling writes a Chrome trace to
    `run_dir/profile.json`, which https://ui.perfetto.dev opens, and prints a table of the operations that took longest.
    """
    if not is_on:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    n_batches = 0

    def n_profiled() -> int:
        return min(n_batches - SKIPPED - WARM_UP, PROFILED)

    def finish(found: Any) -> None:
        if n_profiled() > 0:
            found.export_chrome_trace(str(run_dir / PROFILE))
            print(summary(found, n_profiled()), f"\ntrace: {run_dir / PROFILE}")

    plan = schedule(wait=SKIPPED, warmup=WARM_UP, active=PROFILED, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=finish) as running:

        def after_batch() -> None:
            nonlocal n_batches
            n_batches += 1
            running.step()

        yield after_batch
    if n_profiled() <= 0:
        log.warning(
            "trainer.profile=true: training ended before batch %d, the first to be profiled; nothing was measured. "
            "Type: trainer.epochs=MORE",
            SKIPPED + WARM_UP + 1,
        )


def summary(found: Any, n_batches: int) -> str:
    """Format a table of the operations that took longest, on the GPU if there is one.

    The columns are the share of the total time, milliseconds per batch and calls per batch, without the time of nested
    operations.
    """
    on_gpu = torch.cuda.is_available()
    times = [(x.self_device_time_total if on_gpu else x.self_cpu_time_total, x) for x in found.key_averages()]
    # Spans such as the optimizer's contain other operations: on a GPU they would count the kernels twice.
    times = [(us, x) for us, x in times if not x.key.startswith(("ProfilerStep", "Optimizer."))]
    total = sum(us for us, _ in times) or 1.0
    top = sorted(times, key=lambda pair: -pair[0])[:SHOWN]
    lines = [f"where the time of {n_batches} batches went, and of what came between them:"]
    lines.append(f"{'share':>6} {'ms/batch':>9} {'calls/batch':>12}  operation")
    for us, x in top:
        lines.append(f"{us / total:6.1%} {us / 1000 / n_batches:9.2f} {x.count / n_batches:12.1f}  {x.key[:80]}")
    return "\n".join(lines)
