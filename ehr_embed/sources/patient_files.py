"""Import the original pipeline's embedded corpus, one dense file per patient, once as MEDS plus a table of vectors.

Layout: `<data_dir>/{train,tuning,held_out}/patient_*.pt`, each {'embeddings': (N, E), 'token_ids': (N,), 'label': ()}.
All occurrences of a token have the same vector, so token ids and one table of vectors hold all of a file's content. The
import verifies this, writes every token as a code, and keeps the vectors in `extra/vectors.parquet`, where
`embedder=from_files` reads them. The result is an ordinary MEDS dataset, and the model receives the same numbers as
with the original files.

The files have neither subjects nor times. Each file counts as one subject; subjects are numbered through the splits in
the order of the file names. Events lie one day apart. Only their order is meaningful, so `model.positions=time` is of
no use here.
"""

from __future__ import annotations

import logging
import pickle
import zlib
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import file_sha256
from ehr_embed.core.fingerprints import fingerprint_of_many, known_fingerprints
from ehr_embed.core.lost_data import say_or_refuse
from ehr_embed.core.progress import ProgressBar
from ehr_embed.sources.imported import find_shards, import_folder, import_once
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.meds_writer import MedsWriter, write_parquet
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.sources.token_texts import read_token_strings

log = logging.getLogger(__name__)
KEYS = ("embeddings", "token_ids", "label")
VECTORS = Path("extra") / "vectors.parquet"
LABELS = "label"
"""Name of the label set that holds the files' labels."""
FIRST_TIME = datetime(2000, 1, 1)
TOLERANCE = 1e-4
"""Largest difference between two vectors of a token that counts as rounding, as a share of the largest component."""
SHARD_EVENTS = 1_000_000
SAMPLED_FILES = 16
"""Files per split whose content earlier versions compared; a fingerprint begins with that of these versions."""


def patient_files_source(
    *,
    data_dir: str | None,
    vocab_filepath: str | None = None,
    root: str | None = None,
    cache_dir: str = "cache",
    overwrite: bool = False,
    splits: str | None = None,
    split_column: str = "split",
) -> MedsSource:
    """Import the corpus unless that is done, and open the import as a MEDS dataset.

    Args:
        data_dir: folder with train/, tuning/ and held_out/.
        vocab_filepath: CSV with columns token,str that names the tokens; None = `<data_dir>/vocab.csv` if it exists,
            else tokens are named by their ids.
        root: folder for the MEDS dataset; None = a folder of the cache.
        cache_dir: folder of the cache.
        overwrite: whether to import again.
        splits, split_column: as for `MedsSource`.

    Raises:
        UserError: a file is missing, damaged or not in this layout, or a token has two vectors.
    """
    files = find_shards(data_dir, ".pt", "python train.py data=patient_files data.data_dir=DIR")
    base = Path(str(data_dir))
    if vocab_filepath is None and (base / "vocab.csv").is_file():
        vocab_filepath = str(base / "vocab.csv")
    strings = None if vocab_filepath is None else read_token_strings(vocab_filepath)
    folder = import_folder(root=root, cache_dir=cache_dir, data_dir=data_dir)
    with known_fingerprints(Path(cache_dir)):
        made_from: dict[str, Any] = {
            split: fingerprint_of_many(paths, sampled=SAMPLED_FILES) for split, paths in files.items()
        }
    made_from["vocab_filepath"] = None if vocab_filepath is None else file_sha256(vocab_filepath)[:16]

    def write(target: Path) -> None:
        _Import(MedsWriter(target, base.resolve().name), strings).run(files)

    import_once(folder, made_from, write, overwrite=overwrite)
    return MedsSource(root=str(folder), name=base.resolve().name, splits=splits, split_column=split_column)


def read_patient_file(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], int]:
    """Return token_ids (N,), embeddings (N, E) and the label of one file.

    Raises:
        UserError: the file is damaged, holds more than plain tensors, or has other keys, shapes or types.
    """
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, zlib.error) as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(
            f"{path}: not a readable file of plain tensors ({reason}). It may be truncated, or hold code that is not run "
            "here. Write it again, or remove it."
        ) from error
    if not isinstance(record, dict) or not set(KEYS) <= set(record):
        found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{path}: expected a dict with {', '.join(KEYS)}, found {found}. It belongs to another corpus.")
    vectors, ids, label = (torch.as_tensor(record[key]) for key in KEYS)
    good = vectors.ndim == 2 and ids.shape == vectors.shape[:1] and label.numel() == 1
    if not good or not vectors.is_floating_point() or ids.is_floating_point() or label.is_floating_point():
        raise UserError(
            f"{path}: embeddings {tuple(vectors.shape)} {vectors.dtype}, token_ids {tuple(ids.shape)} {ids.dtype}, label "
            f"{tuple(label.shape)} {label.dtype}; expected (N, E) floating, (N,) integer and one integer."
        )
    if len(ids) and (int(ids.min()) < 0 or not bool(torch.isfinite(vectors).all())):
        raise UserError(f"{path}: a negative token id, or NaN or infinity among the embeddings. Write the file again.")
    return ids.to(torch.int64).numpy(), vectors.float().numpy(), int(label)


