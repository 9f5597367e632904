"""Mistakes that data in MEDS layout often have, and what to type against each of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl

from ehr_embed.core.errors import UserError
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.sources.split_names import meant_split

log = logging.getLogger(__name__)

OTHER_FORMATS = (".csv", ".csv.gz", ".csv.zst", ".tsv", ".jsonl", ".feather", ".arrow", ".pkl", ".nrt")
"""Endings of files that hold tables, and that MEDS does not know."""


def refuse_other_formats(data: Path, shards: Iterable[Path]) -> None:
    """Refuse a folder whose tables are in another format than parquet, and warn of such files beside parquet.

    Args:
        data: the folder `data` of a dataset.
        shards: its parquet files.

    Raises:
        UserError: a folder holds tables, none of them in parquet, so that its events would be left out; or there are no shards.
    """
    shards = list(shards)
    others = sorted(path for path in data.rglob("*") if path.name.endswith(OTHER_FORMATS) and path.is_file())
    read = {path.parent for path in shards}
    unread = [path for path in others if path.parent not in read]
    if unread:
        raise UserError(
            f"{unread[0]}: expected parquet, as MEDS has it, found {unread[0].suffix}; the events of {len(unread)} such files "
            f"would be missing. {_as_parquet(unread[0])}, or move them out of {data}."
        )
    if not shards:
        raise UserError(f"{data}: expected parquet shards, found none. Run your MEDS ETL again.")
    if others:
        log.warning(
            "%s and %d more files are not parquet and are not read; move them out of %s if they hold no events of their own",
            others[0], len(others) - 1, data,
        )  # fmt: skip


def _as_parquet(file: Path) -> str:
    if ".csv" in file.suffixes:
        return "Write them again: polars.read_csv(FILE, try_parse_dates=True).write_parquet(FILE.parquet)"
    if file.suffix == ".nrt":
        return "They are tensors, which MEDS-transforms makes last; take the output of a stage before its normalization"
    return "Write them again as parquet"


def refuse_other_folders(data: Path, shards: Sequence[Path]) -> None:
    """Refuse shards outside the folders of the three splits, for a dataset in which folders alone define the splits.

    Raises:
        UserError: the message names the split that a folder such as `val` probably stands for.
    """
    outside = [shard for shard in shards if shard.relative_to(data).parts[0] not in SPLITS]
    if not outside:
        return
    folders = sorted({shard.relative_to(data).parts[0] for shard in outside if shard.parent != data})
    meant = {folder: split for folder in folders if (split := meant_split(folder))}
    renamed = " && ".join(f"mv '{data / folder}' '{data / split}'" for folder, split in meant.items())
    listed = ", ".join(
        f"data/{folder}/" + (f" (for {meant[folder]}?)" if folder in meant else "") for folder in folders
    )
    raise UserError(
        f"{outside[0]}: no split is known for it. Expected metadata/subject_splits.parquet, or shards in "
        f"data/{{{','.join(SPLITS)}}}/, found {listed or 'shards in data/ itself'}. "
        + (f"Type: {renamed}" if renamed else "Write one of the two; nothing was fitted.")
    )


def wrong_dtype(file: Path, column: str, found: pl.DataType, expected: object) -> UserError:
    """Return the error for a column of events whose dtype is not that of MEDS 0.4."""
    told = f"{file}: column `{column}` has dtype {found}, expected {expected} (MEDS 0.4). "
    if column == "code" and found.is_numeric():
        return UserError(
            f"{told}The codes are numericalised: the stage `normalization` of MEDS-transforms replaced them by numbers, which have "
            "no text. Set data.root to the output of the stage before it, whose codes are strings."
        )
    if isinstance(found, pl.Datetime) and found.time_zone is not None:
        return UserError(told + without_zone(column, found))
    return UserError(f"{told}Cast it and write it again.")


def without_zone(column: str, found: pl.Datetime) -> str:
    """Return what to do with times that have a time zone: events and labels must be in the same local or universal time.

    >>> "convert_time_zone" in without_zone("time", pl.Datetime("us", "Europe/Berlin"))
    True
    """
    return (
        f"Times in MEDS have no zone ({found.time_zone} here), and those of labels and events are compared as they stand: a wrong "
        "choice shifts them against each other by hours, and lets a model see what came later. If the other file's times are UTC, "
        f'type polars.col("{column}").dt.convert_time_zone("UTC").dt.replace_time_zone(None); if they are local times of this '
        f'zone, polars.col("{column}").dt.replace_time_zone(None).'
    )
