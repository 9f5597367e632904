"""Several MEDS datasets as one: each keeps its splits, its labels and the scales of its numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.files import atomic_directory, digest, file_sha256
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.meds_files import readable
from ehr_embed.sources.protocol import SHARED

log = logging.getLogger(__name__)
LABELS, TASK_LABELS = "labels", "task_labels"


class PooledSource:
    """Source of the events of several MEDS datasets.

    A code becomes `DATASET//CODE`, so that its numbers keep the scale of its own dataset and two codes of one name stay apart; only
    MEDS_BIRTH and MEDS_DEATH are shared. A subject's id becomes `id * n + k` in the k-th of n datasets, counted from 0, so that no
    two subjects share one, and `id // n` and `id % n` lead back.

    Opening the source writes the label sets that the datasets have in common, with the new ids, to the cache.

    Args:
        roots: the datasets' folders. Their order numbers them, and in an alignment the first one's codes lead.
        labels: a label set of each dataset, in the order of `roots`, which become one set, named by all names with `+` between
            them; None = the sets of a name that all datasets have.
        only: names of the datasets that are read; None = all. Ids and names are the same in any case.
        leave_out: names of datasets that are not read.
        cache_dir: folder of the cache.
        root, splits, split_column: the keys of a single dataset, refused here: each dataset has its own.

    Raises:
        UserError: fewer than one or the same root twice, a root is no MEDS dataset, a dataset or a label set has no such name, or
            nothing is left.
    """

    writes = True

    def __init__(
        self,
        *,
        roots: Sequence[str],
        labels: Sequence[str] | None = None,
        only: str | int | Sequence[str | int] | None = None,
        leave_out: str | int | Sequence[str | int] | None = None,
        cache_dir: str,
        root: str | None = None,
        splits: str | None = None,
        split_column: str = "split",
    ) -> None:
        for key, value in (("root", root), ("splits", splits)):
            if value is not None:
                raise UserError(
                    f"data.{key}={value}: the pooled datasets are named by data.roots, and each has its own splits. Type: "
                    "data=pooled data.roots=[A,B]"
                )
        if isinstance(roots, str) or not roots:
            raise UserError(
                f"data.roots={roots}: expected a list of folders of MEDS datasets. Type: data=pooled data.roots=[A,B]"
            )
        every = [MedsSource(root=root) for root in roots]
        folders = [source.root for source in every]
        if twice := [str(folder) for number, folder in enumerate(folders) if folder in folders[:number]]:
            raise UserError(
                f"data.roots names {twice[0]} twice: its subjects would count twice. Remove one from the list."
            )
        self.names = distinct([source.name for source in every])
        chosen = self._chosen(only, leave_out)
        self._labels_of = self._labels(labels, every)
        self._number = {name: number for number, name in enumerate(self.names)}
        self.sources = {name: source for name, source in zip(self.names, every, strict=True) if name in chosen}
        self._owner = {shard: name for name, source in self.sources.items() for shard in source.shards}
        self.name = "+".join(self.sources)
        self._cache_dir = Path(cache_dir)
        self._say_homonyms()
        self.labels_dir = self._write_labels()

    @property
    def n_ids(self) -> int:
        """Return the factor of ids: the number of `roots`, read or not."""
        return len(self.names)

    @cached_property
    def shards(self) -> list[Path]:
        """Return the shards of the datasets that are read, one dataset after the other."""
        return list(self._owner)

    def read(self, shard: Path) -> pl.DataFrame:
        """Return the events of one shard, with the ids and codes of the pool.

        Raises:
            UserError: an id is too large for the pool's.
        """
        name = self._owner[shard]
        events = self.sources[name].read(shard)
        return events.with_columns(self._id(events["subject_id"], name, str(shard)), _code(pl.col("code"), name))

    def code_metadata(self) -> pl.DataFrame:
        """Return the metadata of all datasets' codes, with the names of the pool."""
        return pl.concat(
            [
                source.code_metadata().with_columns(
                    _code(pl.col("code"), name), pl.col("parent_codes").list.eval(_code(pl.element(), name))
                )
                for name, source in self.sources.items()
            ]
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprints of all datasets' files, and `pool`: the names of all datasets and of those that are read."""
        found: dict[str, Any] = {"pool": {"datasets": self.names, "read": list(self.sources)}}
        for name, source in self.sources.items():
            found |= {f"metadata/{name}/{file}" if file.startswith("metadata/") else f"{name}/{file}": value
                      for file, value in source.fingerprint().items()}  # fmt: skip
        return found

    def split_of_subjects(self, *, max_events: int) -> pl.DataFrame | None:
        """Return subject_id and split of every subject, as `MedsSource` does; None where one dataset does not know them."""
        parts = []
        for name, source in self.sources.items():
            part = source.split_of_subjects(max_events=max_events)
            if part is None:
                return None
            parts.append(part.with_columns(self._id(part["subject_id"], name, str(source.root))))
        return pl.concat(parts)

    @property
    def n_events(self) -> int:
        """Return the number of events of all datasets that are read."""
        return sum(source.n_events for source in self.sources.values())

    def _id(self, ids: pl.Series, name: str, where: str) -> pl.Series:
        limit = np.iinfo(np.int64).max // self.n_ids - 1
        largest = max((abs(int(x)) for x in (ids.min(), ids.max()) if isinstance(x, int)), default=0)
        if largest > limit:
            raise UserError(
                f"{where}: subject_id {largest} is too large to be multiplied by {self.n_ids}, the number of pooled datasets, "
                f"which keeps their subjects apart: the greatest possible is {limit}. Give the subjects smaller ids."
            )
        return (ids * self.n_ids + self._number[name]).alias("subject_id")

    def _chosen(self, only: Any, leave_out: Any) -> list[str]:
        kept = list(self.names) if only is None else self._named("data.only", only)
        gone = [] if leave_out is None else self._named("data.leave_out", leave_out)
        if not (left := [name for name in self.names if name in kept and name not in gone]):
            raise UserError(
                f"data.only={only} and data.leave_out={leave_out} leave no dataset of {', '.join(self.names)}. Change one of them."
            )
        return left

    def _named(self, key: str, wanted: Any) -> list[str]:
        found = []
        for each in [wanted] if isinstance(wanted, str | int) else list(wanted):
            text = str(each)
            name = self.names[int(text)] if text.isdecimal() and int(text) < len(self.names) else text
            if name not in self.names:
                raise unknown_name(key, text, self.names, "Or a dataset's number in data.roots, from 0.")
            found.append(name)
        return found

    def _labels(self, labels: Sequence[str] | None, every: list[MedsSource]) -> dict[str, dict[str, Path]]:
        """Return for each label set of the pool the folder or file of each dataset."""
        sets = {name: _label_sets(source.root) for name, source in zip(self.names, every, strict=True)}
        if labels is None:
            common = [label for label in sets[self.names[0]] if all(label in found for found in sets.values())]
            return {label: {name: sets[name][label] for name in self.names} for label in common}
        if isinstance(labels, str) or len(labels) != len(self.names):
            raise UserError(
                f"data.labels={labels}: expected a list of {len(self.names)} label sets, one per dataset of data.roots "
                f"({', '.join(self.names)}), or null where all have one of the name of task.labels."
            )
        found = {}
        for name, label in zip(self.names, labels, strict=True):
            path = sets[name].get(label) or Path(label).expanduser()
            if not path.exists():
                raise unknown_name("data.labels", label, sets[name], f"These are the label sets of {name}.")
            found[name] = path
        stems = [
            label if label in sets[name] else Path(label).stem for name, label in zip(self.names, labels, strict=True)
        ]
        return {stems[0] if len(set(stems)) == 1 else "+".join(stems): found}

    def _write_labels(self) -> Path:
        """Write the label files of the datasets that are read, with the pool's ids, and return the folder `labels`."""
        files = {
            label: {name: _files(path) for name, path in paths.items() if name in self.sources}
            for label, paths in self._labels_of.items()
        }
        sums = {
            f"{label}/{name}/{number}": file_sha256(file)
            for label, of in files.items()
            for name, found in of.items()
            for number, file in enumerate(found)
        }
        folder = self._cache_dir / "pooled" / f"{digest([self.names, list(self.sources), sums], 16)}"
        if not folder.is_dir():
            with atomic_directory(folder) as temporary:
                (temporary / LABELS).mkdir()
                for label, of in files.items():
                    for name, found in of.items():
                        for number, file in enumerate(found):
                            target = temporary / LABELS / label / f"{self._number[name]}-{number}.parquet"
                            target.parent.mkdir(parents=True, exist_ok=True)
                            self._labels_with_ids(file, name).write_parquet(target)
        return folder / LABELS

    def _labels_with_ids(self, file: Path, name: str) -> pl.DataFrame:
        with readable(file):
            frame = pl.read_parquet(file)
        if "subject_id" not in frame.columns or not frame.schema["subject_id"].is_integer():
            raise UserError(
                f"{file}: expected a column subject_id of integers, found {', '.join(frame.columns)}. Write the label set in MEDS' "
                "label schema: subject_id, prediction_time and a value."
            )
        ids = frame["subject_id"].cast(pl.Int64, strict=False)
        if ids.null_count():
            raise UserError(f"{file}: {ids.null_count()} rows have no subject_id of Int64. Drop or mend those rows.")
        return frame.with_columns(self._id(ids, name, str(file)))

    def _say_homonyms(self) -> None:
        """Warn of codes that two datasets have under one name with different texts; they stay two codes."""
        known: dict[str, tuple[str, str]] = {}
        found = []
        for name, source in self.sources.items():
            rows = source.code_metadata().select("code", "description").drop_nulls().unique("code", maintain_order=True)
            for code, text in rows.iter_rows():
                first = known.setdefault(code, (name, text))
                if first[0] != name and first[1] != text and code not in SHARED:
                    found.append((code, *first, name, text))
        if found:
            code, name, text, other, different = found[0]
            log.warning(
                "%d codes have one name and different texts in the pooled datasets, such as %s: %r in %s, %r in %s. They stay two "
                "codes, %s//%s and %s//%s, and only their texts bring them together or keep them apart",
                len(found), code, text, name, different, other, name, code, other, code,
            )  # fmt: skip


def dataset_of(code: str, names: Sequence[str]) -> int:
    """Return the number of the dataset that a pooled code comes from, -1 for one that all share.

    >>> dataset_of("b//LAB//1", ["a", "b"]), dataset_of("MEDS_BIRTH", ["a", "b"])
    (1, -1)
    """
    for number, name in enumerate(names):
        if code.startswith(f"{name}//"):
            return number
    return -1


def distinct(names: list[str]) -> list[str]:
    """Return the names with a number behind those that stood before.

    >>> distinct(["meds", "eicu", "meds"])
    ['meds', 'eicu', 'meds-2']
    """
    found: list[str] = []
    for name in names:
        number, own = 1, name
        while own in found:
            number += 1
            own = f"{name}-{number}"
        found.append(own)
    return found


def _code(code: pl.Expr, name: str) -> pl.Expr:
    return pl.when(code.is_in(list(SHARED))).then(code).otherwise(pl.lit(f"{name}//") + code)


def _label_sets(root: Path) -> dict[str, Path]:
    """Return the label sets of a dataset by name: folders of `labels` and `task_labels` with parquet files or splits."""
    found: dict[str, Path] = {}
    for base in (root / TASK_LABELS, root / LABELS):
        for file in sorted(base.rglob("*.parquet")) if base.is_dir() else ():
            folder = file.parent
            while folder.parent != base and folder.name in ("train", "tuning", "held_out"):
                folder = folder.parent
            if folder != base:
                found[str(folder.relative_to(base))] = folder
    return found


def _files(path: Path) -> list[Path]:
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: expected parquet files with labels, found none.")
    return files
