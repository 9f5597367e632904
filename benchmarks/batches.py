"""Samples and tokens a second of building batches alone, against meds-torch-data 0.9 on the same MEDS dataset.

    python -m venv DIR && DIR/bin/pip install 'meds-torch-data==0.9.*'
    python -m benchmarks.batches --peer DIR/bin

Without `--peer` ours is measured alone. Batches of 32 samples, the last 512 events of a subject, one process. Ours are of
similar length and hold six kinds of time and mask; the peer's are random, with codes, values and times. On a GPU there are
two more sides: batches copied there, and batches gathered there from events it holds (trainer.data_device=host and device).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import alternate, cpu_name, parser, ratio, report, seconds, write_cohort
from ehr_embed.data.batches import HOST, batch_loader
from ehr_embed.data.bucket_sampler import BucketSampler
from ehr_embed.data.store import build_store
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.sources.meds import MedsSource
from ehr_embed.tasks.classification import Classification
from ehr_embed.tasks.set_up import set_up

BATCH_SIZE, MAX_LENGTH = 32, 512
PEER = Path(__file__).parent / "peers" / "run_meds_torch_data.py"


def our_loaders(root: Path, folder: Path, device: torch.device) -> dict[str, Any]:
    """The trainer's loaders of an epoch of train: on the host, and for a GPU."""
    store = build_store(folder, MedsSource(root=str(root)), VocabularySettings(values="continuous"))
    task = Classification()
    set_up(task, store, root / "labels", MAX_LENGTH)
    dataset = task.dataset("train")
    sampler = BucketSampler(dataset.lengths, batch_size=BATCH_SIZE, batch_tokens=16_384, shuffle=True)
    loaders = {"ours": batch_loader(dataset, sampler)}
    if device.type == "cuda":
        for side, data_device in (("copied", "host"), ("held", "device")):
            loaders[side] = batch_loader(dataset, sampler, device=device, data_device=data_device)
    return loaders


def epoch(loader: Any, device: torch.device) -> dict[str, float]:
    """Samples, events, and wall and CPU seconds of one pass, until the last batch is on the device."""
    found = {"n_samples": 0, "n_events": 0}

    def work() -> None:
        for batch in (batch.to(device) for batch in loader):
            found["n_samples"] += len(batch.labels)
            found["n_events"] += batch.n_events

    cpu_began = time.process_time()
    return {"seconds": seconds(work, str(device)), "cpu_seconds": time.process_time() - cpu_began, **found}


def cohort(folder: Path, n_subjects: int) -> Path:
    """Write a MEDS dataset half of whose codes carry numbers, and return its folder."""
    return write_cohort(folder, n_subjects=n_subjects, with_values=True)


def preprocess(programs: Path, root: Path, tensors: Path) -> None:
    """Let the peer, whose programs lie in a folder, prepare a MEDS dataset for its batches."""
    command = [str(programs / "MTD_preprocess"), f"MEDS_dataset_dir={root}", f"output_dir={tensors}"]
    others = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}  # it starts others of its own
    subprocess.run(command, check=True, capture_output=True, env=others)


def peer_epoch(python: str, tensors: Path) -> dict[str, Any]:
    """The same of the peer, in its own environment."""
    command = [f"{python}/python", str(PEER), str(tensors), str(BATCH_SIZE), str(MAX_LENGTH)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    found = parser(__doc__, subjects=2000, repeats=3)
    found.add_argument("--peer", help="folder of the programs of an environment with meds-torch-data")
    options = found.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        root, tensors = cohort(Path(name) / "meds", options.subjects), Path(name) / "peer"
        loaders = our_loaders(root, Path(name) / "store", torch.device(options.device))
        devices = {side: HOST if side == "ours" else torch.device(options.device) for side in loaders}
        for side, loader in loaders.items():
            epoch(loader, devices[side])  # warm-up
        last: dict[str, dict[str, Any]] = {}

        def measured(side: str, work: Any) -> float:
            last[side] = work()
            return float(last[side]["n_events"] / last[side]["seconds"])

        def ours(side: str) -> float:
            return measured(side, lambda: epoch(loaders[side], devices[side]))

        sides: dict[str, Callable[[], float]] = {side: partial(ours, side) for side in loaders}
        if options.peer:
            preprocess(Path(options.peer), root, tensors)
            sides["peer"] = lambda: measured("peer", lambda: peer_epoch(options.peer, tensors))
        rates = alternate(sides, options.repeats)
    result: dict[str, Any] = {}
    for side, values in rates.items():
        events_per_s = statistics.median(values)
        result[f"tokens_per_s_{side}"] = events_per_s
        result[f"samples_per_s_{side}"] = events_per_s * last[side]["n_samples"] / last[side]["n_events"]
        result |= {f"{key}_{side}": last[side][key] for key in ("n_samples", "n_events")}
    if options.peer:
        if last["ours"]["n_events"] != last["peer"]["n_events"]:
            raise SystemExit(f"the two sides read different events, so no ratio means anything: {last}")
        result |= {"ratio": ratio(rates["ours"], rates["peer"]), "peer": last["peer"]["peer"]}
    report(
        "batches",
        result | {"repeats": options.repeats, "cpu": cpu_name()},
        dataset=f"{options.subjects} synthetic subjects, log-normal lengths of median 150 cut at {MAX_LENGTH}",
        device=options.device,
    )


if __name__ == "__main__":
    main()
