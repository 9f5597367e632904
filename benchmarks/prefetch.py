"""Training events a second with and without a thread that reads the next batch (trainer.prefetch), from a store on disk.

    python -m benchmarks.prefetch
    python -m benchmarks.prefetch --cold 1
    python -m benchmarks.prefetch --device cuda --model-dim 256 --layers 6 --batch-tokens 131072

One epoch of an encoder each, in turn, through the trainer, with the events on the host. With `--cold 1` the pages of the store's
files are dropped before each epoch, so that the batches are read from the disk. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import alternate, parser, ratio, report, write_cohort
from ehr_embed.data.store import EventStore, build_store
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.encoder import Encoder
from ehr_embed.sources.meds import MedsSource
from ehr_embed.tasks.classification import Classification
from ehr_embed.tasks.set_up import set_up
from ehr_embed.training.settings import TrainerSettings
from ehr_embed.training.trainer import Trainer

EMBEDDING_DIM, CONTEXT = 384, 512


def drop_pages(folder: Path) -> None:
    """Let the system forget the contents of a folder's files, which no process may have mapped."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_bytes() -> int:
    """Bytes that this process has had read from a disk; 0 where the system does not tell."""
    told = Path("/proc/self/io")
    lines = told.read_text().splitlines() if told.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)


def epoch(folder: Path, labels: Path, options: argparse.Namespace, *, prefetch: bool, read: list[int]) -> float:
    """Events a second of one epoch of training."""
    if options.cold:
        drop_pages(folder / "store")
    before, store, task = read_bytes(), EventStore(folder / "store"), Classification(monitor="auroc")
    set_up(task, store, labels, CONTEXT)
    sizes: dict[str, Any] = {"embedding_dim": EMBEDDING_DIM, "n_heads": 2, **task.sizes}
    torch.manual_seed(0)
    model = Encoder(**sizes, model_dim=options.model_dim, n_layers=options.layers, max_length=CONTEXT)
    settings = TrainerSettings(
        epochs=1,
        batch_size=None,
        batch_tokens=options.batch_tokens,
        accelerator=options.device,
        data_device="host",
        prefetch=prefetch,
        checkpoint_every=None,
    )
    trainer = Trainer(
        settings, settings.launch(), task=task, run_dir=folder, config={}, identity={}, sizes=sizes, seed=0,
        log=lambda row, epoch: None,
    )  # fmt: skip
    table = torch.randn(len(store.vocabulary), EMBEDDING_DIM, generator=torch.Generator().manual_seed(0))
    facts = trainer.fit(model, EventEmbedding(table))
    read.append(read_bytes() - before)
    return float(facts["events_per_s"])


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    found = parser(__doc__, subjects=6000, repeats=5, model_dim=16, layers=1, batch_tokens=16_384, cold=0)
    options = found.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder, read = Path(name), list[int]()
        root = write_cohort(folder / "meds", n_subjects=options.subjects)
        build_store(folder / "store", MedsSource(root=str(root)), VocabularySettings(values="none"))
        one = partial(epoch, folder, root / "labels", options, read=read)
        one(prefetch=False)  # warm-up
        rates = alternate(
            {"with": partial(one, prefetch=True), "without": partial(one, prefetch=False)}, options.repeats
        )
    report(
        "prefetch",
        {f"events_per_s_{side}": median(own) for side, own in rates.items()}
        | {"ratio": ratio(rates["with"], rates["without"])}
        | {"ratios": [a / b for a, b in zip(rates["with"], rates["without"], strict=True)]}
        | {"read_mib_an_epoch": median(read[1:]) / 2**20}
        | {name: getattr(options, name) for name in ("repeats", "model_dim", "layers", "batch_tokens", "cold")},
        dataset=f"{options.subjects} synthetic subjects, log-normal lengths of median 150 cut at {CONTEXT}",
        device=options.device,
    )


if __name__ == "__main__":
    main()
