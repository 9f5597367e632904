"""Training events a second on a machine that is idle and on one where another program holds a core, by number of threads.

    python -m benchmarks.threads
    python -m benchmarks.threads --busy 2 --subjects 2000

Idle and busy alternate within one run, and in each the numbers of threads: as torch comes, 1, and the one that
`trainer.threads=auto` chooses there (ehr_embed/core/threads.py; the time it takes to look is not counted). A busy core is a
Python process that does nothing but loop. `free_cores_idle` says how idle the machine was: on one that others use the
figures say little. The model is that of the demo (conf/model/encoder_small.yaml). OMP_NUM_THREADS must not be set.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import alternate, parser, report
from benchmarks.training import SIZES, Sides, dataset_of
from ehr_embed.core.threads import AUTO, VARIABLES, choose, free_cores

DEFAULT, STATES = "default", ("idle", "busy")
SMALL = SIZES | {"model_dim": 64, "layers": 2, "context": 256, "median_events": 60}
THREADS: dict[str, int | str] = {DEFAULT: DEFAULT, "1": 1, AUTO: AUTO}


@contextmanager
def busy_cores(n: int) -> Iterator[None]:
    """Have `n` processes that loop while inside."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure(sides: Sides, asked: int | str, n_busy: int, default: int, chosen: list[int]) -> float:
    """Events a second of one epoch beside `n_busy` processes; adds the number of threads to `chosen`."""
    with busy_cores(n_busy):
        torch.set_num_threads(default)
        n = default if asked == DEFAULT else choose(asked).n
        torch.set_num_threads(n)
        chosen.append(n)
        return sides.ours()


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    found = parser(__doc__, subjects=1500, repeats=5, busy=1, **SMALL)
    options: argparse.Namespace = found.parse_args(arguments)
    if said := [name for name in VARIABLES if os.environ.get(name)]:
        found.error(
            f"{said[0]} is set, so that auto has nothing to choose. Type: env -u {said[0]} python -m benchmarks.threads"
        )
    default = torch.get_num_threads()
    chosen: dict[str, list[int]] = {f"{state}_{name}": [] for state in STATES for name in THREADS}
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(Path(folder), options, with_files=False)
        sides.ours()  # warm-up
        n_busy = dict(zip(STATES, (0, options.busy), strict=True))
        work: dict[str, Callable[[], float]] = {
            f"{state}_{name}": partial(measure, sides, asked, n_busy[state], default, chosen[f"{state}_{name}"])
            for state in STATES
            for name, asked in THREADS.items()
        }
        free = free_cores(enough=default)
        rates = alternate(work, options.repeats)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    of_idle = {f"busy_to_idle_{name}": medians[f"busy_{name}"] / medians[f"idle_{name}"] for name in THREADS}
    result: dict[str, Any] = {f"events_per_s_{name}": x for name, x in medians.items()} | of_idle
    result["idle_auto_to_default"] = medians["idle_auto"] / medians["idle_default"]
    result["busy_auto_to_idle_default"] = medians["busy_auto"] / medians["idle_default"]
    result |= {f"threads_{state}_auto": chosen[f"{state}_auto"] for state in STATES}
    result |= {"default_threads": default, "free_cores_idle": free, "precision": sides.facts["precision"]}
    torch.set_num_threads(default)
    report(
        "threads",
        result | {name: getattr(options, name) for name in ("repeats", "busy", *SMALL)},
        dataset=dataset_of(options),
        device=options.device,
    )


if __name__ == "__main__":
    main()
