"""Corpora in other formats are imported once: written as a MEDS dataset and read like any other from then on.

A corpus of pickles or of one file a patient is slow to read and says little of itself. Its import costs one pass and a
few bytes an event; its manifest remembers the files it was made from and those it is made of, so that changed files are noticed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_directory, digest, locked, remove_leftovers
from ehr_embed.core.fingerprints import EARLIER_VERSION, is_of_earlier_version, is_same
from ehr_embed.core.manifest import REBUILD, check_files, describe, read_manifest, remember, write_manifest
from ehr_embed.sources.protocol import SPLITS

log = logging.getLogger(__name__)
MANIFEST = "import.json"


def find_shards(data_dir: str | None, suffix: str, command: str) -> dict[str, list[Path]]:
    """The files with a suffix in each of the three split folders, by number and then by name.

    Raises:
        UserError: no folder given, or it lacks a split or files.
    """
    layout = f"{{{','.join(SPLITS)}}}/*{suffix}"
    if data_dir is None:
        raise UserError(f"data.data_dir is not set: expected the folder that holds {layout}. Type: {command}")
    found = {}
    for split in SPLITS:
        folder = Path(data_dir) / split
        files = [path for path in folder.glob(f"*{suffix}") if not path.name.startswith(".")] if folder.is_dir() else []
        if not files:
            what = f"no {suffix} files in it" if folder.is_dir() else "no such folder"
            raise UserError(f"{folder}: {what}. Expected {layout} under data.data_dir={data_dir}. Type: {command}")
        found[split] = sorted(files, key=_number)
    return found


def _number(path: Path) -> tuple[int, str]:
    digits = "".join(c if c.isdigit() else " " for c in path.stem).split()
    return (int(digits[-1]) if digits else -1, path.name)


def import_folder(*, root: str | None, cache_dir: str, data_dir: str | None, settings: Any = None) -> Path:
    """Where the import of a corpus lies: `root`, or a folder of the cache named by the corpus and the settings."""
    if root is not None:
        return Path(root).expanduser().resolve()
    corpus = Path(str(data_dir)).expanduser().resolve()
    return Path(cache_dir).resolve() / "imported" / f"{corpus.name}-{digest([str(corpus), settings], 10)}"


def import_once(folder: Path, made_from: dict[str, Any], write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Let `write` fill `folder` unless an import of the same files is there; one process at a time.

    Args:
        folder: where the MEDS dataset belongs; it appears whole or not at all.
        made_from: JSON-able, flat; a fingerprint of every file and setting that determines the import.
        write: called with the folder to fill.
        overwrite: import again even if one is there.

    Raises:
        UserError: the import there is damaged or was made from other files, or the folder holds something else.
    """
    with locked(folder.parent / f".{folder.name}.lock", f"importing to {folder}"):
        if not (folder / MANIFEST).exists():
            if folder.exists() and (folder.is_file() or any(folder.iterdir())):
                raise UserError(
                    f"{folder} exists and is no import of this kind (no {MANIFEST}); writing there would replace it. "
                    "Type: data.root=ANOTHER_FOLDER, or delete it if an earlier version made it"
                )
        elif not overwrite:
            manifest = read_manifest(folder / MANIFEST, REBUILD)
            _refuse_other_files(folder, manifest["made_from"], made_from)
            check_files(folder, manifest["files"], REBUILD)
            return
        log.info("importing as MEDS to %s", folder)
        remove_leftovers(folder.parent, f"{folder.name}.")
        with atomic_directory(folder) as temporary:
            write(temporary)
            write_manifest(temporary, {"made_from": made_from}, files := describe(temporary), name=MANIFEST)
        remember(folder, files)


def _refuse_other_files(folder: Path, known: dict[str, Any], made_from: dict[str, Any]) -> None:
    for key in sorted({*known, *made_from}):
        if not is_same(made_from.get(key), known.get(key)):
            raise UserError(
                f"{folder} was imported from other files: {key} was {known.get(key, 'absent')}, now "
                f"{made_from.get(key, 'absent')}. Texts, labels or events would be out of date. "
                f"{REBUILD}"
            )
    if any(is_of_earlier_version(made_from[key], known[key]) for key in known):
        log.warning(EARLIER_VERSION, folder)
