"""From MEDS to an event store: events a second and peak memory as the dataset grows, its shards staying as large.

    python -m benchmarks.store_building
    python -m benchmarks.store_building --events 10000000 30000000 100000000
    python -m benchmarks.store_building --events 10000000 --subjects-a-shard 10000

Each store is built in a process of its own with the default vocabulary (value bins), one thread. `events_per_cpu_s` counts
the processor's seconds, which other work on the machine changes less. `shards_of_memory` is what the process took beyond its
libraries, in multiples of what the largest shard takes as a frame (the smallest datasets have smaller shards: there
is one for each split at least).
"""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow.parquet as pq
import torch

from benchmarks.common import parser, report, write_cohort
from ehr_embed.data.store import build_store
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.sources.meds import MedsSource
from ehr_embed.training.memory import peak_memory_mib

EVENTS_A_SUBJECT = 196  # the mean of write_cohort's lengths
EVENT_BYTES = (
    52  # subject_id and time, 8 each; code and split, 16 each for strings of up to 12 characters; numeric_value, 4
)
BYTES_A_MIB = 2**20


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
    found = parser(__doc__, subjects_a_shard=2500)
    found.add_argument("--events", type=int, nargs="+", default=[10**5, 10**6, 10**7, 3 * 10**7])
    options = found.parse_args(arguments)
    os.environ["POLARS_MAX_THREADS"] = "1"  # read by the processes that build
    rows = []
    for n_events in options.events:
        with tempfile.TemporaryDirectory() as name:
            root = write_cohort(
                Path(name) / "meds",
                n_subjects=max(10, n_events // EVENTS_A_SUBJECT),
                subjects_a_shard=options.subjects_a_shard,
                with_values=True,
            )
            shards = [pq.read_metadata(path).num_rows for path in (root / "data").rglob("*.parquet")]
            largest_mib = max(shards) * EVENT_BYTES / BYTES_A_MIB
            row = alone(root, Path(name) / "store")
            beyond = row["peak_memory_mib"] - row["of_it_libraries_mib"]
            rows.append(
                {"n_shards": len(shards), "largest_shard_mib": largest_mib}
                | row
                | {"shards_of_memory": beyond / largest_mib}
            )
    report(
        "store_building",
        {"sizes": rows, "subjects_a_shard": options.subjects_a_shard},
        dataset="synthetic subjects, log-normal lengths of median 150 cut at 512, half of the codes with numbers",
        device="cpu",
    )


if __name__ == "__main__":
    main()
