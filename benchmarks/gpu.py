"""Everything of this folder that asks for a GPU, one after the other: a JSON line each, in less than eight minutes.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --tiny 1

First the tests of what only a GPU can run, then the lines in order of value. A line that fails says so, and the next one goes on; a
line that takes longer than `--line-seconds` is ended, and those for which no time is left are named. At the end the pairs of lines
that differ in one choice are compared, such as with and without trainer.compile. The second command tries all lines with sizes that
mean nothing, on a machine without a GPU.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from typing import Any

from benchmarks.common import parser
from benchmarks.training import SIZES

SECONDS, LINE_SECONDS, LEAST_SECONDS = 460, 100, 15
"""Time for all lines, for one line, and below which no line is started."""
LARGE = ("--model-dim", "640", "--layers", "10", "--context", "2048", "--median-events", "1500", "--original", "0")
"""50 million parameters."""
PRETRAIN = ("--pretrain", "1", "--codes", "30000", "--subjects", "2000", "--epochs", "2")
MIDDLE = ("--subjects", "8000", "--batch-size", "0", "--original", "0", "--epochs", "2")
"""Six layers of 256, with batches that the number of samples does not bound."""
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
    ("utilisation", *LARGE, *PRETRAIN, "--batch-tokens", "65536"),
    ("training", "--subjects", "4000", "--batch-size", "0", "--batch-tokens", "131072", "--repeats", "2"),
    ("utilisation", *MIDDLE, "--batch-tokens", "0"),
    ("generation_cache", "--samples", "20", "--batch", "32", "--bfloat16", "1", "--full", "0"),
    ("utilisation", *LARGE, *PRETRAIN, "--batch-tokens", "65536", "--compile", "1"),
    ("event_head", "--events", "65536", "--model-dim", "640", "--bfloat16", "1", "--compiled", "1"),
    ("utilisation", *MIDDLE, "--batch-tokens", "131072"),
    ("utilisation", *MIDDLE, "--batch-tokens", "131072", "--compile", "1"),
    ("utilisation", *LARGE, *PRETRAIN, "--batch-tokens", "0"),
    ("prefetch", "--model-dim", "256", "--layers", "6", "--batch-tokens", "131072", "--repeats", "2"),
    ("utilisation", *LARGE, "--batch-size", "0", "--batch-tokens", "65536", "--subjects", "2000"),
    ("training", "--subjects", "4000", "--dropout-percent", "0", "--repeats", "2"),
    ("batches", "--subjects", "8000"),
    ("packing",),
    ("packing", "--longest", "2048", "--batch", "16", "--padding-percent", "40"),
    ("generation_cache", "--batch", "64"),
    ("embedding",),
)
"""Module and arguments, in order of value."""
TINY: dict[str, dict[str, int]] = {
    "training": SMALL | {"repeats": 1},
    "utilisation": SMALL,
    "batches": {"subjects": 40},
    "packing": {"batch": 4, "longest": 16, "steps": 1, "repeats": 1, "model_dim": 16, "layers": 1},
    "generation_cache": {"prompt": 8, "new": 3, "batch": 2, "vocabulary": 20, "repeats": 1},
    "embedding": {"texts": 20, "distinct": 4, "calls": 4, "repeats": 1},
    "event_head": {"events": 40, "vocabulary": 50, "model_dim": 16, "repeats": 1, "compiled": 0},
    "prefetch": {"subjects": 40, "repeats": 1, "model_dim": 16, "layers": 1, "batch_tokens": 512},
}
"""Sizes of each module that show only that it runs."""
WORTH = 1.05
"""Ratio from which on a choice pays."""
TESTS = (
    "pytest", "-q", "-o", "filterwarnings=",
    "tests/models/test_packing.py", "tests/data/test_device_events.py",
    "tests/models/test_code_tab.py::test_a_gpu_computes_what_a_cpu_does_and_the_host_does_not_wait",
)  # fmt: skip
"""Without the warnings of pyproject.toml, which name Optuna's: the benchmarks need no Optuna, and a GPU's machine may have none."""


def commands(device: str, *, is_tiny: bool) -> list[list[str]]:
    """Return what follows `python -m` in each line."""
    found = [list(TESTS)] if not is_tiny else []
    for name, *arguments in RUNS:
        chosen = dict(TINY[name]) if is_tiny else {}
        if ("--batch-tokens", "0") in pairwise(arguments):
            chosen.pop("batch_tokens", None)  # auto is tried in its tiny form too
        sizes = [f"--{key.replace('_', '-')}={value}" for key, value in chosen.items()]
        found.append([f"benchmarks.{name}", *arguments, *sizes, "--device", device])
    return found


def compared(lines: list[dict[str, Any]]) -> list[str]:
    """Return what the lines say of choices whose default they decide.

    >>> def line(rate, **sizes):
    ...     return {"benchmark": "utilisation", **SIZES, **sizes, "ours": {"events_per_s": rate}}
    >>> for told in compared([line(10.0), line(99.0, pretrain=1), line(15.0, compile=1)]):
    ...     print(told)
    trainer.compile=true: 1.50 times the events/s (layers=6, model_dim=256, batch_tokens=16384, pretrain=0): it pays
    >>> compared([line(10.0), line(15.0, compile=1, pretrain=1)])
    []
    >>> heads = {"times_as_fast_as_ours": {"compiled": 1.5}, "peak_mib": {"ours": 8.0, "compiled": 6.0}}
    >>> compared([{"benchmark": "event_head", **heads}])
    ['compiled in place of heads.token_scores: 1.50 times as fast, 6 MiB against 8: it pays']
    """
    told = []
    names = [name for name in SIZES if name != "compile"]
    by_sizes: dict[tuple[Any, ...], dict[int, float]] = {}
    for line in lines:
        if line.get("benchmark") == "utilisation" and "ours" in line:
            by_sizes.setdefault(tuple(line[name] for name in names), {})[line["compile"]] = line["ours"]["events_per_s"]
    for sizes, rates in by_sizes.items():
        if {0, 1} <= set(rates):
            ratio, of = rates[1] / rates[0], dict(zip(names, sizes, strict=True))
            about = ", ".join(f"{name}={of[name]}" for name in ("layers", "model_dim", "batch_tokens", "pretrain"))
            told.append(f"trainer.compile=true: {ratio:.2f} times the events/s ({about}): {_verdict(ratio)}")
    for line in lines:
        if line.get("benchmark") == "event_head":
            peak = line["peak_mib"]
            told += [
                f"{way} in place of heads.token_scores: {ratio:.2f} times as fast, {peak[way]:.0f} MiB against "
                f"{peak['ours']:.0f}: {_verdict(ratio)}"
                for way, ratio in line["times_as_fast_as_ours"].items()
                if way.startswith(("torch", "compiled"))
            ]
        if line.get("benchmark") == "prefetch":
            told.append(f"trainer.prefetch=true: {line['ratio']:.2f} times the events/s: {_verdict(line['ratio'])}")
    return told


def _verdict(ratio: float) -> str:
    return "it pays" if ratio >= WORTH else "it does not pay"


def run(command: list[str], limit: float) -> tuple[str, int | None]:
    """Return what a command printed and its exit code, which is None if it was ended after `limit` seconds.

    It is ended with all processes that it started, which would compute on beside the next lines.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        return process.communicate(timeout=limit)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0], None
    except BaseException:  # such as Ctrl-C, which does not reach another session
        os.killpg(process.pid, signal.SIGKILL)
        raise


