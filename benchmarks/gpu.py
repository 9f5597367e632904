"""Everything of this folder that asks for a GPU, one after the other: a JSON line each, in less than eight minutes.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --tiny 1

First the tests of what only a GPU can run, then the lines in order of value. A line that fails says so, and the next one goes on; a
line that takes longer than `--line-seconds` is ended, and those for which no time is left are named. The second command tries all
lines with sizes that mean nothing, on a machine without a GPU.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.common import parser

SECONDS, LINE_SECONDS, LEAST_SECONDS = 460, 100, 15
"""Time for all lines, for one line, and below which no line is started."""
LARGE = ("--model-dim", "640", "--layers", "10", "--context", "2048", "--median-events", "1500", "--original", "0")
"""50 million parameters."""
PRETRAIN = ("--pretrain", "1", "--codes", "30000")
SMALL = {
    "model_dim": 16,
    "layers": 1,
    "subjects": 40,
    "context": 32,
    "median_events": 12,
    "batch_tokens": 512,
    "codes": 50,
    "compile": 0,
}
RUNS: tuple[tuple[str, ...], ...] = (
    ("utilisation", *LARGE, *PRETRAIN, "--batch-tokens", "65536", "--subjects", "2000"),
    ("training", "--subjects", "4000", "--batch-tokens", "131072"),
    ("generation_cache", "--samples", "20", "--batch", "32", "--bfloat16", "1", "--full", "0"),
    ("utilisation", "--subjects", "8000", "--batch-tokens", "131072", "--original", "0"),
    ("utilisation", *LARGE, *PRETRAIN, "--batch-tokens", "65536", "--subjects", "2000", "--compile", "1"),
    ("utilisation", *LARGE, "--batch-tokens", "65536", "--subjects", "2000"),
    ("training", "--subjects", "4000", "--dropout-percent", "0"),
    ("batches", "--subjects", "8000"),
    ("packing",),
    ("packing", "--longest", "2048", "--batch", "16", "--padding-percent", "40"),
    ("generation_cache", "--batch", "64"),
    ("embedding",),
    ("training", "--subjects", "4000", "--compile", "1"),
)
"""Module and arguments, in order of value."""
TINY: dict[str, dict[str, int]] = {
    "training": SMALL | {"repeats": 1},
    "utilisation": SMALL,
    "batches": {"subjects": 40},
    "packing": {"batch": 4, "longest": 16, "steps": 1, "repeats": 1, "model_dim": 16, "layers": 1},
    "generation_cache": {"prompt": 8, "new": 3, "batch": 2, "vocabulary": 20, "repeats": 1},
    "embedding": {"texts": 20, "distinct": 4, "calls": 4, "repeats": 1},
}
"""Sizes of each module that show only that it runs."""
TESTS = ("pytest", "-q", "tests/models/test_packing.py", "tests/data/test_device_events.py")


def commands(device: str, *, is_tiny: bool) -> list[list[str]]:
    """Return what follows `python -m` in each line."""
    found = [list(TESTS)] if not is_tiny else []
    for name, *arguments in RUNS:
        sizes = [f"--{key.replace('_', '-')}={value}" for key, value in TINY[name].items()] if is_tiny else []
        found.append([f"benchmarks.{name}", *arguments, *sizes, "--device", device])
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run all; the number of those that failed, were ended or were left out."""
    options = parser(__doc__, seconds=SECONDS, line_seconds=LINE_SECONDS, tiny=0).parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        print("torch finds no GPU here; each benchmark takes --device cpu: python -m benchmarks.training --device cpu")
        return 1
    n_failed, began = 0, time.monotonic()
    lines = commands(options.device, is_tiny=bool(options.tiny))
    for command in lines:
        left = options.seconds - (time.monotonic() - began)
        if left < LEAST_SECONDS:
            print("no time left: python -m", *command, flush=True)
            n_failed += 1
            continue
        print("python -m", *command, flush=True)
        try:
            limit = min(left, options.line_seconds)
            n_failed += subprocess.run([sys.executable, "-m", *command], check=False, timeout=limit).returncode != 0
        except subprocess.TimeoutExpired:
            print(f"ended after {limit:.0f} s", flush=True)
            n_failed += 1
    print(f"{n_failed} of {len(lines)} failed, were ended or were left out, {time.monotonic() - began:.0f} s")
    return n_failed


if __name__ == "__main__":
    sys.exit(main())
