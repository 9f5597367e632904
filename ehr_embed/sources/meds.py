"""Events from a MEDS 0.4 dataset (https://github.com/Medical-Event-Data-Standard/meds), shard by shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import file_sha256
from ehr_embed.core.fingerprints import fingerprint
from ehr_embed.core.vanishing import say_or_refuse
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.sources.split_names import check_split_names

FIRST_TIME, LAST_TIME = -62_135_596_800_000_000, 253_402_300_799_999_999
"""Microseconds since 1970-01-01 of the first and the last instant of the years 1 to 9999."""
COLUMNS = {"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32}


class MedsSource:
    """A folder in MEDS 0.4 layout: `data/**/*.parquet` and `metadata/`.

    Splits come from `metadata/subject_splits.parquet`, or from the folder under `data/` when that file is absent, or else
    from a file of one's own.

    Args:
        root: the dataset's folder.
        name: short name for file names and tags; the folder's name by default.
        splits: a parquet file with subject_id and a column of split names to use in place of the dataset's own splits;
            subjects it does not name are left out.
        split_column: that column.
        needs_splits: False for a dataset that is only predicted for: its splits are not looked at, and `split` is null.
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
        # Of all subjects read so far, sorted by id, the number of their shard: not a frame a shard, since what polars' unique
        # returns holds on to memory for every row of the shard.
        self._numbers: dict[Path, int] = {}
        self._n_read: dict[Path, npt.NDArray[np.int64]] = {}
        self._seen_ids, self._seen_in = np.empty(0, np.int64), np.empty(0, np.int32)
        if not (self.root / "data").is_dir():
            found = "a folder without data/" if self.root.is_dir() else "no such folder"
            raise UserError(
                f"data.root={root}: expected a MEDS dataset with data/**/*.parquet inside, found {found}. "
                "Type: python train.py data=meds data.root=DIR with the folder that holds data/ and metadata/."
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
        if not shards:
            raise UserError(f"{self.root / 'data'}: expected parquet shards, found none. Run your MEDS ETL again.")
        return shards

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint of every file read, of all its bytes: any change of the data shows there."""
        metadata = [self.root / "metadata" / name for name in ("codes.parquet", "subject_splits.parquet")]
        files = [*self.shards, *(path for path in metadata if path.exists())]
        found = {str(path.relative_to(self.root)): fingerprint(path) for path in files}
        return (
            found if self.splits is None else found | {f"data.splits ({self.split_column})": fingerprint(self.splits)}
        )

    @cached_property
    def subject_splits(self) -> pl.DataFrame | None:
        """subject_id, split (Categorical), a row a subject, sorted; None when the dataset leaves the splits to its folders."""
        path = self.splits or self.root / "metadata" / "subject_splits.parquet"
        if not path.exists():
            return None
        column = "split" if self.splits is None else self.split_column
        splits = _read(path, {"subject_id": pl.Int64, column: pl.String})
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

    def read(self, shard: Path) -> pl.DataFrame:
        events = _read(shard, COLUMNS)
        _validate(events, shard)
        folder = shard.relative_to(self.root / "data").parts[0]
        events = self._with_split(events, shard, folder if folder in SPLITS else None)
        self._refuse_shared_subjects(events, shard)
        return events

    def _with_split(self, events: pl.DataFrame, shard: Path, folder: str | None) -> pl.DataFrame:
        if not self.needs_splits:
            return events.with_columns(split=pl.lit(None, dtype=pl.String))
        if self.subject_splits is None:
            if folder is None:
                raise UserError(
                    f"{shard}: no split. Expected metadata/subject_splits.parquet, or shards under "
                    f"data/{{{','.join(SPLITS)}}}/. Write one of them; nothing was fitted."
                )
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
        """Count what a splits file of one's own leaves out, and say it once, when the last shard has been read."""
        is_last_new = shard not in self._n_read and len(self._n_read) + 1 == len(self.shards)
        self._n_read[shard] = np.array([len(_runs(events)[0]), len(_runs(kept)[0]), len(events), len(kept)])
        if not is_last_new:
            return
        n_subjects, n_kept, n_events, n_events_kept = np.sum(list(self._n_read.values()), axis=0).tolist()
        # A file that names a part of the subjects is a choice, as long as it names some of them.
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
            frame = pl.scan_parquet(path)
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
    """Ids of the subjects, whose events are contiguous, in order of appearance, and how many events each has."""
    ids = events["subject_id"].to_numpy()
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(ids)), bool), ids[1:] != ids[:-1]]))
    return ids[starts], np.diff(starts, append=len(ids))


def _places(
    ids: npt.NDArray[np.int64], among: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Where each id stands or would stand among sorted ones, and whether it does."""
    place = np.searchsorted(among, ids)
    if not len(among):
        return place, np.zeros(len(ids), bool)
    return place, among[np.minimum(place, len(among) - 1)] == ids


def _of_subjects(events: pl.DataFrame, splits: pl.DataFrame) -> pl.Series:
    """The split of every event, null where its subject has none."""
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


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Refuse a parquet file that cannot be read, whichever page of it is damaged.

    Raises:
        UserError: names the file.
    """
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: not a readable parquet file ({told}). It may be truncated; write it again."
        ) from error


