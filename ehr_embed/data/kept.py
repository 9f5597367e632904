"""What was computed from an event store and is kept in its folder: found again by content, gone when the store is rebuilt."""

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
    """Return what `make` returns, from the store's folder if it is kept there, else made and kept.

    One process at a time makes it, and others wait. Where the folder cannot be written to it is made each time.

    Args:
        kind: what it is, the beginning of its folder's name.
        about: settings that determine it beside the store's content.

    Returns:
        The arrays, mapped from disk and read-only, or as `make` returned them.

    Raises:
        UserError: a kept file was changed; names the folder to remove.
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
        log.info("%s is not kept, and is computed anew by each run: %s", kind, error)
        return make() if made is None else made
    remedy = f"Remove the folder {folder}: it is made anew"
    files = read_manifest(folder / "manifest.json", remedy)["files"]
    check_files(folder, files, remedy)
    return {Path(name).stem: np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in files}


def kept_facts(
    store: EventStore, kind: str, about: dict[str, Any], make: Callable[[], dict[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """Return what `make` returns, ready for JSON, and whether it was kept from before; else as `kept_arrays`."""
    path = _place(store, kind, about).with_suffix(".json")
    if path.exists():
        return read_manifest(path, f"Remove the file {path}: it is made anew")["facts"], True
    facts = make()
    try:
        with locked(_lock(store), f"keeping {path}"):
            write_manifest(path.parent, {"kind": kind, "about": about, "facts": facts}, {}, name=path.name)
    except UserError as error:
        log.info("%s is not kept, and is computed anew by each run: %s", kind, error)
    return facts, False


def _place(store: EventStore, kind: str, about: dict[str, Any]) -> Path:
    return store.folder / f"{kind}-{digest({'store': store.manifest, 'about': about})}"


def _lock(store: EventStore) -> Path:
    """The lock of `prepare`, under which what a killed process left half-written in the store's folder is removed."""
    return store.folder.with_suffix(".lock")
