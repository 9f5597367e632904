"""Fingerprints of the files that a store or an import was made from: of all their bytes, read once per change of a file.

A fingerprint says nothing of where or when a file was written, so a copied dataset has the fingerprint of the original. What a
file's inode, size and times say is used only to know that it need not be read again: `known_fingerprints` keeps that in a file
of the cache folder. SHA-256 takes 0.8 s per GB on one core.
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
from ehr_embed.core.files import digest, file_sha256, read_json, write_json

log = logging.getLogger(__name__)
KNOWN = "fingerprints.json"
TAIL_BYTES = 1 << 16
SETTLED_NS = 2_000_000_000
"""A file that was written to more recently is read again next time: another write may leave it the same times."""
TOLD_BYTES = 1 << 30
EARLIER_VERSION = (
    "%s was made by an earlier version, which kept sizes and the last 64 KiB of the files alone: these agree, a change elsewhere "
    "would not show. To compare every byte from now on, type: python embed.py overwrite=true with the same overrides"
)
Known = dict[str, tuple[str, str]]
"""Of each path, or folder of files: a digest of inodes, sizes and times, and the fingerprint of the content at that moment."""
_known: ContextVar[Known | None] = ContextVar("known_fingerprints", default=None)


@contextmanager
def known_fingerprints(folder: Path) -> Iterator[None]:
    """Take fingerprints of unchanged files from `folder`, and keep those that are computed within there.

    A folder that cannot be written to, or a damaged file in it, costs another reading of the files and nothing else.
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
                # Read again, since another process may have kept others meanwhile.
                write_json(folder / KNOWN, _read(folder / KNOWN) | new)


def fingerprint(path: Path) -> str:
    """Return a file's size, the digest of its last 64 KiB (all that earlier versions knew), and that of all its bytes."""

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
    """Return number and bytes of files in one folder, a digest of names, sizes and the ends of `sampled` of them (all that
    earlier versions knew), and one of all their bytes."""

    def read() -> str:
        sizes = [(path.name, path.stat().st_size) for path in paths]
        some = [fingerprint(path).rsplit(":", 1)[0] for path in paths[:: max(1, len(paths) // sampled)]]
        every = digest([file_sha256(path) for path in paths], 32)
        return f"{len(paths)} files, {sum(size for _, size in sizes)} bytes, {digest([sizes, some])}:{every}"

    return _once(f"{paths[0].parent.absolute()}/*{paths[0].suffix}", paths, read)


def without_content(value: str) -> str:
    """Return what an earlier version would have said in place of a fingerprint.

    >>> without_content("900:0123456789abcdef:00112233445566778899aabbccddeeff")
    '900:0123456789abcdef'
    """
    return value.rsplit(":", 1)[0]


def is_same(found: object, kept: object) -> bool:
    """Whether a fingerprint, or another fact, is the one that was kept, perhaps by a version that knew less of a file.

    >>> is_same("900:01ab:ffee", "900:01ab"), is_same("900:01ab:ffee", "900:01ab:ffef"), is_same([0.2, 1], [0.2, 1])
    (True, False, True)
    """
    return found == kept or is_of_earlier_version(found, kept)


def is_of_earlier_version(found: object, kept: object) -> bool:
    """Whether `kept` agrees with the fingerprint `found` as far as an earlier version looked, which is not at every byte.

    >>> is_of_earlier_version("900:01ab:ffee", "900:01ab"), is_of_earlier_version("900:01ab:ffee", "900:01ab:ffee")
    (True, False)
    """
    return isinstance(found, str) and isinstance(kept, str) and ":" in found and without_content(found) == kept


def _once(key: str, paths: Sequence[Path], read: Callable[[], str]) -> str:
    """Return what is known of unchanged files, or what `read` finds; that is kept unless a file was written to just now."""
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
    stats = [path.stat() for path in paths]
    facts = [
        [path.name, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        for path, stat in zip(paths, stats, strict=True)
    ]
    return digest(facts, 32), max(max(stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)


def _read(path: Path) -> Known:
    try:
        entries = read_json(path)
    except (UserError, OSError):
        return {}
    is_good = isinstance(entries, dict) and all(
        isinstance(entry, list) and len(entry) == 2 for entry in entries.values()
    )
    return {name: (str(stamp), str(found)) for name, (stamp, found) in entries.items()} if is_good else {}
