"""Open the storage of a study (a journal file, SQLite or PostgreSQL), and lock it among the processes that share it."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from ehr_embed.core.errors import UserError
from ehr_embed.core.secrets import masked

if TYPE_CHECKING:
    import sqlalchemy

JOURNAL_NAME = "study.journal"
FIRST_OPEN_ATTEMPTS = 20
CONNECT_TIMEOUT_S = 10
_RACE = re.compile(r"already exists|duplicate key|UniqueViolation|database is locked|UNIQUE constraint", re.IGNORECASE)


@dataclass(frozen=True)
class StudyStorage:
    """An open storage with its lock, which lets one process at a time take a trial.

    Args:
        storage: Optuna's storage object.
        url: path or URL, as `storage_url` returns it.
    """

    storage: BaseStorage
    url: str

    def lock(self, study_name: str) -> AbstractContextManager[object]:
        """Return the lock that excludes all other processes, on any host, that take trials from `study_name`.

        The operating system or the database releases the lock of a killed process, so nothing must be cleaned up.
        """
        if isinstance(self.storage, RDBStorage) and self.storage.engine.dialect.name == "postgresql":
            return _advisory_lock(self.storage.engine, study_name)
        # `flock` on a file beside the journal or the database; filelock refuses network file systems without flock.
        path = self.storage.engine.url.database if isinstance(self.storage, RDBStorage) else self.url
        return filelock.FileLock(f"{path}.ask.lock")


def storage_url(storage: str | None, sweep_dir: Path) -> str:
    """Return the storage to use: `storage`, else `OPTUNA_STORAGE`, else a journal file in `sweep_dir`.

    Returns:
        The path of a journal file, or an SQLAlchemy URL that names the installed PostgreSQL driver.

    Raises:
        UserError: a kind of database on which trials cannot be taken one at a time.

    >>> storage_url("postgresql://ann:secret@db/optuna", Path("."))
    'postgresql+psycopg://ann:secret@db/optuna'
    """
    chosen = storage or os.environ.get("OPTUNA_STORAGE") or str(sweep_dir / JOURNAL_NAME)
    if "://" not in chosen:
        return str(Path(chosen.removeprefix("journal:")).absolute())
    scheme = chosen.partition("://")[0]
    if scheme in ("postgresql", "postgres"):
        return f"postgresql+psycopg://{chosen.partition('://')[2]}"
    if scheme.startswith(("sqlite", "postgresql+")):
        return chosen
    raise UserError(
        f"hydra.sweeper.storage={masked(chosen)}: expected a journal file, sqlite:///FILE or postgresql://HOST/NAME. "
        "Other databases have no lock here that keeps two processes from taking the same trial."
    )


def open_storage(url: str) -> StudyStorage:
    """Open a storage, and create the file or the tables if they are missing.

    Raises:
        UserError: the storage cannot be reached or written.
    """
    if "://" not in url:
        try:
            Path(url).parent.mkdir(parents=True, exist_ok=True)
            return StudyStorage(JournalStorage(JournalFileBackend(url)), url)
        except (OSError, ValueError) as error:
            raise _unreachable(url, error) from error
    return _open_database(url)


def _open_database(url: str) -> StudyStorage:
    import sqlalchemy  # which takes as long to load as Hydra, and a journal needs none of it

    is_sqlite = url.startswith("sqlite")
    if is_sqlite and (database := sqlalchemy.make_url(url).database):
        Path(database).parent.mkdir(parents=True, exist_ok=True)
    arguments = {"timeout": 60} if is_sqlite else {"connect_timeout": CONNECT_TIMEOUT_S}
    for attempt in range(FIRST_OPEN_ATTEMPTS):
        try:
            return StudyStorage(RDBStorage(url, {"connect_args": arguments, "pool_pre_ping": True}), url)
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, ImportError, OSError) as error:
            # Two processes that create the tables at the same time disturb each other; a later attempt finds the tables.
            if attempt + 1 == FIRST_OPEN_ATTEMPTS or not _RACE.search(f"{error} {error.__cause__}"):
                raise _unreachable(url, error) from error
            time.sleep(0.1 * (attempt + 1))
    raise AssertionError("unreachable: the last attempt returns or raises")


def _unreachable(url: str, error: Exception) -> UserError:
    reason = str(error.__cause__ or error).strip().splitlines()[0]
    return UserError(
        f"the storage {masked(url)} cannot be opened: {masked(reason)}. No trial was started. "
        "Check that the server runs and the URL is right (hydra.sweeper.storage=URL or OPTUNA_STORAGE), "
        "or leave both out for a journal file in the sweep's folder."
    )


@contextmanager
def _advisory_lock(engine: sqlalchemy.Engine, name: str) -> Iterator[None]:
    """Hold PostgreSQL's advisory lock on a hash of `name`; it ends with the transaction or a killed process's connection."""
    import sqlalchemy

    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
        yield
