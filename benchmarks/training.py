"""Training events a second (padding not counted) of our path against the original design (benchmarks/original.py).

    python -m benchmarks.training
    python -m benchmarks.training --subjects 4000 --repeats 3 --dropout-percent 0
    python -m benchmarks.training --device cuda --subjects 20000
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python -m benchmarks.training --float32 1

The same subjects, model size and batch size on both sides; an epoch of one, then of the other. Both clip gradients and step
AdamW. The last command computes as a CPU without AVX-512 does.

Ours is the trainer itself with its defaults: event store, table lookup, batches of similar length, mixed precision.
The original reads a file a subject, pads random batches to the longest and computes in float32. `ratio_cpu_time` compares
the processor's seconds of the whole calls, which other work on the machine changes less (ours then includes an evaluation).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from benchmarks.common import alternate, parser, ratio, report, write_cohort
from benchmarks.original import OriginalEncoder, loader
from ehr_embed.data.store import build_store
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.exports.patient_files import sample_record
from ehr_embed.models.decoder import Decoder
from ehr_embed.models.encoder import Encoder
from ehr_embed.sources.meds import MedsSource
from ehr_embed.tasks.classification import Classification
from ehr_embed.tasks.next_event import NextEvent
from ehr_embed.tasks.protocol import Task
from ehr_embed.tasks.set_up import set_up
from ehr_embed.training.batch_tokens import with_batch_tokens
from ehr_embed.training.settings import TrainerSettings
from ehr_embed.training.trainer import Trainer

EMBEDDING_DIM, BATCH_SIZE, LEARNING_RATE = 384, 32, 1e-4
SIZES = {
    "dropout_percent": 10,
    "model_dim": 256,
    "layers": 6,
    "context": 512,
    "median_events": 150,
    "batch_tokens": 16_384,
    "batch_size": BATCH_SIZE,
    "compile": 0,
    "epochs": 1,
    "pretrain": 0,
    "codes": 5000,
    "float32": 0,
}
"""Options of model, cohort and trainer, with their defaults; `batch_tokens` and `batch_size` of 0 are `auto` and null, and
`compile` of 2 is `head`. The original has batches of `BATCH_SIZE`."""
HEAD = 2
RATES = ("events_per_s", "tokens_per_s", "padding_share", "mfu")


class Sides:
    """Both ways to train on one cohort; the original's files are written only with `with_files`."""

    def __init__(self, folder: Path, options: argparse.Namespace, *, with_files: bool = True) -> None:
        lengths = {"median_events": options.median_events, "max_events": options.context}
        root = write_cohort(folder / "meds", n_subjects=options.subjects, n_codes=options.codes, **lengths)
        settings = (
            VocabularySettings(values="none", min_count=1) if options.pretrain else VocabularySettings(values="none")
        )
        store = build_store(folder / "store", MedsSource(root=str(root)), settings)
        self.folder, self.options, self.store = folder, options, store
        self.table = torch.randn(len(store.vocabulary), EMBEDDING_DIM, generator=torch.Generator().manual_seed(0))
        made = NextEvent(windows="packed") if options.pretrain else Classification(monitor="auroc")
        self.task = cast(Task, made)
        set_up(self.task, store, root / "labels", options.context)
        self.files = folder / "train"
        self.files.mkdir()
        samples, split = self.task.samples["train"], store.split("train")
        for number in range(len(samples) if with_files else 0):
            record = sample_record(split, samples, number, self.table)
            torch.save(record, self.files / f"patient_{number}.pt")
        self.n_events = {"ours": 0, "original": 0}
        self.facts: dict[str, Any] = {}

    @property
    def sizes(self) -> dict[str, Any]:
        """Return the sizes with which either model is built."""
        options = self.options
        sizes = {"model_dim": options.model_dim, "n_heads": 8, "n_layers": options.layers, **self.task.sizes}
        return sizes | {"embedding_dim": EMBEDDING_DIM, "dropout": options.dropout_percent / 100}

    def ours(self) -> float:
        """Events a second of the trainer in its last epoch; those before it bear what comes once, such as compilation."""
        torch.manual_seed(0)
        kind = Decoder if self.options.pretrain else Encoder
        model, embedding = kind(**self.sizes, max_length=self.options.context), EventEmbedding(self.table)
        settings = TrainerSettings(
            epochs=self.options.epochs,
            batch_size=None if self.options.pretrain else self.options.batch_size or None,
            learning_rate=LEARNING_RATE,
            accelerator=self.options.device,
            batch_tokens=self.options.batch_tokens or "auto",
            checkpoint_every=None,
            compile="head" if self.options.compile == HEAD else bool(self.options.compile),
            precision="32-true" if self.options.float32 else "auto",
        )
        processes = settings.launch()
        settings = with_batch_tokens(settings, processes, task=self.task, model=model, embedding=embedding, seed=0)
        trainer = Trainer(
            settings,
            processes,
            task=self.task,
            run_dir=self.folder,
            config={},
            identity={},
            sizes=self.sizes,
            seed=0,
            log=lambda row, epoch: None,
        )
        self.facts = trainer.fit(model, embedding)
        self.n_events["ours"] = round(self.facts["events_per_s"] * self.facts["seconds"] / self.options.epochs)
        last = self.facts["history"][-1]
        self.facts |= {name: last[f"train/{name}"] for name in RATES if f"train/{name}" in last}
        self.facts["batch_tokens"] = settings.most_batch_tokens
        return float(self.facts["events_per_s"])

    def original(self) -> float:
        """Events a second of one epoch of the original."""
        torch.manual_seed(0)
        device, n_events = self.options.device, 0
        model = OriginalEncoder(**self.sizes).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        began = time.perf_counter()
        for batch in loader(self.files, BATCH_SIZE):
            mask = batch["padding_mask"].to(device)
            optimizer.zero_grad()
            logits = model(batch["embeddings"].to(device), mask)
            loss = F.cross_entropy(logits, batch["label"].to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            n_events += int(mask.sum())
        if device == "cuda":
            torch.cuda.synchronize()
        self.n_events["original"] = n_events
        return n_events / (time.perf_counter() - began)


def same_losses(sides: Sides) -> tuple[float, float]:
    """Losses of both on the first samples with the same weights, in float32 without dropout: they are one model."""
    task, index = sides.task, torch.arange(min(BATCH_SIZE, len(sides.task.samples["train"])))
    ours = Encoder(**sides.sizes, max_length=sides.options.context).eval()
    original = OriginalEncoder(**sides.sizes).eval()
    original.load(ours)
    batch = task.dataset("train")[index.numpy()]
    files = loader(sides.files, BATCH_SIZE)
    records = files.collate_fn([files.dataset[int(i)] for i in index])
    with torch.inference_mode():
        step = task.step(ours, EventEmbedding(sides.table), batch)
        first = step.loss_sum / step.count
        second = F.cross_entropy(original(records["embeddings"], records["padding_mask"]), records["label"])
    return float(first), float(second)


def dataset_of(options: argparse.Namespace) -> str:
    """The cohort in words."""
    return f"{options.subjects} synthetic subjects, log-normal lengths of median {options.median_events} cut at {options.context}"


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    found = parser(__doc__, subjects=1000, repeats=3, **SIZES)
    options = found.parse_args(arguments)
    if options.pretrain:
        found.error(
            "--pretrain has no original to compare with: python -m benchmarks.utilisation --pretrain 1 --original 0"
        )
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(Path(folder), options)
        losses = same_losses(sides)
        sides.ours()  # warm-up
        cpu: dict[str, list[float]] = {"ours": [], "original": []}

        def measured(side: str) -> float:
            began = time.process_time()
            rate: float = getattr(sides, side)()
            cpu[side].append(time.process_time() - began)
            return rate

        rates = alternate({side: partial(measured, side) for side in cpu}, options.repeats)
        result = {f"events_per_s_{name}": sorted(values)[len(values) // 2] for name, values in rates.items()}
        report(
            "training",
            result
            | {"ratio": ratio(rates["ours"], rates["original"]), "ratio_cpu_time": ratio(cpu["original"], cpu["ours"])}
            | {f"n_events_{name}": n for name, n in sides.n_events.items()}
            | dict(zip(("loss_ours", "loss_original"), losses, strict=True))
            | {name: sides.facts[name] for name in ("padding_share", "precision", "n_parameters", "peak_memory_mib")}
            | {name: getattr(options, name) for name in ("repeats", *SIZES)}
            | {"batch_tokens": sides.facts["batch_tokens"]},
            dataset=dataset_of(options),
            device=options.device,
        )


if __name__ == "__main__":
    main()
