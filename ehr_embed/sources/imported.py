"""Import corpora in other formats once: write them as MEDS datasets, which are then read like any other.

A corpus of pickles, or of one file per patient, is slow to read and describes itself poorly. Its import takes one pass
and a few bytes per event. The manifest of the import lists the original files and those of the import, so that changes
in either are noticed.
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
    """Return the files with a suffix in each split's folder, sorted by the last number in the name, then by name.

    Args:
        data_dir: the folder with the split folders.
        suffix: the suffix, with its dot.
        command: the command to type, for messages.

    Raises:
        UserError: no folder was given, or the folder lacks a split or files.
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
    """Return the folder for a corpus' import: `root`, or a folder of the cache named by corpus and settings."""
    if root is not None:
        return Path(root).expanduser().resolve()
    corpus = Path(str(data_dir)).expanduser().resolve()
    return Path(cache_dir).resolve() / "imported" / f"{corpus.name}-{digest([str(corpus), settings], 10)}"


def import_once(folder: Path, made_from: dict[str, Any], write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Let `write` fill `folder`, unless it holds an import of the same files; one process at a time.

    Args:
        folder: the folder of the MEDS dataset; it appears whole or not at all.
        made_from: flat and JSON-able; the fingerprint of every file and every setting that determine the import.
        write: function that fills the folder that it is given.
        overwrite: whether to import again even if the folder holds an import.

    Raises:
        UserError: the import in the folder is damaged or was made from other files, or the folder holds other files.
    """
    with locked(folder.parent / f".{folder.name}.lock", f"importing to {folder}"):
        if not (folder / MANIFEST).exists():
            if folder.exists() and (folder.is_file() or any(folder.iterdir())):
                raise not_an_import(folder)
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


def not_an_import(folder: Path) -> UserError:
    """Return the error that an import would replace what a folder holds, which may be a dataset that nobody has a copy of."""
    is_meds = folder.is_dir() and ((folder / "metadata").is_dir() or any(folder.glob("data/**/*.parquet")))
    if is_meds:
        return UserError(
            f"data.root={folder} holds a dataset in MEDS layout, which is not read: the data option that was chosen would write "
            "its own dataset there. Nothing was changed. Did you mean data=meds? Type: data=meds "
            f"data.root={folder} task.labels=NAME"
        )
    return UserError(
        f"data.root={folder} exists and is not an import of this kind (no {MANIFEST}); writing there would replace what it holds. "
        "Nothing was changed. Type: data.root=ANOTHER_FOLDER"
    )


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
