"""Files that are either whole or absent: temporary name, fsync, rename. One lock a place; digests for manifests."""

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
"""What torch, numpy and polars say where a write was cut short: the system's reason is lost."""


def write_failure(error: BaseException) -> str | None:
    """Why the system refused to write, whichever library met it; None for an error of another kind.

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


def cannot_write(path: object, error: BaseException) -> UserError:
    """The one line for a full disk or a read-only folder."""
    reason = write_failure(error) or (error.strerror if isinstance(error, OSError) else None) or str(error)
    return UserError(
        f"cannot write {path}: {reason}. Nothing was left half-written. Free space or choose another folder."
    )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Whatever library meets a full disk or a read-only folder within, it ends in the one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or write_failure(error):
            raise cannot_write(path, error) from error
        raise


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed over `path`,
    on any exception it is removed.

    Raises:
        UserError: the folder cannot be written to (read-only, full disk).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written there is nothing to remove
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it replaces `path`, on any exception it is removed.

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
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock file `path`, waiting for whoever has it; `doing` says in the log what is waited for.

    The kernel releases the lock of a process that ended, however it ended; the file that stays behind holds nothing.

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
    """Append a whole line to a file, or nothing.

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
    """Give a file a second name; a copy only where that cannot be done (another file system)."""
    with atomic_path(target) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove what killed processes left half-written in `folder`, of files and folders whose name begins with `name`.

    Only where no other process can be writing: under the lock that guards them.
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
    """What `write_json` writes."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; a damaged one is named.

    Raises:
        UserError: the file is not valid JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); it was damaged. Delete its folder and run again."
        ) from error


def digest(value: Any, length: int = 16) -> str:
    """Hex digest of any JSON-able value, independent of key order.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    encoded = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(encoded).hexdigest()[:length]


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
