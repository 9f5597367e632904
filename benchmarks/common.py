"""Share the parts of all benchmarks: alternating timings, the JSON line with versions and hardware, and a synthetic cohort."""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from ehr_embed.sources.meds_writer import MedsWriter

PACKAGES = ("torch", "numpy", "polars", "sentence-transformers", "transformers")
LABELS = "outcome"
FIRST_TIME = np.datetime64("2010-01-01", "us")
SPLIT_SHARES = {"train": 0.8, "tuning": 0.1, "held_out": 0.1}


def parser(description: str | None, **defaults: int) -> argparse.ArgumentParser:
    """A parser with an integer option for each default, and `--device`."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        found.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return found


def alternate(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call each side `repeats` times, by turns, and return the results: a noisy machine is noisy for all of them.

    >>> alternate({"a": lambda: 1.0, "b": lambda: 2.0}, 2)
    {'a': [1.0, 1.0], 'b': [2.0, 2.0]}
    """
    results: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            results[name].append(measure())
    return results


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios of values that were measured one after the other.

    >>> ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0])
    2.0
    """
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def seconds(work: Callable[[], Any], device: str = "cpu") -> float:
    """Wall time of `work`, the device's part included."""
    began = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def hardware(device: str) -> dict[str, Any]:
    """The processor that did the work, and the threads it had."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The processor's name, with AVX512-BF16 where it has it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return (name[1] if name else platform.processor() or "cpu") + (" with AVX512-BF16" if "avx512_bf16" in text else "")


def report(benchmark: str, result: dict[str, Any], *, dataset: str, device: str) -> None:
    """Print the benchmark's JSON line; floats with four significant digits."""
    versions = {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
    line = {"benchmark": benchmark} | result | {"dataset": dataset} | hardware(device) | {"versions": versions}
    print(json.dumps(rounded(line)))


def rounded(x: Any) -> Any:
    """`x` with four significant digits in every float.

    >>> rounded({"a": 123456.7, "b": [0.123456], "c": 123456})
    {'a': 123500.0, 'b': [0.1235], 'c': 123456}
    """
    if isinstance(x, float):
        return float(f"{x:.4g}")
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, list) else x


def write_cohort(
    root: Path,
    *,
    n_subjects: int,
    n_codes: int = 5000,
    median_events: int = 150,
    max_events: int = 512,
    subjects_a_shard: int = 5000,
    with_values: bool = False,
    seed: int = 0,
) -> Path:
    """A MEDS dataset of random events: log-normal lengths (sigma 0.9, as of hospital records), cut at `max_events`; codes by
    Zipf's law; label set `outcome` at each subject's end, true for every second subject.

    Args:
        with_values: half of the codes then carry numbers.
    """
    rng, writer, labels, first = np.random.default_rng(seed), MedsWriter(root, "benchmark"), [], 0
    for split, share in SPLIT_SHARES.items():
        n_left = round(n_subjects * share)
        while n_left:
            n = min(n_left, subjects_a_shard)
            lengths = np.clip(rng.lognormal(np.log(median_events), 0.9, n).astype(int), 2, max_events)
            events = random_events(rng, np.arange(first, first + n), lengths, n_codes, with_values)
            writer.add_shard(split, events)
            labels.append(events.group_by("subject_id", maintain_order=True).agg(pl.col("time").max()))
            first, n_left = first + n, n_left - n
    every = pl.concat(labels).rename({"time": "prediction_time"})
    writer.add_labels(LABELS, every.with_columns(boolean_value=pl.col("subject_id") % 2 == 0))
    codes = [f"C{i}" for i in range(n_codes)]
    texts = [f"Finding {i} of organ {i % 97}, grade {i % 7}" for i in range(n_codes)]
    writer.add_codes(pl.DataFrame({"code": codes, "description": texts}))
    writer.finish()
    return root


def random_events(
    rng: np.random.Generator,
    subjects: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    n_codes: int,
    with_values: bool,
) -> pl.DataFrame:
    """Events of subjects, of each as many as its length says, minutes to days apart."""
    n = int(lengths.sum())
    code = rng.zipf(1.3, n) % n_codes
    values = np.where(code % 2 == 0, rng.normal(100, 15, n), np.nan) if with_values else np.full(n, np.nan)
    gaps = (rng.exponential(3 * 86_400, n) * 1e6).astype("timedelta64[us]")
    elapsed = np.cumsum(gaps)
    starts = np.cumsum(lengths) - lengths
    return pl.DataFrame(
        {
            "subject_id": np.repeat(subjects, lengths),
            "time": FIRST_TIME + (elapsed - np.repeat(elapsed[starts], lengths)),
            "code": "C" + pl.Series(code).cast(pl.String),
            "numeric_value": pl.Series(values, dtype=pl.Float32).fill_nan(None),
        }
    )
