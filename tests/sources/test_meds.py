"""Reading MEDS: splits, descriptions, and refusal of what is not MEDS."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from ehr_embed.core.errors import UserError
from ehr_embed.sources.meds import MedsSource
from tests.helpers.refusals import refused
from tests.helpers.small_meds import event_frame, write_meds

GOOD = [(1, None, "SEX//F", None), (1, 0.0, "A", 1.0), (1, 1.0, "A", None)]
OTHER = {"tuning": [(2, 0.0, "A", 1.0)], "held_out": [(3, 0.0, "A", 1.0)]}


def source(tmp_path: Path, train: list, **options) -> MedsSource:
    return MedsSource(root=str(write_meds(tmp_path / "set", {"train": train, **OTHER}, **options)))


def read_all(meds: MedsSource) -> pl.DataFrame:
    return pl.concat([meds.read(shard) for shard in meds.shards])


@pytest.mark.parametrize("subject_splits", [True, False])
def test_splits_come_from_the_file_or_the_folders(tmp_path, subject_splits):
    events = read_all(source(tmp_path, GOOD, subject_splits=subject_splits))
    assert dict(events.select("subject_id", "split").unique().iter_rows()) == {1: "train", 2: "tuning", 3: "held_out"}
    assert len(events) == 5


def test_splits_of_ones_own_replace_the_datasets(tmp_path):
    root = write_meds(tmp_path / "set", {"train": [*GOOD, (4, 0.0, "A", None)], **OTHER})
    other = tmp_path / "folds.parquet"
    folds = {
        "subject_id": [1, 2, 3],
        "fold1": ["held_out", "train", "tuning"],
        "fold2": ["train", "tuning", "held_out"],
    }
    pl.DataFrame(folds).write_parquet(other)
    for column in ("fold1", "fold2"):
        meds = MedsSource(root=str(root), splits=str(other), split_column=column)
        found = dict(read_all(meds).select("subject_id", "split").unique().iter_rows())
        assert found == dict(zip(folds["subject_id"], folds[column], strict=True)), "subject 4 is left out"
    first, second = (MedsSource(root=str(root), splits=str(other), split_column=name) for name in ("fold1", "fold2"))
    assert first.name != second.name, "their stores are two"
    assert first.fingerprint() != MedsSource(root=str(root)).fingerprint()
    with refused("`fold3`", "subject_id, fold1, fold2"):
        read_all(MedsSource(root=str(root), splits=str(other), split_column="fold3"))
    with pytest.raises(UserError, match=r"data\.splits=none\.parquet"):
        MedsSource(root=str(root), splits="none.parquet")


def test_one_mixed_shard_is_divided_by_subject_splits(tmp_path):
    root = write_meds(tmp_path / "set", {"train": GOOD, **OTHER})
    frames = [pl.read_parquet(shard) for shard in MedsSource(root=str(root)).shards]
    for shard in MedsSource(root=str(root)).shards:
        shard.unlink()
    pl.concat(frames).sort("subject_id", maintain_order=True).write_parquet(root / "data" / "all.parquet")
    assert set(read_all(MedsSource(root=str(root)))["split"]) == {"train", "tuning", "held_out"}


def test_missing_root_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: .*MEDS dataset"):
        MedsSource(root=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"Type: python train\.py data=meds data\.root=DIR"):
        MedsSource(root=None)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([(1, 1.0, "A", None), (1, 0.0, "A", None)], "row 1: .*time.*sort by subject_id, time"),
        ([(1, 1.0, "A", None), (1, None, "S", None)], "row 1: .*time.*sort by subject_id, time"),
        (
            [(1, 0.0, "A", None), (4, 0.0, "A", None), (1, 2.0, "A", None)],
            "row 2: .*contiguous.*sort by subject_id, time",
        ),
        ([(1, 0.0, "A", float("nan"))], "row 0: numeric_value is NaN"),
        ([(1, 0.0, "A", None), (1, 0.0, "A", float("inf"))], "row 1: numeric_value is NaN or infinite"),
        ([(1, 0.0, None, None)], r"row 0: code\b"),
    ],
)
def test_bad_rows_are_refused_by_file_and_row(tmp_path, train, message):
    meds = source(tmp_path, train)
    with pytest.raises(UserError, match=message) as caught:
        read_all(meds)
    assert "train/0.parquet" in str(caught.value)


def test_null_subject_is_refused(tmp_path):
    meds = source(tmp_path, GOOD)
    event_frame(GOOD).with_columns(subject_id=pl.lit(None, dtype=pl.Int64)).write_parquet(meds.shards[1])
    with pytest.raises(UserError, match=r"row 0: subject_id\b"):
        read_all(meds)


def test_wrong_dtype_and_missing_column_are_refused(tmp_path):
    meds = source(tmp_path, GOOD)
    shard = next(shard for shard in meds.shards if "train" in str(shard))
    event_frame(GOOD).with_columns(pl.col("time").cast(pl.String)).write_parquet(shard)
    with refused("`time`", "String", "Datetime"):
        read_all(meds)
    event_frame(GOOD).drop("code").write_parquet(shard)
    with refused("`code`", "missing"):
        read_all(meds)
    shard.write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"\.parquet: .*write it again"):
        read_all(meds)


def test_a_subject_in_two_splits_is_refused(tmp_path):
    with refused("subject 1", "two splits"):
        read_all(MedsSource(root=str(write_meds(tmp_path / "a", {"train": GOOD, "tuning": [(1, 0.0, "A", None)]}))))
    folders = write_meds(tmp_path / "b", {"train": GOOD, "tuning": [(1, 0.0, "A", None)]}, subject_splits=False)
    with refused("subject 1", "both"):
        read_all(MedsSource(root=str(folders)))
    disagree = write_meds(tmp_path / "c", {"train": GOOD, **OTHER})
    splits = pl.DataFrame({"subject_id": [1, 2, 3], "split": ["tuning", "tuning", "held_out"]})
    splits.write_parquet(disagree / "metadata" / "subject_splits.parquet")
    with refused("subject 1", "data/train/", "subject_splits.parquet", "tuning"):
        read_all(MedsSource(root=str(disagree)))


def test_a_subject_without_split_is_refused(tmp_path):
    root = write_meds(tmp_path / "set", {"train": GOOD, **OTHER})
    pl.DataFrame({"subject_id": [2, 3], "split": ["tuning", "held_out"]}).write_parquet(
        root / "metadata" / "subject_splits.parquet"
    )
    with pytest.raises(UserError, match=r"subject 1 .*metadata/subject_splits\.parquet.*Add them there"):
        read_all(MedsSource(root=str(root)))


def test_the_fingerprint_follows_the_data(tmp_path):
    meds = source(tmp_path, GOOD)
    before = meds.fingerprint()
    event_frame([(1, 0.0, "A", 2.0)]).write_parquet(meds.shards[1])
    assert meds.fingerprint() != before