def results_of(printed: str) -> list[dict[str, Any]]:
    """Return the JSON lines among what a benchmark printed.

    >>> results_of('{not JSON\\n{"ratio": 2.0}\\nother text')
    [{'ratio': 2.0}]
    """
    found = []
    for text in printed.splitlines():
        try:
            found += [json.loads(text)] if text.startswith("{") else []
        except json.JSONDecodeError:
            continue
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run all; the number of those that failed, were ended or were left out."""
    options = parser(__doc__, seconds=SECONDS, line_seconds=LINE_SECONDS, tiny=0).parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        print("torch finds no GPU here; each benchmark takes --device cpu: python -m benchmarks.training --device cpu")
        return 1
    n_failed, found, began = 0, [], time.monotonic()
    lines = commands(options.device, is_tiny=bool(options.tiny))
    for command in lines:
        left = options.seconds - (time.monotonic() - began)
        if left < LEAST_SECONDS:
            print("no time left: python -m", *command, flush=True)
            n_failed += 1
            continue
        print("python -m", *command, flush=True)
        limit = min(left, options.line_seconds)
        printed, code = run([sys.executable, "-m", *command], limit)
        print(printed, end="", flush=True)
        if code is None:
            print(f"ended after {limit:.0f} s", flush=True)
        n_failed += code != 0
        if code == 0 and command != list(TESTS):
            found += results_of(printed)
    for told in compared(found):
        print(told)
    print(f"{n_failed} of {len(lines)} failed, were ended or were left out, {time.monotonic() - began:.0f} s")
    return n_failed


if __name__ == "__main__":
    sys.exit(main())
