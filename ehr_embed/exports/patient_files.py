"""Export the samples in the original pipeline's format: one dense file per sample, {train,tuning,held_out}/patient_*.pt."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_directory, atomic_path
from ehr_embed.core.progress import ProgressBar
from ehr_embed.core.settings import Count
from ehr_embed.data.samples import Samples
from ehr_embed.data.store import SplitEvents
from ehr_embed.embedding.prepare import Prepared
from ehr_embed.exports.protocol import Dtype, as_stored, export_dtype, export_folder
from ehr_embed.exports.vocab_pt import write_vocabulary
from ehr_embed.tasks.protocol import Task, WeighsSamples
from ehr_embed.tasks.set_up import set_up

log = logging.getLogger(__name__)
ID_BYTES, FILE_BYTES = 8, 2000
"""Bytes of a token id, and bytes of a .pt file in addition to its numbers."""
WHOLE_RECORD = 2**31


class PatientFilesExport:
    """Export that writes one file per sample: {'embeddings': (N, E), 'token_ids': (N,) int64, 'label': ()} for its N events.

    Beside these files it writes samples.csv (split, file, subject_id, prediction_time, label), classes.csv (label, class),
    vocab.csv and vocab_embeddings.pt. The files have no place for the numeric values that `data.values=continuous` or `both`
    store beside the tokens.

    Args:
        dir: folder for the files, which must be absent or empty.
        dtype: type of the embeddings, `float32` or `float16`.
        max_length: largest number of events per file: the static events and the latest others; None = the whole record up to
            the prediction time.
    """

    def __init__(self, *, dir: str | None = None, dtype: Dtype = "float32", max_length: Count | None = None) -> None:
        self.dir, self.dtype, self.max_length = dir, export_dtype(dtype), max_length

    def check(self) -> None:
        """Raise `UserError` if the folder is not given or is not empty."""
        export_folder(self.dir)

    def write(self, prepared: Prepared, task: Task, labels_dir: Path) -> None:
        """Write the files of all splits, and the tables beside them."""
        folder = export_folder(self.dir)
        set_up(task, prepared.store, labels_dir, self.max_length or WHOLE_RECORD)
        table = as_stored(prepared.table, self.dtype)
        self._announce(folder, prepared, task.samples, table)
        if prepared.store.manifest["has_values"]:
            log.warning(
                "the event store holds numeric values beside its tokens, and the exported files cannot hold them: a model trained "
                "on these files sees no values. Type: data.values=bins to put values into the tokens"
            )
        rows = []
        for split, samples in task.samples.items():
            events = prepared.store.split(split)
            with atomic_directory(folder / split) as target:
                for number in ProgressBar(range(len(samples)), desc=f"export {split}", unit="file"):
                    record = sample_record(events, samples, number, table)
                    torch.save(record, target / f"patient_{number}.pt")
            rows.append(_sample_rows(split, samples))
        with atomic_path(folder / "samples.csv") as path:
            pl.concat(rows).write_csv(path)
        if isinstance(task, WeighsSamples):
            with atomic_path(folder / "classes.csv") as path:
                pl.DataFrame({"label": range(len(task.class_names)), "class": task.class_names}).write_csv(path)
        write_vocabulary(folder, prepared, self.dtype)
        log.info("wrote %d files to %s", sum(map(len, task.samples.values())), folder)

    def _announce(self, folder: Path, prepared: Prepared, samples: dict[str, Samples], table: Tensor) -> None:
        """Log the size of the export and of the event store before the first file is written.

        Raises:
            UserError: the disk has less free space than the export needs.
        """
        n_files = sum(map(len, samples.values()))
        n_events = sum(int(split.lengths.sum()) for split in samples.values())
        per_event = table.shape[1] * table.element_size() + ID_BYTES
        n_bytes = n_events * per_event + n_files * FILE_BYTES
        held = sum(path.stat().st_size for path in prepared.store.folder.rglob("*") if path.is_file())
        log.warning(
            "the export will take %s in %d files (%d events of %d bytes); the store and its tables hold the same in %s",
            readable_size(n_bytes),
            n_files,
            n_events,
            per_event,
            readable_size(held),
        )
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(parent).free
        if n_bytes > free:
            raise UserError(
                f"export.dir={folder}: {readable_size(free)} are free, the export needs {readable_size(n_bytes)}. "
                "Nothing was written. Type: export.dtype=float16, export.max_length=FEWER, or export.dir=ON_ANOTHER_DISK"
            )


def readable_size(n_bytes: float) -> str:
    """Return a number of bytes as text in the largest unit that gives at least 1.

    >>> readable_size(512), readable_size(3 * 2**30)
    ('512.0 B', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def sample_record(events: SplitEvents, samples: Samples, number: int, table: Tensor) -> dict[str, Tensor]:
    """Return the content of one file: the static events of a sample, then its events up to the prediction time."""
    parts = (
        events.token_ids[samples.static_start[number] : samples.static_stop[number]],
        events.token_ids[samples.start[number] : samples.stop[number]],
    )
    token_ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))
    return {"embeddings": table[token_ids], "token_ids": token_ids, "label": torch.as_tensor(samples.labels[number])}


def _sample_rows(split: str, samples: Samples) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "split": [split] * len(samples),
            "file": [f"patient_{number}.pt" for number in range(len(samples))],
            **samples.meds_keys,
            "label": [str(label) for label in samples.labels.tolist()],
        }
    )
