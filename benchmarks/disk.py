"""Bytes on disk an event: event store and embedding table, against a dense float32 .pt file a subject.

    python -m benchmarks.disk
    python -m benchmarks.disk --subjects 50000

The store also holds the times, which those files do not. The files' size is that of the first `--files` subjects.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.common import parser, report, write_cohort
from ehr_embed.data.store import build_store
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.embedding.table import save_table
from ehr_embed.exports.patient_files import sample_record
from ehr_embed.sources.meds import MedsSource
from ehr_embed.tasks.classification import Classification
from ehr_embed.tasks.set_up import set_up

EMBEDDING_DIM = 384


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    options = parser(__doc__, subjects=10_000, files=100).parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = write_cohort(folder / "meds", n_subjects=options.subjects)
        store = build_store(folder / "store", MedsSource(root=str(root)), VocabularySettings(values="none"))
        n_events = sum(split["n_events"] for split in store.manifest["splits"].values())
        table = torch.randn(len(store.vocabulary), EMBEDDING_DIM)
        events_bytes = size(folder / "store")
        save_table(folder / "store" / "table.safetensors", table, {})

        task = Classification()
        set_up(task, store, root / "labels", 512)
        samples, split = task.samples["train"], store.split("train")
        (folder / "files").mkdir()
        for number in range(min(options.files, len(samples))):
            torch.save(sample_record(split, samples, number, table), folder / "files" / f"patient_{number}.pt")
        in_files = int(samples.lengths[: options.files].sum())
        ours, original = size(folder / "store") / n_events, size(folder / "files") / in_files
        report(
            "disk",
            {
                "bytes_per_event_ours": ours,
                "bytes_per_event_without_table": events_bytes / n_events,
                "bytes_per_event_original": original,
                "ratio": original / ours,
                "n_events": n_events,
                "n_events_original": in_files,
                "n_tokens": len(store.vocabulary),
            },
            dataset=f"{options.subjects} synthetic subjects, log-normal lengths of median 150 cut at 512, {EMBEDDING_DIM} wide",
            device="cpu",
        )


def size(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
