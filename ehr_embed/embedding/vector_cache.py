"""Cache the vectors of texts for all datasets, in one SQLite file per embedder with the digest of the text as key.

The file needs no manifest: it holds the embedder's fingerprint, and for each vector a checksum of embedder, text and
vector.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import cannot_write, digest, locked, write_failure
from ehr_embed.core.progress import ProgressBar
from ehr_embed.embedders.protocol import Embedder, GivesAnothersVectors

log = logging.getLogger(__name__)
FORMAT = 1
"""Version of the file's format, in SQLite's `user_version`; files of version 0 have no checksums."""
LOCK_TIMEOUT_S = 600
LOOKUP_CHUNK = 500
"""Keys per query; SQLite limits the number of parameters of a query."""
Vectors = dict[str, npt.NDArray[np.float32]]


def embed_texts(embedder: Embedder, texts: Sequence[str], *, cache_dir: Path | None) -> npt.NDArray[np.float32]:
    """Return the vectors of texts, (n, E); only texts that are not in the cache are embedded.

    One process at a time embeds texts for a cache file; other processes that need vectors wait and then read the new
    ones from the file. Each batch is committed at once, so that an interrupted run loses one batch at most.
    Without `cache_dir` nothing is read or written, and the same is refused.

    Raises:
        UserError: a text is empty; a vector has the wrong shape or NaN; different texts have the same vector; or the
            cache is damaged, belongs to another embedder, or cannot be written.
    """
    if blank := [i for i, text in enumerate(texts) if not text.strip()]:
        raise UserError(
            f"text {blank[0]} is empty ({len(blank)} such texts), and an empty text has no meaning to embed. Give its code a "
            "description."
        )
    if isinstance(embedder, GivesAnothersVectors):
        embedder = embedder.vectors_of
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    if cache_dir is None:
        found = dict(vector for batch in _embed(list(reversed(distinct)), embedder) for vector in batch.items())
    else:
        found = _cached(distinct, embedder, cache_dir)
    result = np.stack([found[text] for text in texts]) if texts else np.empty((0, embedder.embedding_dim), np.float32)
    check_informative(result, texts)
    return result


def _cached(distinct: list[str], embedder: Embedder, cache_dir: Path) -> Vectors:
    """Return the vectors of distinct texts in ascending order of length; those that are not in the cache are embedded and kept."""
    path = cache_dir / "embeddings" / f"{digest(embedder.fingerprint)}.sqlite"
    with _opened(path, embedder) as database:
        found = _look_up(database, path, distinct)
        if len(found) < len(distinct):
            with locked(path.with_suffix(".lock"), f"embedding texts into {path}"):
                found |= _look_up(database, path, [text for text in distinct if text not in found])
                # The longest texts are embedded first, so that a batch that does not fit in memory fails at once.
                missing = [text for text in reversed(distinct) if text not in found]
                for vectors in _embed(missing, embedder):
                    rows = [_row(path, text, vector) for text, vector in vectors.items()]
                    with database:
                        database.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?, ?)", rows)
                    found |= vectors
    return found


def _embed(texts: Sequence[str], embedder: Embedder) -> Iterator[Vectors]:
    """Yield the vectors of texts batch by batch, and show the progress."""
    with ProgressBar(total=len(texts), desc="embedding texts", unit="text", is_shown=bool(texts)) as bar:
        for start in range(0, len(texts), embedder.batch_size):
            batch = texts[start : start + embedder.batch_size]
            vectors = np.ascontiguousarray(embedder.embed(batch), np.float32)
            _check(vectors, batch, embedder.embedding_dim)
            yield dict(zip(batch, vectors, strict=True))
            bar.update(len(batch))


@contextmanager
def _opened(path: Path, embedder: Embedder) -> Iterator[sqlite3.Connection]:
    """Open or make the cache file; turn SQLite's errors for a damaged file or a full disk into `UserError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        with closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT_S)) as database:
            _open(database, path, embedder)
            yield database
    except sqlite3.Error as error:
        if write_failure(error):
            raise cannot_write(path, error) from error
        raise UserError(
            f"{path}: not a readable vector cache ({error}). Delete this file; the texts are then embedded again."
        ) from error


