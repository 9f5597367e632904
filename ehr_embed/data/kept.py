"""Cache results that were computed from an event store in the store's folder.

The name of a cached result holds a digest of the store and the settings; rebuilding the store removes all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_directory, digest, locked
from ehr_embed.core.manifest import check_files, describe, read_manifest, remember, write_manifest
from ehr_embed.data.store import EventStore

log = logging.getLogger(__name__)
Arrays = dict[str, npt.NDArray[Any]]


def kept_arrays(store: EventStore, kind: str, about: dict[str, Any], make: Callable[[], Arrays]) -> Arrays:
    """Return the arrays that `make` returns, from the cache in the store's folder if they are there.

    One process at a time makes them, and others wait. If the folder cannot be written to, every call makes them again.

    Args:
        store: the event store from which the arrays are computed.
        kind: kind of the arrays, the beginning of the name of their folder.
        about: JSON-able settings on which the arrays depend, beside the store's content.
        make: function that computes the arrays.

    Returns:
        The arrays, mapped from disk and read-only, or as `make` returned them.

    Raises:
        UserError: a cached file was changed; the message names the folder to remove.
    """
    folder = _place(store, kind, about)
    made: Arrays | None = None
    try:
        if not (folder / "manifest.json").exists():
            with locked(_lock(store), f"making {folder}"):
                if not (folder / "manifest.json").exists():
                    made = make()
                    with atomic_directory(folder) as temporary:
                        for name, array in made.items():
                            np.save(temporary / f"{name}.npy", array)
                        write_manifest(temporary, {"kind": kind, "about": about}, files := describe(temporary))
                    remember(folder, files)
    except UserError as error:
        log.info("%s cannot be cached, so each run computes it again: %s", kind, error)
        return make() if made is None else made
    remedy = f"Remove the folder {folder}, which will be made again"
    files = read_manifest(folder / "manifest.json", remedy)["files"]
    check_files(folder, files, remedy)
    return {Path(name).stem: np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in files}


def kept_facts(
    store: EventStore, kind: str, about: dict[str, Any], make: Callable[[], dict[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """Return the JSON-able facts that `make` returns, and whether they were cached; cache them like `kept_arrays`."""
    path = _place(store, kind, about).with_suffix(".json")
    if path.exists():
        return read_manifest(path, f"Remove the file {path}, which will be made again")["facts"], True
    facts = make()
    try:
        with locked(_lock(store), f"keeping {path}"):
            write_manifest(path.parent, {"kind": kind, "about": about, "facts": facts}, {}, name=path.name)
    except UserError as error:
        log.info("%s cannot be cached, so each run computes it again: %s", kind, error)
    return facts, False


def _place(store: EventStore, kind: str, about: dict[str, Any]) -> Path:
    return store.folder / f"{kind}-{digest({'store': store.manifest, 'about': about})}"


def _lock(store: EventStore) -> Path:
    """Return the lock under which `prepare` removes the temporary files of killed processes from the folder."""
    return store.folder.with_suffix(".lock")
