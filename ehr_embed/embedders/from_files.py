"""Provide the vectors that came with the data in the original pipeline's per-patient files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import file_sha256
from ehr_embed.data.vocabulary import UNKNOWN_TEXT, Vocabulary
from ehr_embed.sources.imported import import_folder
from ehr_embed.sources.patient_files import VECTORS

UNKNOWN_TOKEN = "<unknown>"
"""String of the token for unknown events, in the vocabularies of this project and of the original pipeline."""


class FilesEmbedder:
    """Embedder that looks texts up in the table of vectors that the import of a `data=patient_files` corpus wrote.

    The unknown event has the vector of the corpus' own unknown token, or a vector of zeros if the corpus has none.

    Args:
        data_dir: folder of the corpus.
        root: folder of its import; None = the import's folder in the cache.
        cache_dir: folder of the cache.
        batch_size: texts per call of `embed`.
    """

    reads_text = True

    def __init__(
        self,
        *,
        data_dir: str | None = None,
        root: str | None = None,
        cache_dir: str = "cache",
        batch_size: int = 4096,
    ) -> None:
        self.path = import_folder(root=root, cache_dir=cache_dir, data_dir=data_dir) / VECTORS
        self.batch_size = batch_size

    @property
    def embedding_dim(self) -> int:
        return self._vectors.shape[1]

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Return a digest of the table of vectors, so that two corpora never share cached vectors."""
        self._refuse_missing()
        return {"class": "FilesEmbedder", "sha256": file_sha256(self.path)}

    def names(self, vocabulary: Vocabulary) -> list[str]:
        return vocabulary.texts

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        rows = []
        for text in texts:
            key = UNKNOWN_TOKEN if text == UNKNOWN_TEXT and text not in self._rows else text
            row = self._rows.get(key)
            if row is None and text != UNKNOWN_TEXT:
                raise UserError(
                    f"{self.path} has no vector for {text!r}: embedder=from_files knows the tokens of its corpus only. For "
                    "other texts type: embedder=minilm_l6"
                )
            rows.append(len(self._vectors) if row is None else row)
        zeros = np.zeros((1, self.embedding_dim), np.float32)
        return np.concatenate([self._vectors, zeros])[rows]

    def close(self) -> None:
        """Do nothing: there are no worker processes to end."""

    def _refuse_missing(self) -> None:
        if not self.path.is_file():
            raise UserError(
                f"{self.path}: no such file. embedder=from_files reads the vectors of a corpus of per-patient files. "
                "Type: python train.py data=patient_files data.data_dir=DIR, or another embedder"
            )

    @cached_property
    def _table(self) -> pl.DataFrame:
        self._refuse_missing()
        return pl.read_parquet(Path(self.path), glob=False)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {text: row for row, text in enumerate(self._table["text"].to_list())}

    @cached_property
    def _vectors(self) -> npt.NDArray[np.float32]:
        return np.stack(self._table["vector"].to_list()).astype(np.float32)
