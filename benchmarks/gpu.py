"""Everything of this folder that asks for a GPU, one after the other: a JSON line each.

    python -m benchmarks.gpu

First the tests of what only a GPU can run. A line that fails says so, and the next one goes on; about half an hour on an H100 is
expected, not measured.
"""

from __future__ import annotations

import subprocess
import sys

import torch

DEVICE = ("--device", "cuda")
LARGE = ("--model-dim", "640", "--layers", "10", "--context", "2048", "--median-events", "1500", "--original", "0")
"""50 million parameters."""
RUNS: tuple[tuple[str, ...], ...] = (
    ("training", "--subjects", "20000"),
    ("training", "--subjects", "20000", "--dropout-percent", "0"),
    ("training", "--subjects", "20000", "--compile", "1"),
    ("utilisation", "--subjects", "20000"),
    ("utilisation", *LARGE, "--batch-tokens", "65536", "--subjects", "4000"),
    ("utilisation", *LARGE, "--batch-tokens", "65536", "--subjects", "4000", "--compile", "1"),
    ("batches", "--subjects", "20000"),
    ("packing",),
    ("packing", "--longest", "2048", "--batch", "16", "--padding-percent", "40"),
    ("embedding",),
    ("generation_cache",),
)
"""Module and arguments."""


def main() -> int:
    """Run all; the number of those that failed."""
    if not torch.cuda.is_available():
        print("torch finds no GPU here; each benchmark takes --device cpu: python -m benchmarks.training --device cpu")
        return 1
    commands = [["pytest", "-q", "tests/models/test_packing.py", "tests/data/test_device_events.py"]]
    commands += [[f"benchmarks.{name}", *arguments, *DEVICE] for name, *arguments in RUNS]
    n_failed = 0
    for command in commands:
        print("python -m", *command, flush=True)
        n_failed += subprocess.run([sys.executable, "-m", *command], check=False).returncode != 0
    print(f"{n_failed} of {len(commands)} failed")
    return n_failed


if __name__ == "__main__":
    sys.exit(main())
