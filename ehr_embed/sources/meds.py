"""Read events of a MEDS 0.4 dataset (https://github.com/Medical-Event-Data-Standard/meds), shard by shard."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import file_sha256
from ehr_embed.core.fingerprints import fingerprint
from ehr_embed.core.lost_data import say_or_refuse
from ehr_embed.sources.meds_files import COLUMNS, check_events, read_columns, readable
from ehr_embed.sources.meds_remedies import refuse_other_folders, refuse_other_formats
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.sources.split_names import check_split_names


class MedsSource:
    """Source of the events of a folder in MEDS 0.4 layout: `data/**/*.parquet` and `metadata/`.

    The split of a subject comes from the file `splits` if that is given, else from `metadata/subject_splits.parquet`,
    and if that file is absent from the name of the folder under `data/`.

    Args:
        root: the dataset's folder.
        name: short name for file names and tags; None = the folder's name.
        splits: a parquet file with subject_id and a column of split names, which replace the dataset's own splits;
            subjects that the file does not list are left out.
        split_column: name of the column of split names in `splits`.
        needs_splits: False for a dataset that serves for prediction only: its splits are not read, and `split` is null.

    Raises:
        UserError: `root` is no MEDS dataset, or the file `splits` does not exist.
    """

    writes = False

    def __init__(
        self,
        *,
        root: str | None,
        name: str | None = None,
        splits: str | None = None,
        split_column: str = "split",
        needs_splits: bool = True,
    ) -> None:
        if root is None:
            raise UserError(
                "data.root is not set: expected the folder of a MEDS dataset (with data/ and metadata/). "
                "Type: python train.py data=meds data.root=DIR"
            )
        self.root = Path(root).expanduser().resolve()
        self.name, self.needs_splits = name or self.root.name, needs_splits
        self.splits = None if splits is None else Path(splits).expanduser().resolve()
        self.split_column = split_column
        # The ids of all subjects read so far, sorted, and the number of the shard of each. They are arrays, and no
        # frame per shard, since a frame that polars' unique returns keeps memory for every row of the shard.
        self._numbers: dict[Path, int] = {}
        self._n_read: dict[Path, npt.NDArray[np.int64]] = {}
        self._seen_ids, self._seen_in = np.empty(0, np.int64), np.empty(0, np.int32)
        if not (self.root / "data").is_dir():
            found = "a folder without data/" if self.root.is_dir() else "no such folder"
            raise UserError(
                f"data.root={root}: expected a MEDS dataset with data/**/*.parquet inside, found {found}. "
                "Type: data.root=DIR with the folder that holds data/ and metadata/."
            )
        if self.splits is not None:
            if not self.splits.is_file():
                raise UserError(
                    f"data.splits={splits}: no such file. Expected a parquet file with subject_id and a column of split names "
                    f"({', '.join(SPLITS)}); data.splits=null takes the dataset's own splits."
                )
            self.name += f"-{split_column}-{file_sha256(self.splits)[:6]}"

    @property
    def labels_dir(self) -> Path:
        return self.root / "labels"

    @cached_property
    def shards(self) -> list[Path]:
        shards = sorted(path for path in (self.root / "data").rglob("*.parquet") if not path.name.startswith("."))
        refuse_other_formats(self.root / "data", shards)
        if self.needs_splits and self.subject_splits is None:
            refuse_other_folders(self.root / "data", shards)
        return shards

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprints of the dataset's files; they cover all bytes, so any change of the data shows."""
        metadata = [self.root / "metadata" / name for name in ("codes.parquet", "subject_splits.parquet")]
        files = [*self.shards, *(path for path in metadata if path.exists())]
        found = {str(path.relative_to(self.root)): fingerprint(path) for path in files}
        return (
            found if self.splits is None else found | {f"data.splits ({self.split_column})": fingerprint(self.splits)}
        )

    @cached_property
    def subject_splits(self) -> pl.DataFrame | None:
        """Return subject_id, split (Categorical), one row per subject, sorted; None if folders define the splits."""
        path = self.splits or self.root / "metadata" / "subject_splits.parquet"
        if not path.exists():
            return None
        column = "split" if self.splits is None else self.split_column
        splits = read_columns(path, {"subject_id": pl.Int64, column: pl.String})
        splits = splits.select("subject_id", split=pl.col(column).cast(pl.Categorical))
        if splits.null_count().sum_horizontal().item():
            raise UserError(f"{path}: null subject_id or split. Every subject needs one split; mend the file.")
        splits = splits if splits["subject_id"].is_sorted() else splits.sort("subject_id")
        again = splits["subject_id"] == splits["subject_id"].shift()
        conflicts = splits.filter(again & (splits["split"] != splits["split"].shift()))["subject_id"].unique().sort()
        if len(conflicts):
            where = sorted(splits.filter(subject_id=conflicts[0])["split"].cast(pl.String).unique())
            raise UserError(
                f"{path}: subject {conflicts[0]} is in two splits ({', '.join(where)}), {len(conflicts)} subjects in all. "
                "Held-out metrics would be measured on training subjects; give each subject one split."
            )
        splits = splits.filter(~again.fill_null(False))
        sizes = splits.group_by(pl.col("split").cast(pl.String)).len()
        check_split_names(dict(sizes.iter_rows()), where=str(path), column=column)
        return splits

    def split_of_subjects(self, *, max_events: int) -> pl.DataFrame | None:
        """Return subject_id and split (String) of every subject, as far as this is known without reading much.

        Args:
            max_events: largest number of events of which the subjects are read where folders define the splits.

        Returns:
            One row per subject; None where the splits are not known, or only with more work.
        """
        if self.subject_splits is not None:
            return self.subject_splits.with_columns(pl.col("split").cast(pl.String))
        folders = {shard: shard.relative_to(self.root / "data").parts[0] for shard in self.shards}
        if not set(folders.values()) <= set(SPLITS) or self.n_events > max_events:
            return None
        found = []
        for shard, split in folders.items():
            with readable(shard):
                subjects = (
                    pl.scan_parquet(shard, glob=False).select(pl.col("subject_id").cast(pl.Int64)).unique().collect()
                )
            found.append(subjects.with_columns(split=pl.lit(split)))
        return pl.concat(found)

    @cached_property
    def n_events(self) -> int:
        """Return the number of events, which the files say at their ends."""
        n_events = 0
        for shard in self.shards:
            with readable(shard):
                n_events += pl.scan_parquet(shard, glob=False).select(pl.len()).collect().item()
        return n_events

    def read(self, shard: Path) -> pl.DataFrame:
        events = read_columns(shard, COLUMNS)
        check_events(events, shard)
        folder = shard.relative_to(self.root / "data").parts[0]
        events = self._with_split(events, shard, folder if folder in SPLITS else None)
        self._refuse_shared_subjects(events, shard)
        return events

    def _with_split(self, events: pl.DataFrame, shard: Path, folder: str | None) -> pl.DataFrame:
        if not self.needs_splits:
            return events.with_columns(split=pl.lit(None, dtype=pl.String))
        if self.subject_splits is None:
            return events.with_columns(split=pl.lit(folder))
        events = events.with_columns(split=_of_subjects(events, self.subject_splits))
        if self.splits is not None:
            kept = events.filter(pl.col("split").is_not_null())
            self._tell_unassigned(shard, events, kept)
            return kept
        homeless = events.filter(pl.col("split").is_null())
        if len(homeless):
            raise UserError(
                f"{shard}: subject {homeless['subject_id'][0]} and {homeless['subject_id'].n_unique() - 1} more are not in "
                "metadata/subject_splits.parquet, so no split is known for them. Add them there."
            )
        if folder is not None and len(wrong := events.filter(pl.col("split") != folder)):
            raise UserError(
                f"{shard}: subject {wrong['subject_id'][0]} lies in data/{folder}/ but subject_splits.parquet says "
                f"{wrong['split'][0]}: one subject in two splits. Make them agree; held-out metrics depend on it."
            )
        return events

    def _tell_unassigned(self, shard: Path, events: pl.DataFrame, kept: pl.DataFrame) -> None:
        """Count the subjects and events that the file `splits` leaves out, and warn after the last shard."""
        is_last_new = shard not in self._n_read and len(self._n_read) + 1 == len(self.shards)
        self._n_read[shard] = np.array([len(_runs(events)[0]), len(_runs(kept)[0]), len(events), len(kept)])
        if not is_last_new:
            return
        n_subjects, n_kept, n_events, n_events_kept = np.sum(list(self._n_read.values()), axis=0).tolist()
        # A file that lists only a part of the subjects may be intended; a file that lists none of them is a mistake.
        n_lost = n_events - n_events_kept
        say_or_refuse(
            n_subjects - n_kept,
            n_subjects,
            f"subjects ({n_lost:,} of {n_events:,} events) have no split in {self.splits}, and are left out",
            remedy="Add them to the file if they belong to the experiment.",
            refused_from=1.0,
        )
        n_named = 0 if self.subject_splits is None else len(self.subject_splits)
        say_or_refuse(
            n_named - n_kept,
            n_named,
            f"subjects of {self.splits} have no events in {self.root}",
            remedy="Point data.splits and data.root at the same dataset.",
            refused_from=1.0,
        )

    def _refuse_shared_subjects(self, events: pl.DataFrame, shard: Path) -> None:
        number = self._numbers.setdefault(shard, len(self._numbers))
        subjects = np.sort(_runs(events)[0])
        place, is_known = _places(subjects, self._seen_ids)
        other = self._seen_in[place[is_known]]
        if len(shared := np.flatnonzero(other != number)):
            files = list(self._numbers)
            raise UserError(
                f"subject {subjects[is_known][shared[0]]} has events in both {files[other[shared[0]]]} and {shard} "
                f"({len(shared)} such subjects). MEDS keeps a subject in one file, and one in two folders would be in two "
                "splits. Re-shard by subject."
            )
        if not is_known.all():
            self._seen_in = np.insert(self._seen_in, place[~is_known], number)
            self._seen_ids = np.insert(self._seen_ids, place[~is_known], subjects[~is_known])

    def code_metadata(self) -> pl.DataFrame:
        schema: dict[str, Any] = {"code": pl.String, "description": pl.String, "parent_codes": pl.List(pl.String)}
        path = self.root / "metadata" / "codes.parquet"
        if not path.exists():
            return pl.DataFrame(schema=schema)
        with readable(path):
            frame = pl.scan_parquet(path, glob=False)
            present = frame.collect_schema()
            if "code" not in present:
                raise UserError(f"{path}: expected a column `code`, found {', '.join(present)}.")
            for name, dtype in schema.items():
                if name in present and not _holds_text(present[name], is_list=name == "parent_codes"):
                    raise UserError(
                        f"{path}: column `{name}` has dtype {present[name]}, expected {dtype} (MEDS 0.4). Cast it and "
                        "write it again."
                    )
            missing = [pl.lit(None, dtype=dtype).alias(name) for name, dtype in schema.items() if name not in present]
            frame = frame.with_columns(missing).select(pl.col(name).cast(dtype) for name, dtype in schema.items())
            codes = frame.collect()
        say_or_refuse(
            codes["code"].null_count(), len(codes), f"rows of {path} have no code, and are left out",
            remedy="A text belongs to a code; mend the file.",
        )  # fmt: skip
        return codes.drop_nulls("code")


