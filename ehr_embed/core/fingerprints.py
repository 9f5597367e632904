"""Compute fingerprints of the files that a store or an import was made from, and cache them.

A fingerprint is a digest of all bytes of a file. It does not depend on where or when the file was written, so a copied
dataset has the fingerprint of the original. Since SHA-256 takes 0.8 s per GB on one core, `known_fingerprints` caches
the fingerprints in the cache folder; a file is read again only when its inode, size or times have changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import digest, file_sha256, read_json, stamp_of, write_json

log = logging.getLogger(__name__)
KNOWN = "fingerprints.json"
TAIL_BYTES = 1 << 16
SETTLED_NS = 2_000_000_000
"""Nanoseconds. The fingerprint of a file that was modified more recently is not cached: another write within the
resolution of the file system's clock would leave the same times."""
TOLD_BYTES = 1 << 30
EARLIER_VERSION = (
    "%s was made by an earlier version, which compared only the sizes and the last 64 KiB of the data files. These agree, "
    "but a change elsewhere would not show. To compare every byte from now on, type: python embed.py overwrite=true with the "
    "same overrides"
)
Known = dict[str, tuple[str, str]]
"""Maps each file, or folder of files, to a digest of inodes, sizes and times, and the fingerprint at that time."""
_known: ContextVar[Known | None] = ContextVar("known_fingerprints", default=None)


@contextmanager
def known_fingerprints(folder: Path) -> Iterator[None]:
    """Reuse the cached fingerprints of unchanged files in `folder`, and cache those that this context computes.

    Where the folder cannot be written to, or its cache file is damaged, the data files are read again.
    """
    before = _read(folder / KNOWN)
    token = _known.set(known := dict(before))
    try:
        yield
    finally:
        _known.reset(token)
        new = {path: entry for path, entry in known.items() if before.get(path) != entry}
        if new:
            with contextlib.suppress(UserError, OSError):
                # The cache file is read again, since another process may have added fingerprints to it in the meantime.
                write_json(folder / KNOWN, _read(folder / KNOWN) | new)


def fingerprint(path: Path) -> str:
    """Return a file's size, the digest of its last 64 KiB (as in earlier versions) and the digest of all its bytes."""

    def read() -> str:
        size = path.stat().st_size
        if size > TOLD_BYTES:
            log.info("reading %s for its fingerprint (%.1f GiB), once", path, size / 2**30)
        with open(path, "rb") as handle:
            handle.seek(max(0, size - TAIL_BYTES))
            tail = hashlib.sha256(handle.read()).hexdigest()[:16]
        return f"{size}:{tail}:{file_sha256(path)[:32]}"

    return _once(str(path.absolute()), [path], read)


def fingerprint_of_many(paths: Sequence[Path], *, sampled: int) -> str:
    """Return one fingerprint of many files in one folder.

    The fingerprint has the number and the bytes of the files, a digest of their names, sizes and the ends of `sampled`
    of them (all that earlier versions compared), and a digest of all their bytes.
    """

    def read() -> str:
        sizes = [(path.name, path.stat().st_size) for path in paths]
        some = [fingerprint(path).rsplit(":", 1)[0] for path in paths[:: max(1, len(paths) // sampled)]]
        every = digest([file_sha256(path) for path in paths], 32)
        return f"{len(paths)} files, {sum(size for _, size in sizes)} bytes, {digest([sizes, some])}:{every}"

    return _once(f"{paths[0].parent.absolute()}/*{paths[0].suffix}", paths, read)


def without_content(value: str) -> str:
    """Return the shorter fingerprint that an earlier version would have computed of the same file.

    >>> without_content("900:0123456789abcdef:00112233445566778899aabbccddeeff")
    '900:0123456789abcdef'
    """
    return value.rsplit(":", 1)[0]


def is_same(found: object, kept: object) -> bool:
    """Return whether a fingerprint, or another fact, equals the kept one, which an earlier version may have made.

    >>> is_same("900:01ab:ffee", "900:01ab"), is_same("900:01ab:ffee", "900:01ab:ffef"), is_same([0.2, 1], [0.2, 1])
    (True, False, True)
    """
    return found == kept or is_of_earlier_version(found, kept)


def is_of_earlier_version(found: object, kept: object) -> bool:
    """Return whether `kept` is an earlier version's shorter fingerprint, and agrees with the fingerprint `found`.

    >>> is_of_earlier_version("900:01ab:ffee", "900:01ab"), is_of_earlier_version("900:01ab:ffee", "900:01ab:ffee")
    (True, False)
    """
    return isinstance(found, str) and isinstance(kept, str) and ":" in found and without_content(found) == kept


def _once(key: str, paths: Sequence[Path], read: Callable[[], str]) -> str:
    """Return the cached fingerprint of unchanged files, else the one that `read` computes.

    The computed fingerprint is cached unless a file was modified just now.
    """
    known = _known.get()
    stamp, newest = _stamp(paths)
    if known is not None and key in known and known[key][0] == stamp:
        return known[key][1]
    found = read()
    if known is not None and _stamp(paths)[0] == stamp and time.time_ns() - newest > SETTLED_NS:
        known[key] = (stamp, found)
    return found


def _stamp(paths: Sequence[Path]) -> tuple[str, int]:
    """Return a digest of the files' names, inodes, sizes and times, and the latest of these times in nanoseconds."""
    stamps = [stamp_of(path) for path in paths]
    facts = [[path.name, *stamp] for path, stamp in zip(paths, stamps, strict=True)]
    return digest(facts, 32), max(max(stamp[-2:]) for stamp in stamps)


def _read(path: Path) -> Known:
    try:
        entries = read_json(path)
    except (UserError, OSError):
        return {}
    is_good = isinstance(entries, dict) and all(
        isinstance(entry, list) and len(entry) == 2 for entry in entries.values()
    )
    return {name: (str(stamp), str(found)) for name, (stamp, found) in entries.items()} if is_good else {}
