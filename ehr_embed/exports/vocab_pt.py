"""The table as the original pipeline keeps it: vocab_embeddings.pt, {token id: (E,)}, and its vocab.csv."""

from __future__ import annotations

import logging
from pathlib import Path

import polars as pl
import torch

from ehr_embed.core.files import atomic_path
from ehr_embed.embedding.prepare import Prepared
from ehr_embed.exports.protocol import as_stored, export_dtype, export_folder, token_strings
from ehr_embed.tasks.protocol import Task

log = logging.getLogger(__name__)
VECTORS, VOCAB = "vocab_embeddings.pt", "vocab.csv"


class VocabularyExport:
    """Writes `<dir>/vocab_embeddings.pt` and `<dir>/vocab.csv` (token,str).

    Args:
        dir: the folder to write to, absent or empty.
        dtype: `float32` or `float16`.
    """

    def __init__(self, *, dir: str | None = None, dtype: str = "float32") -> None:
        self.dir, self.dtype = dir, export_dtype(dtype)

    def check(self) -> None:
        export_folder(self.dir)

    def write(self, prepared: Prepared, task: Task, labels_dir: Path) -> None:
        folder = export_folder(self.dir)
        write_vocabulary(folder, prepared, self.dtype)
        log.info("wrote %d vectors of width %d to %s", *prepared.table.shape, folder)


def write_vocabulary(folder: Path, prepared: Prepared, dtype: torch.dtype) -> None:
    """Write both files into `folder`."""
    ids, strings = token_strings(prepared)
    table = as_stored(prepared.table, dtype)
    with atomic_path(folder / VECTORS) as path:
        # A clone each: a row that is a view would be saved with the whole table behind it.
        torch.save({token: table[token].clone() for token in ids}, path)
    with atomic_path(folder / VOCAB) as path:
        pl.DataFrame({"token": ids, "str": strings}).write_csv(path)