def _runs(events: pl.DataFrame) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the subjects' ids in order of appearance, and each one's number of (contiguous) events."""
    ids = events["subject_id"].to_numpy()
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(ids)), bool), ids[1:] != ids[:-1]]))
    return ids[starts], np.diff(starts, append=len(ids))


def _places(
    ids: npt.NDArray[np.int64], among: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return where each id is, or would be inserted, among sorted ids, and whether it is there."""
    place = np.searchsorted(among, ids)
    if not len(among):
        return place, np.zeros(len(ids), bool)
    return place, among[np.minimum(place, len(among) - 1)] == ids


def _of_subjects(events: pl.DataFrame, splits: pl.DataFrame) -> pl.Series:
    """Return the split of every event; null for an event whose subject has none."""
    subjects, n_events = _runs(events)
    place, is_known = _places(subjects, splits["subject_id"].to_numpy())
    rows = pl.Series(np.repeat(place, n_events)).set(pl.Series(np.repeat(~is_known, n_events)), None)
    return splits["split"].gather(rows).cast(pl.String)


def _holds_text(found: pl.DataType, *, is_list: bool) -> bool:
    if is_list and isinstance(found, pl.List):
        found = found.inner if isinstance(found.inner, pl.DataType) else found.inner()
    elif is_list:
        return found == pl.Null
    return found in (pl.String, pl.Null) or isinstance(found, pl.Categorical | pl.Enum)
