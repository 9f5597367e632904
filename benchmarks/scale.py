"""From MEDS to predictions: time and peak memory of each step as the dataset grows.

    python -m benchmarks.scale --events 1000000 10000000
    python -m benchmarks.scale --events 100000000 --folder SCRATCH
    python -m benchmarks.scale --events 1000000 --steps embed train --model code_encoder

Each size is a dataset of `--events` events of `--codes` codes (half of them with numbers), a thousand events per subject on
average, and one label per subject. Its steps run one after the other, each in a process of its own: `embed` (store and table, by
the hashing embedder), `train` (one epoch of `--model`, then the evaluation with `--replicates` replicates of the bootstrap),
`again` (the same run with another seed, which finds what the first one kept with the store) and `predict` (all subjects of
held_out, from the MEDS files). The folder of a size is removed before the next one.

`seconds` is by the clock, `cpu_s` what all threads of the process computed, which another job on the machine hardly moves.
`peak_memory_mib` is all that was resident: the libraries (of which `of_it_libraries_mib` are not files), what the step allocated
(`of_it_own_mib`, sampled), and pages of the mapped store, which the system takes back when it needs them. `growth` compares each
size with the one before it: the exponent of the number of events, 1 where a step takes ten times as long or as much for ten times
the events.
"""

from __future__ import annotations

import math
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import polars as pl
import torch
from hydra import compose, initialize_config_dir

from benchmarks.common import LABELS, parser, report, write_cohort
from ehr_embed import predict
from ehr_embed.core.files import read_json
from ehr_embed.experiment.cli import CONF
from ehr_embed.experiment.inputs import embed
from ehr_embed.experiment.run import run
from ehr_embed.training.memory import peak_memory_mib

EVENTS_PER_SUBJECT, MEDIAN_EVENTS, MAX_EVENTS = 1000, 667, 20_000
STEPS = ("embed", "train", "again", "predict")
CPU = torch.device("cpu")
SAMPLE_S = 0.02
KIB_PER_MIB = 1024


@contextmanager
def own_memory() -> Iterator[list[float]]:
    """Sample the memory that this process alone has; the list holds what it was before and its peak meanwhile, MiB."""
    before, is_over = anonymous_mib(), threading.Event()
    found = [before, before]

    def sample() -> None:
        while not is_over.wait(SAMPLE_S):
            found[1] = max(found[1], anonymous_mib())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()


def anonymous_mib() -> float:
    """Return the resident memory of this process that is no page of a file, MiB; 0 without Linux's /proc."""
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / KIB_PER_MIB if found else 0.0


def step(name: str, folder: Path, model: str, replicates: int) -> dict[str, Any]:
    """Do one step in this process."""
    root, runs = folder / "meds", folder / "runs"
    data = [
        "data=meds", f"data.root={root}", f"task.labels={LABELS}", "embedder=hashing", f"cache_dir={folder / 'cache'}",
    ]  # fmt: skip
    trained = ["trainer=short", "trainer.epochs=1", f"trainer.n_bootstrap={replicates}", f"model={model}"]
    output = folder / "predictions.parquet"
    asked = [
        f"run={runs / 'train'}",
        f"data.root={root}",
        "split=held_out",
        f"task.labels={LABELS}",
        f"output={output}",
    ]
    overrides = {
        "embed": data,
        "train": [*data, *trained, f"run_dir={runs / 'train'}"],
        "again": [*data, *trained, f"run_dir={runs / 'again'}", "seed=1"],
        "predict": asked,
    }[name]
    work = {"embed": embed, "predict": predict.predict}.get(name, run)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(name if name in ("embed", "predict") else "train", overrides=overrides)
    began, began_cpu = time.perf_counter(), time.process_time()
    with own_memory() as own:
        work(cfg)
    found: dict[str, Any] = {
        "seconds": time.perf_counter() - began,
        "cpu_s": time.process_time() - began_cpu,
        "peak_memory_mib": peak_memory_mib(CPU),
        "of_it_own_mib": own[1] - own[0],
        "of_it_libraries_mib": own[0],
    }
    if name in ("train", "again"):
        facts = read_json(runs / name / "metrics.json")["train"]
        audited = read_json(runs / name / "audit.json")["seconds"]
        found |= {"epoch_s": facts["seconds"], "events_per_s": facts["events_per_s"], "audit_s": audited}
    if name == "predict":
        found["n_predictions"] = len(pl.read_parquet(output))
    return found


def alone(name: str, folder: Path, model: str, replicates: int) -> dict[str, Any]:
    """`step` in a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(step, name, folder, model, replicates).result()


def growth(small: dict[str, Any], large: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Exponents of the number of events between two sizes, of the seconds and of the memory beyond the libraries.

    >>> one, ten = ({"n_events": n, "embed": {"seconds": n / 2, "of_it_own_mib": n}} for n in (1, 10))
    >>> growth(one, ten)
    {'embed': {'seconds': 1.0, 'memory': 1.0}}
    """
    more = math.log(large["n_events"] / small["n_events"])

    def exponent(name: str, of: Any) -> float:
        return math.log(max(of(large[name]), 1e-3) / max(of(small[name]), 1e-3)) / more

    return {
        name: {
            "seconds": exponent(name, lambda found: found["seconds"]),
            "memory": exponent(name, lambda found: found["of_it_own_mib"]),
        }
        for name in STEPS
        if name in small and name in large
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    found = parser(__doc__, codes=50_000, replicates=1000, subjects_a_shard=1000)
    found.add_argument("--events", type=int, nargs="+", default=[10**6, 10**7])
    found.add_argument("--model", default="encoder_small")
    found.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    found.add_argument("--folder", type=Path, help="where each size's folder is made; the system's temporary one")
    options = found.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for n_events in options.events:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="scale-") as scratch:
            folder = Path(scratch)
            began = time.perf_counter()
            write_cohort(
                folder / "meds",
                n_subjects=max(100, n_events // EVENTS_PER_SUBJECT),
                n_codes=options.codes,
                median_events=min(MEDIAN_EVENTS, n_events * MEDIAN_EVENTS // (100 * EVENTS_PER_SUBJECT)),
                max_events=MAX_EVENTS,
                subjects_a_shard=options.subjects_a_shard,
                with_values=True,
            )
            row: dict[str, Any] = {"writing_s": time.perf_counter() - began}
            shards = (folder / "meds" / "data").rglob("*.parquet")
            row["n_events"] = sum(pl.scan_parquet(path).select(pl.len()).collect().item() for path in shards)
            for name in options.steps:
                row[name] = alone(name, folder, options.model, options.replicates)
                print(f"{n_events:,} events, {name}: {row[name]}", flush=True)
        if rows:
            row["growth"] = growth(rows[-1], row)
        rows.append(row)
    report(
        "scale",
        {"sizes": rows, "n_codes": options.codes, "replicates": options.replicates, "model": options.model},
        dataset=f"synthetic records, log-normal lengths of mean {EVENTS_PER_SUBJECT}, half of the codes with numbers",
        device="cpu",
    )


if __name__ == "__main__":
    main()