def _read(path: Path, schema: dict[str, Any]) -> pl.DataFrame:
    """Exactly the columns of `schema`; an absent numeric_value is all null."""
    with readable(path):
        return _scan(path, schema).collect()


def microseconds(name: str, dtype: pl.DataType, *, up: bool) -> pl.Expr:
    """A time of any unit in whole microseconds; finer ones are rounded up or down.

    With events rounded up and prediction times down, no event becomes visible before it happened. Times too far away for
    microseconds come out beyond `FIRST_TIME` or `LAST_TIME`, which are refused, and do not wrap around.
    """
    number = pl.col(name).cast(pl.Int64)
    if dtype == pl.Datetime("ns"):
        number = -((-number) // 1000) if up else number // 1000
    elif dtype == pl.Datetime("ms"):
        number = number.clip(-(2**63) // 1000 + 1, 2**63 // 1000) * 1000
    return number.cast(pl.Datetime("us")).alias(name)


def out_of_range(time: pl.Expr) -> pl.Expr:
    """Whether a time lies outside the years 1 to 9999."""
    number = time.cast(pl.Int64)
    return (number < FIRST_TIME) | (number > LAST_TIME)


def _scan(path: Path, schema: dict[str, Any]) -> pl.LazyFrame:
    frame = pl.scan_parquet(path)
    present = frame.collect_schema()
    for name, dtype in schema.items():
        if name == "numeric_value" and name not in present:
            frame = frame.with_columns(pl.lit(None, dtype=pl.Float32).alias(name))
            continue
        if name not in present:
            raise UserError(f"{path}: column `{name}` is missing; found {', '.join(present)}. MEDS 0.4 requires it.")
        if not _castable(present[name], dtype):
            raise UserError(
                f"{path}: column `{name}` has dtype {present[name]}, expected {dtype} (MEDS 0.4). Cast it and write it again."
            )
        if present[name] == pl.UInt64 or present[name] in (pl.Int128, pl.UInt128):
            _refuse_large(frame, name, path)
    return frame.select(
        microseconds(name, present[name], up=True) if dtype == pl.Datetime("us") else pl.col(name).cast(dtype)
        for name, dtype in schema.items()
    )


def _refuse_large(frame: pl.LazyFrame, name: str, path: Path) -> None:
    found = frame.select(pl.col(name).cast(pl.Int64, strict=False).is_null().sum() - pl.col(name).is_null().sum())
    if n := found.collect().item():
        raise UserError(f"{path}: {n} values of `{name}` do not fit Int64, the dtype of MEDS 0.4. Give other ids.")


def _castable(found: pl.DataType, wanted: Any) -> bool:
    if wanted == pl.Datetime("us"):
        return isinstance(found, pl.Datetime) and found.time_zone is None
    if wanted == pl.String:
        return found == pl.String or isinstance(found, pl.Categorical | pl.Enum)
    if wanted == pl.Float32:
        return found.is_numeric() or found == pl.Null
    return found.is_integer()


def _validate(events: pl.DataFrame, shard: Path) -> None:
    def refuse(rows: pl.DataFrame, expected: str) -> None:
        if len(rows):
            raise UserError(
                f"{shard}, row {rows['row'][0]}: {expected} ({len(rows)} such rows). Mend the ETL; nothing was written."
            )

    rows = events.with_row_index("row")
    refuse(rows.filter(pl.col("subject_id").is_null()), "subject_id is null, and every event needs a subject")
    refuse(
        rows.filter(pl.col("code").is_null() | (pl.col("code") == "")),
        "code is null or empty, and every event needs a code",
    )
    refuse(
        rows.filter(pl.col("numeric_value").is_nan() | pl.col("numeric_value").is_infinite()),
        "numeric_value is NaN or infinite as float32 (which ends at 3.4e38); a missing value is null in MEDS",
    )
    refuse(
        rows.filter(out_of_range(pl.col("time"))),
        "time lies outside the years 1 to 9999, so it is no date of a record; a static event has a null time in MEDS",
    )
    new_subject = pl.col("subject_id") != pl.col("subject_id").shift()
    starts = rows.filter(new_subject.fill_null(True))
    refuse(
        starts.filter(~pl.col("subject_id").is_first_distinct()),
        "a subject's events are not contiguous, as MEDS requires; sort by subject_id, time",
    )
    # Static events (null time) come first in MEDS, so they order below every real time.
    time = pl.col("time").fill_null(pl.lit(-(2**62)).cast(pl.Datetime("us")))
    refuse(
        rows.filter(~new_subject & (time < time.shift())),
        "events of a subject are not ordered by time (static ones first), as MEDS requires; sort by subject_id, time",
    )
