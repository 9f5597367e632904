"""Write files that are either whole or absent, lock a place against other processes, and compute digests of files.

A file is written under a temporary name, flushed to the disk (fsync) and then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ehr_embed.core.errors import UserError

log = logging.getLogger(__name__)
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_REFUSED = re.compile(
    r"No space left on device|[Dd]isk quota exceeded|File too large|Read-only file system|Permission denied|Input/output error"
    r"|database or disk is full|readonly database|unable to open database file|disk I/O error"
)
_PARTLY = re.compile(r"unexpected pos \d+ vs \d+|\d+ requested and \d+ written|failed writing file|transport error")
"""Messages of torch, numpy and polars for a write that was cut short; they do not pass on the system's reason."""


def write_failure(error: BaseException) -> str | None:
    """Return why the system refused to write, whichever library raised the error; None for an error of another kind.

    >>> write_failure(OSError(28, "No space left on device")), write_failure(RuntimeError("unexpected pos 576 vs 534"))
    ('No space left on device', 'only a part could be written (is the disk full?)')
    >>> write_failure(FileNotFoundError(2, "No such file or directory")) is None
    True
    """
    if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
        return os.strerror(error.errno)
    if found := _REFUSED.search(str(error)):
        return found.group()
    return "only a part could be written (is the disk full?)" if _PARTLY.search(str(error)) else None


def cannot_write(path: object, error: BaseException, *, is_whole: bool = True) -> UserError:
    """Return the error to raise for a full disk or a read-only folder; its message is one line.

    Args:
        path: what could not be written.
        error: the error of the system or of a library.
        is_whole: whether nothing or the earlier content stands at `path`; False = a library wrote there, and may have left a part.
    """
    reason = write_failure(error) or (error.strerror if isinstance(error, OSError) else None) or str(error)
    left = (
        "No part of it was left there, and what was finished before stays."
        if is_whole
        else "A part of it may have been left there: delete it."
    )
    return UserError(f"cannot write {path}: {reason}. {left} Free space or choose another folder.")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn the error that any library raises for a full disk or a read-only folder into `cannot_write`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or write_failure(error):
            raise cannot_write(path, error) from error
        raise


def _flush(file: Path) -> None:
    """Write a file through to the disk."""
    # Windows flushes only a file that is open for writing.
    with open(file, "rb" if os.name == "posix" else "r+b") as handle:
        os.fsync(handle.fileno())


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`. On success the file there replaces `path`; on any exception it is removed.

    Raises:
        UserError: the folder cannot be written to (read-only, full disk).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # in a folder that cannot be written to there is no file to remove
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`. On success the folder replaces `path`; on any exception it is removed.

    Raises:
        UserError: the folder cannot be written to (read-only, full disk).
    """
    path = Path(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with _writing(path):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock file `path`, and wait as long as another process holds it.

    The kernel releases the lock when the process ends, even if it is killed. The lock file stays behind and locks
    nothing.

    Args:
        path: the lock file.
        doing: what the lock guards, such as "building STORE", for the log line of a process that waits.

    Raises:
        UserError: the lock cannot be made (read-only folder, full disk).
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.info("waiting for another process that is %s (%s)", doing, path)
            lock.acquire()
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield
    finally:
        lock.release()


def append_line(path: Path, line: str) -> None:
    """Append a line to a file; where the disk is full, append nothing rather than a part of it.

    Raises:
        UserError: the file cannot be written to.
    """
    data = f"{line}\n".encode()
    try:
        with open(path, "ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(start)
                raise
    except OSError as error:
        raise cannot_write(path, error) from error


def link_file(path: Path, target: Path) -> None:
    """Give a file a second name by a hard link; copy it where a link is impossible, as between file systems."""
    with atomic_path(target) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove the temporary files and folders that killed processes left in `folder`.

    Call it only under the lock that guards the folder, so that no other process is writing there.

    Args:
        folder: where the leftovers lie.
        name: beginning of the names of the files to which they belong.
    """
    for path in folder.glob(f".{name}*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused (they are not JSON)."""
    text = json_text(value)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: Any) -> str:
    """Return the text that `write_json` writes."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is not valid JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); it was damaged. Delete its folder and run again."
        ) from error


def digest(value: Any, length: int = 16) -> str:
    """Return the first `length` hexadecimal digits of the SHA-256 of a value's JSON; the order of keys changes nothing.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    encoded = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(encoded).hexdigest()[:length]


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def stamp_of(path: Path) -> list[int]:
    """Return the facts that show whether a file was written since: device, inode, size, and two times in nanoseconds."""
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