class _Import:
    """Collect the tokens, vectors and labels of all files while the events are written."""

    def __init__(self, writer: MedsWriter, strings: dict[int, str] | None) -> None:
        self.writer, self.strings = writer, strings
        self.row_of = np.full(1024, -1, np.int64)
        self.tokens: list[int] = []
        self.vectors = np.empty((0, 0), np.float32)
        self.labels: list[tuple[int, datetime, int]] = []

    def run(self, files: dict[str, list[Path]]) -> None:
        """Read every file once, and write the dataset."""
        pending: list[tuple[int, npt.NDArray[np.int64]]] = []
        n_empty = 0
        with ProgressBar(total=sum(map(len, files.values())), desc="import", unit="file") as bar:
            for split in SPLITS:
                for path in files[split]:
                    ids, vectors, label = read_patient_file(path)
                    bar.update()
                    if not len(ids):
                        n_empty += 1
                        continue
                    self.add(path, ids, vectors)
                    subject = len(self.labels)
                    self.labels.append((subject, FIRST_TIME + timedelta(days=len(ids) - 1), label))
                    pending.append((subject, ids))
                    if sum(len(ids) for _, ids in pending) >= SHARD_EVENTS:
                        self._write(split, pending)
                self._write(split, pending)
        say_or_refuse(
            n_empty, sum(map(len, files.values())), "files have no events, and are left out", remedy="Write them again."
        )
        self._finish()

    def add(self, path: Path, ids: npt.NDArray[np.int64], vectors: npt.NDArray[np.float32]) -> None:
        """Keep the vectors of new tokens, and compare the vectors of known tokens with the kept ones.

        Args:
            path: the file, for messages.
            ids: (N,) token ids.
            vectors: (N, E) their vectors.

        Raises:
            UserError: the width differs from that of earlier files, vocab.csv lacks a token, or a token has two
                vectors.
        """
        if not self.tokens:
            self.vectors = np.empty((0, vectors.shape[1]), np.float32)
        if vectors.shape[1] != self.vectors.shape[1]:
            raise UserError(
                f"{path}: embeddings of width {vectors.shape[1]}, those before have {self.vectors.shape[1]}. Expected the vectors "
                "of one embedder; move the files of the other embedder out of this folder."
            )
        if (highest := int(ids.max())) >= len(self.row_of):
            self.row_of = np.concatenate([self.row_of, np.full(2 * highest - len(self.row_of) + 1, -1, np.int64)])
        found, first = np.unique(ids, return_index=True)
        is_new = self.row_of[found] < 0
        new = found[is_new]
        if self.strings is not None and (strange := [int(token) for token in new if int(token) not in self.strings]):
            raise UserError(
                f"{path}: token {strange[0]} is not in vocab.csv, so this file belongs to another corpus or the vocabulary to "
                "another one. Type: data.vocab_filepath=FILE with the right one"
            )
        self.row_of[new] = len(self.tokens) + np.arange(len(new))
        self.tokens.extend(new.tolist())
        if len(new):
            self.vectors = np.concatenate([self.vectors, vectors[first[is_new]]])
        known = self.vectors[self.row_of[ids]]
        differs = np.abs(known - vectors).max(axis=1) > TOLERANCE * max(1e-6, float(np.abs(known).max()))
        if differs.any():
            position = int(np.flatnonzero(differs)[0])
            raise UserError(
                f"{path}: token {ids[position]} at event {position} has another vector than at its first occurrence. The import "
                "needs one vector per token; this corpus was embedded in another way (per event, or by two embedders) and "
                "cannot be imported. Embed its tokens again: data=tokenized."
            )

    def _write(self, split: str, pending: list[tuple[int, npt.NDArray[np.int64]]]) -> None:
        if not pending:
            return
        lengths = [len(ids) for _, ids in pending]
        names = np.array([self._name(token) for token in self.tokens], dtype=object)
        frame = pl.DataFrame(
            {
                "subject_id": np.repeat([subject for subject, _ in pending], lengths),
                "day": np.concatenate([np.arange(length) for length in lengths]),
                "code": names[self.row_of[np.concatenate([ids for _, ids in pending])]].astype(str),
            }
        )
        time = pl.lit(FIRST_TIME).cast(pl.Datetime("us")) + pl.duration(days="day")
        value = pl.lit(None, dtype=pl.Float32)
        self.writer.add_shard(split, frame.select("subject_id", "code", time=time, numeric_value=value))
        pending.clear()

    def _name(self, token: int) -> str:
        return (self.strings or {}).get(token) or f"TOKEN//{token}"

    def _finish(self) -> None:
        names = [self._name(token) for token in self.tokens]
        if len(twice := pl.Series(names).filter(pl.Series(names).is_duplicated())):
            raise UserError(
                f"vocab.csv gives the string {twice[0]!r} to two tokens of the corpus, so their vectors cannot be told apart. "
                "Give each token its own string."
            )
        self.writer.add_codes(pl.DataFrame({"code": names, "description": names}))
        columns: dict[str, Any] = {
            "subject_id": pl.Int64,
            "prediction_time": pl.Datetime("us"),
            "integer_value": pl.Int64,
        }
        labels = pl.DataFrame(self.labels, schema=columns, orient="row")
        if set(labels["integer_value"].unique()) <= {0, 1}:
            value = pl.col("integer_value").cast(pl.Boolean).alias("boolean_value")
            labels = labels.select("subject_id", "prediction_time", value)
        self.writer.add_labels(LABELS, labels)
        self.writer.finish()
        vectors = pl.DataFrame({"token": self.tokens, "text": names, "vector": self.vectors})
        write_parquet(self.writer.folder / VECTORS, vectors)
