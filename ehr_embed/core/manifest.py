"""Write manifests, and compare a folder with its manifest before the folder is read.

A manifest lists the size and the SHA-256 of each file of a folder, and what the folder was made from. Sizes are
compared whenever a folder is opened. In folders up to `FULL_BYTES` checksums are compared too. In a larger folder the
checksum of a file is compared only if its inode, size or times have changed since it was last found whole, so that a
memory-mapped store opens at once. Damage that changes none of these, such as a failing disk's, is found in a large
folder only with `integrity=full`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import digest, file_sha256, read_json, stamp_of, write_json
from ehr_embed.core.settings import OneOf, check_setting

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
REBUILD = "Type: python embed.py overwrite=true with the same overrides"
"""Remedy for a damaged store, table or import: build it again."""
FULL_BYTES = 256 << 20
"""Largest folder, in bytes, of which every checksum is compared; this takes a quarter of a second on one core."""
Integrity = Annotated[str, OneOf("auto", "full", "size")]
CHECKED = ".checked.json"
"""A file in a large folder. It keeps the inode, the size and the times that each file had when it was last found whole."""
RUN_FOLDERS = ("vocabulary", "predictions")
"""Sub-folders of a run's folder whose files the manifest of the run's folder lists."""
Files = dict[str, dict[str, Any]]


def describe(folder: Path, paths: Iterable[Path] | None = None) -> Files:
    """Return bytes and sha256 of files, by path relative to `folder`; a file with several names (links) is read once.

    Args:
        folder: the folder of the manifest.
        paths: files in the folder; None = all.
    """
    chosen = sorted(path for path in (folder.rglob("*") if paths is None else paths) if path.is_file())
    known: dict[tuple[int, int], dict[str, Any]] = {}
    files: Files = {}
    for path in chosen:
        stat = path.stat()
        key = (stat.st_dev, stat.st_ino)
        if key not in known:
            known[key] = {"bytes": stat.st_size, "sha256": file_sha256(path)}
        files[path.relative_to(folder).as_posix()] = known[key]
    return files


def write_manifest(folder: Path, facts: dict[str, Any], files: Files, *, name: str = MANIFEST) -> None:
    """Write `facts` and `files` with a digest of both, so that the manifest itself can be checked."""
    content = facts | {"files": files}
    write_json(folder / name, content | {"digest": digest(content, 64)})


def read_manifest(path: Path, remedy: str) -> dict[str, Any]:
    """Read a manifest that `write_manifest` wrote.

    Raises:
        UserError: the manifest is damaged, or a version without checksums wrote it.
    """
    content = read_json(path)
    found = content.pop("digest", None) if isinstance(content, dict) else None
    if found is None or "files" not in content:
        raise UserError(
            f"{path}: expected a manifest with checksums of its folder's files, found none: it was written by an earlier version, "
            f"or is another file, and nothing says whether the files are whole. {remedy}"
        )
    if found != (expected := digest(content, 64)):
        raise UserError(
            f"{path} was changed: its content has digest {expected[:12]}, it says {str(found)[:12]}. What it says of the other "
            f"files cannot be trusted. {remedy}"
        )
    return dict(content)


def check_files(folder: Path, files: Files, remedy: str, *, integrity: str = "auto") -> None:
    """Compare files with their entries in a manifest, as the head of this module describes.

    Args:
        folder: where the files lie.
        files: entries of the manifest, by path relative to the folder.
        remedy: the command that builds the files again, for messages.
        integrity: `auto`, `full` (every byte) or `size` (sizes alone).

    Raises:
        UserError: a file is missing, or has another size or checksum; an unknown `integrity`.
    """
    check_setting("integrity", integrity, Integrity)
    for name, expected in files.items():
        _check_size(folder / name, expected["bytes"], remedy)
    if integrity == "size":
        return
    if integrity == "full" or sum(entry["bytes"] for entry in files.values()) <= FULL_BYTES:
        for name, expected in files.items():
            _check_sum(folder / name, expected["sha256"], remedy)
        return
    stamps = {name: _stamp(folder / name) for name in files}
    seen = _read_stamps(folder)
    changed = [name for name in files if seen.get(name) != stamps[name]]
    if changed:
        log.info("checking %d of %d files of %s, once", len(changed), len(files), folder)
    for name in changed:
        _check_sum(folder / name, files[name]["sha256"], remedy)
    if changed:
        remember(folder, files)


def remember(folder: Path, files: Files) -> None:
    """Record that the files of a large folder are whole now, so that they need not be read whenever it is opened."""
    if sum(entry["bytes"] for entry in files.values()) > FULL_BYTES:
        with contextlib.suppress(UserError):  # a read-only folder is checked each time
            write_json(folder / CHECKED, {name: _stamp(folder / name) for name in files})


def checked(path: Path) -> Path:
    """Return `path` after its file is compared with the manifest of its run's folder.

    A file that no manifest lists, such as one of a run that has not ended, is not compared.

    Raises:
        UserError: the file has another size or checksum than the manifest says, or the manifest is damaged.
    """
    remedy = "Restore the run's folder, or train again: resume=overwrite"
    folder = path.parent.parent if path.parent.name in RUN_FOLDERS else path.parent
    if path.is_file() and (folder / MANIFEST).is_file():
        name = path.relative_to(folder).as_posix()
        files = read_manifest(folder / MANIFEST, remedy)["files"]
        check_files(folder, {name: files[name]} if name in files else {}, remedy, integrity="full")
    return path


def _check_size(path: Path, expected: int, remedy: str) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing, though the manifest lists it ({expected} bytes). {remedy}")
    if (found := path.stat().st_size) != expected:
        raise UserError(
            f"{path}: {found} bytes, expected {expected}: it is truncated or another file, and was not loaded. {remedy}"
        )


def _check_sum(path: Path, expected: str, remedy: str) -> None:
    if (found := file_sha256(path)) != expected:
        raise UserError(
            f"{path} was changed: sha256 {found[:12]}, the manifest says {expected[:12]}. It is damaged or another file, and was "
            f"not loaded. {remedy}"
        )


def _stamp(path: Path) -> list[int]:
    return stamp_of(path)[1:]  # a folder may be mounted from another device


def _read_stamps(folder: Path) -> dict[str, list[int]]:
    try:
        stamps = read_json(folder / CHECKED)
    except (UserError, OSError):
        return {}
    return stamps if isinstance(stamps, dict) else {}
