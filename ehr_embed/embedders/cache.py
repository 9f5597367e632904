"""A text-to-vector cache shared by all datasets: SQLite, addressed by the text's digest, one file an embedder."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ehr_embed.embedders.protocol import Embedder
from ehr_embed.errors import UserError
from ehr_embed.files import digest

LOCK_TIMEOUT_S = 600
LOOKUP_CHUNK = 500
"""Keys a query; SQLite limits the parameters of one."""


def embed_texts(embedder: Embedder, texts: Sequence[str], *, cache_dir: Path) -> npt.NDArray[np.float32]:
    """Vectors of texts, (n, E), in their order; only texts that no dataset had before are embedded.

    Each batch is committed on its own, so that an interrupted run loses at most one.

    Raises:
        UserError: an empty text, a vector of the wrong shape or with NaN, or vectors that do not tell texts apart.
    """
    if blank := [i for i, text in enumerate(texts) if not text.strip()]:
        raise UserError(
            f"text {blank[0]} is empty ({len(blank)} such): an empty text has no meaning to embed. Give it a description."
        )
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    keys = {text: hashlib.sha256(text.encode()).digest() for text in distinct}
    found: dict[str, npt.NDArray[np.float32]] = {}
    path = cache_dir / "embeddings" / f"{digest(embedder.fingerprint)}.sqlite"
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT_S)) as database:
        _open(database, path, embedder)
        by_key = {key: text for text, key in keys.items()}
        for start in range(0, len(distinct), LOOKUP_CHUNK):
            chunk = [keys[text] for text in distinct[start : start + LOOKUP_CHUNK]]
            marks = ",".join("?" * len(chunk))
            for key, vector in database.execute(f"SELECT key, vector FROM vectors WHERE key IN ({marks})", chunk):
                found[by_key[key]] = np.frombuffer(vector, np.float32)
        # The longest first: a batch that does not fit in memory fails at once, not at the end.
        missing = [text for text in reversed(distinct) if text not in found]
        with tqdm(total=len(missing), desc="embedding texts", unit="text", disable=None if missing else True) as bar:
            for start in range(0, len(missing), embedder.batch_size):
                batch = missing[start : start + embedder.batch_size]
                vectors = np.ascontiguousarray(embedder.embed(batch), np.float32)
                _check(vectors, batch, embedder.embedding_dim)
                rows = [(keys[text], vector.tobytes()) for text, vector in zip(batch, vectors, strict=True)]
                with database:
                    database.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)
                found.update(zip(batch, vectors, strict=True))
                bar.update(len(batch))
    result = np.stack([found[text] for text in texts]) if texts else np.empty((0, embedder.embedding_dim), np.float32)
    check_informative(result, texts)
    return result


def _open(database: sqlite3.Connection, path: Path, embedder: Embedder) -> None:
    try:
        with database:
            database.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
            database.execute("CREATE TABLE IF NOT EXISTS meta (fingerprint TEXT PRIMARY KEY)")
            fingerprint = json.dumps(embedder.fingerprint, sort_keys=True, default=str)
            database.execute("INSERT OR IGNORE INTO meta VALUES (?)", (fingerprint,))
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"{path}: not a readable vector cache ({error}). Delete it; texts are embedded again."
        ) from error


def _check(vectors: npt.NDArray[np.float32], texts: Sequence[str], width: int) -> None:
    if vectors.shape != (len(texts), width):
        raise UserError(
            f"the embedder returned vectors of shape {vectors.shape} for {len(texts)} texts, expected ({len(texts)}, {width})."
        )
    if len(bad := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
        raise UserError(f"the embedder gave NaN or infinity for {texts[int(bad[0])]!r}. Type: embedder.dtype=float32")


def check_informative(vectors: npt.NDArray[np.float32], texts: Sequence[str]) -> None:
    """Refuse vectors that do not tell different texts apart: training on them would silently ignore the texts.

    Raises:
        UserError: all vectors are zero, or (nearly) the same for different texts.

    >>> check_informative(np.eye(2, dtype=np.float32), ["fever", "cough"])
    """
    if len(set(texts)) < 2:
        return
    spread = float(np.abs(vectors - vectors.mean(axis=0)).max())
    if spread <= 1e-4 * max(float(np.abs(vectors).max()), 1e-12) or not np.abs(vectors).max() > 0:
        raise UserError(
            f"the embedder gives {len(set(texts))} different texts the same vector (largest difference {spread:.1e}), so it "
            "contributes nothing. Check embedder.model, embedder.pooling and embedder.prompt."
        )