def _open(database: sqlite3.Connection, path: Path, embedder: Embedder) -> None:
    fingerprint = json.dumps(embedder.fingerprint, sort_keys=True, default=str)
    with database:
        database.execute("BEGIN IMMEDIATE")  # if two processes open a new file at once, only one makes the tables
        database.execute(
            "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB, checksum BLOB) WITHOUT ROWID"
        )
        database.execute("CREATE TABLE IF NOT EXISTS meta (fingerprint TEXT PRIMARY KEY)")
        _upgrade(database, path)
        if not (known := [row[0] for row in database.execute("SELECT fingerprint FROM meta")]):
            database.execute("INSERT INTO meta VALUES (?)", (fingerprint,))
    if known and known != [fingerprint]:
        raise UserError(
            f"{path} holds the vectors of another embedder: expected {fingerprint}, found {' and '.join(known)}. Texts would get "
            "another model's vectors. Delete this file; the texts are then embedded again."
        )


def _upgrade(database: sqlite3.Connection, path: Path) -> None:
    """Add checksums to the vectors of an earlier version's file, since embedding the texts again may take hours."""
    columns = [row[1] for row in database.execute("PRAGMA table_info(vectors)")]
    if "checksum" not in columns:
        log.info("adding checksums to %s", path)
        database.create_function("checksum", 2, lambda key, vector: _checksum(path, key, vector), deterministic=True)
        database.execute("ALTER TABLE vectors ADD COLUMN checksum BLOB")
        database.execute("UPDATE vectors SET checksum = checksum(key, vector)")
    database.execute(f"PRAGMA user_version = {FORMAT}")


def _look_up(database: sqlite3.Connection, path: Path, texts: Sequence[str]) -> Vectors:
    """Return the cached vectors of texts; each is compared with its checksum."""
    found: Vectors = {}
    text_of = {_key(text): text for text in texts}
    keys = list(text_of)
    for start in range(0, len(keys), LOOKUP_CHUNK):
        chunk = keys[start : start + LOOKUP_CHUNK]
        query = f"SELECT key, vector, checksum FROM vectors WHERE key IN ({','.join('?' * len(chunk))})"
        for key, vector, checksum in database.execute(query, chunk):
            # A flipped bit can also change the type of a value, so the type is checked first.
            is_whole = isinstance(vector, bytes) and key in text_of and checksum == _checksum(path, key, vector)
            if not is_whole:
                raise UserError(
                    f"{path}: the vector of {text_of.get(key, 'a text')!r} does not have the checksum written with it: the "
                    "file is damaged, and other texts may be. Delete this file; the texts are then embedded again."
                )
            found[text_of[key]] = np.frombuffer(vector, np.float32)
    return found


def _row(path: Path, text: str, vector: npt.NDArray[np.float32]) -> tuple[bytes, bytes, bytes]:
    key, data = _key(text), vector.tobytes()
    return key, data, _checksum(path, key, data)


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _checksum(path: Path, key: bytes, vector: bytes) -> bytes:
    """Return the checksum of a key and its vector, keyed by the file's name so that rows of another cache fail."""
    return hashlib.blake2b(key + vector, digest_size=8, key=path.stem.encode()).digest()


def _check(vectors: npt.NDArray[np.float32], texts: Sequence[str], width: int) -> None:
    if vectors.shape != (len(texts), width):
        raise UserError(
            f"the embedder returned vectors of shape {vectors.shape} for {len(texts)} texts, expected ({len(texts)}, {width})."
        )
    if len(bad := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
        raise UserError(f"the embedder gave NaN or infinity for {texts[int(bad[0])]!r}. Type: embedder.dtype=float32")


def check_informative(vectors: npt.NDArray[np.float32], texts: Sequence[str]) -> None:
    """Refuse vectors that are the same for different texts: a model trained on them would silently ignore the texts.

    Raises:
        UserError: all vectors are zero, or nearly the same for different texts.

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
