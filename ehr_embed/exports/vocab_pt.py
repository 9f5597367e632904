"""Export the embedding table in the original pipeline's format: vocab_embeddings.pt, {token id: (E,)}, and vocab.csv."""

from __future__ import annotations

import logging
from pathlib import Path

import polars as pl
import torch

from ehr_embed.core.files import atomic_path
from ehr_embed.embedding.prepare import Prepared
from ehr_embed.exports.protocol import Dtype, as_stored, export_dtype, export_folder, token_strings
from ehr_embed.tasks.protocol import Task

log = logging.getLogger(__name__)
VECTORS, VOCAB = "vocab_embeddings.pt", "vocab.csv"


class VocabularyExport:
    """Export that writes `<dir>/vocab_embeddings.pt` and `<dir>/vocab.csv` (columns token,str).

    Args:
        dir: folder for the files, which must be absent or empty.
        dtype: type of the vectors, `float32` or `float16`.
    """

    def __init__(self, *, dir: str | None = None, dtype: Dtype = "float32") -> None:
        self.dir, self.dtype = dir, export_dtype(dtype)

    def check(self) -> None:
        """Raise `UserError` if the folder is not given or is not empty."""
        export_folder(self.dir)

    def write(self, prepared: Prepared, task: Task, labels_dir: Path) -> None:
        """Write both files."""
        folder = export_folder(self.dir)
        write_vocabulary(folder, prepared, self.dtype)
        log.info("wrote %d vectors of width %d to %s", *prepared.table.shape, folder)


def write_vocabulary(folder: Path, prepared: Prepared, dtype: torch.dtype) -> None:
    """Write the embedding table and the vocabulary into `folder`."""
    ids, strings = token_strings(prepared)
    table = as_stored(prepared.table, dtype)
    with atomic_path(folder / VECTORS) as path:
        # torch.save stores the whole storage behind a view, so each row must be a copy of its own.
        torch.save({token: table[token].clone() for token in ids}, path)
    with atomic_path(folder / VOCAB) as path:
        pl.DataFrame({"token": ids, "str": strings}).write_csv(path)
