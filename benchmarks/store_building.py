"""From MEDS to an event store: events a second and peak memory as the dataset grows, its shards staying as large.

    python -m benchmarks.store_building
    python -m benchmarks.store_building --smallest 1000000 --sizes 2

Sizes grow by factors of ten. Each store is built in a process of its own with the default vocabulary (value bins), one thread.
`events_per_cpu_s` counts the processor's seconds, which other work on the machine changes less.
"""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.common import parser, report, write_cohort
from ehr_embed.memory import peak_memory_mib
from ehr_embed.sources.meds import MedsSource
from ehr_embed.store import build_store
from ehr_embed.vocabulary import VocabularySettings

EVENTS_A_SUBJECT = 196  # the mean of write_cohort's lengths


def build(root: str, folder: str) -> dict[str, float]:
    """Events, seconds of the clock and of the processor, peak memory before and after."""
    before = peak_memory_mib(torch.device("cpu"))
    began, began_cpu = time.perf_counter(), time.process_time()
    store = build_store(Path(folder), MedsSource(root=root), VocabularySettings())
    took, took_cpu = time.perf_counter() - began, time.process_time() - began_cpu
    n_events = sum(split["n_events"] for split in store.manifest["splits"].values())
    return {
        "n_events": n_events,
        "events_per_s": n_events / took,
        "events_per_cpu_s": n_events / took_cpu,
        "peak_memory_mib": peak_memory_mib(torch.device("cpu")),
        "of_it_libraries_mib": before,
    }


def alone(root: Path, folder: Path) -> dict[str, float]:
    """`build` in a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(build, str(root), str(folder)).result()


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    defaults = {"smallest": 100_000, "sizes": 3, "subjects_a_shard": 2500}
    options = parser(__doc__, **defaults).parse_args(arguments)
    os.environ["POLARS_MAX_THREADS"] = "1"  # read by the processes that build
    rows = []
    for n_events in (options.smallest * 10**i for i in range(options.sizes)):
        with tempfile.TemporaryDirectory() as name:
            root = write_cohort(
                Path(name) / "meds",
                n_subjects=max(10, n_events // EVENTS_A_SUBJECT),
                subjects_a_shard=options.subjects_a_shard,
                with_values=True,
            )
            n_shards = len(list((root / "data").rglob("*.parquet")))
            rows.append({"n_shards": n_shards, **alone(root, Path(name) / "store")})
    report(
        "store_building",
        {"sizes": rows, "subjects_a_shard": options.subjects_a_shard},
        dataset="synthetic subjects, log-normal lengths of median 150 cut at 512, half of the codes with numbers",
        device="cpu",
    )


if __name__ == "__main__":
    main()
