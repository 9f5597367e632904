"""Odd MEDS data: read as a plain reference reads them, or refused in our own words; never a library's traceback."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehr_embed.core.errors import UserError
from ehr_embed.data.batches import BatchDataset
from ehr_embed.data.samples import build_samples
from ehr_embed.data.store import EventStore, build_store
from ehr_embed.data.vocabulary import Vocabulary, VocabularySettings
from ehr_embed.sources.meds import MedsSource
from tests.helpers import fuzz
from tests.helpers.fuzz import (
    DAMAGES,
    DAY,
    SPLITS,
    Dataset,
    datasets,
    fit,
    is_valid,
    large,
    records,
    seen,
    small,
    write,
)
from tests.helpers.refusals import refused
from tests.helpers.small_meds import write_meds

SETTINGS = [VocabularySettings(values="both", min_count=1, n_bins=200), VocabularySettings(values="both", n_bins=200)]
NEEDS_CARE = ("time in ns", "time in ms", "subject as int32", "value missing")
"""Damage that changes rows: read, but not compared row by row."""


def build(dataset: Dataset, folder: Path, settings: VocabularySettings) -> EventStore:
    return build_store(folder / "store", MedsSource(root=str(write(dataset, folder / "set"))), settings)


def check_reading(dataset: Dataset, settings: VocabularySettings, max_length: int) -> None:
    """Refused exactly where the reference refuses; else every sample sees what the reference says, and nothing later."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            store = build(dataset, Path(folder), settings)
            splits = {split: store.split(split) for split in SPLITS}
        except UserError as error:
            fuzz.is_clear(error)
            refusal: UserError | None = error
        else:
            refusal = None
        fuzz.counted(is_refused=refusal is not None)
        # A file without rows holds no number that is too large.
        is_bad = DAMAGES.get(dataset.damage or "", False) and bool(
            dataset.shards["train", 0] or dataset.damage not in ("subject beyond int64", "value huge")
        )
        if refusal is not None:
            assert not is_valid(dataset) or is_bad or dataset.damage in NEEDS_CARE, refusal
            return
        if dataset.damage in NEEDS_CARE:
            return
        assert is_valid(dataset), "what MEDS forbids was read"
        assert not is_bad, f"{dataset.damage} was read"
        vocabulary, fitted, by_subject = store.vocabulary, fit(dataset), records(dataset)
        names = vocabulary.strings
        assert len(set(names)) == len(names)
        assert set(fitted.counts) <= set(names), "a code's name did not survive the file"
        for split, events in splits.items():
            own = [(subject, time) for subject, time in dataset.labels if subject in events.subject_ids]
            if not own:
                continue
            frame = pl.DataFrame(own, schema={"subject_id": pl.Int64, "prediction_time": pl.Int64}, orient="row")
            frame = frame.with_columns(pl.col("prediction_time").cast(pl.Datetime("us")))
            samples = build_samples(events, frame, np.zeros(len(own), np.int64), max_length=max_length)
            batch = BatchDataset(events, samples)[np.arange(len(own))]
            for row, (subject, prediction_time) in enumerate(own):
                expected = seen(by_subject[subject], prediction_time, max_length)
                mask = batch.is_event[row]
                assert int(mask.sum()) == len(expected.events), (split, subject)
                tokens = [
                    fuzz.token_name(fitted, code, value, min_count=settings.min_count, n_bins=settings.n_bins)
                    for _, _, code, value in expected.events
                ]
                told = [
                    None if token == 1 else names[token].rstrip("'") for token in batch.token_ids[row][mask].tolist()
                ]
                assert told == [None if name is None else name.rstrip("'") for name in tokens]
                for found, wanted in (
                    (batch.days, expected.days),
                    (batch.gap_days, expected.gaps),
                    (batch.elapsed_days, expected.elapsed),
                    (batch.age_days, [math.nan if age is None else age for age in expected.ages]),
                ):
                    np.testing.assert_array_equal(found[row][mask].numpy(), np.array(wanted, np.float32))
                normals = [fuzz.normal(fitted, code, value) for _, _, code, value in expected.events]
                assert batch.values is not None
                np.testing.assert_allclose(
                    batch.values[row][mask].numpy(),
                    np.array([math.nan if v is None else v for v in normals]),
                    rtol=1e-5,
                    atol=1e-6,
                )


arguments = (datasets(), st.sampled_from(SETTINGS), st.integers(1, 12))


@small(60)
@given(*arguments)
def test_read_as_the_reference_reads_or_refused(dataset, settings, max_length):
    check_reading(dataset, settings, max_length)


@pytest.mark.slow
@large(1000)
@given(*arguments)
def test_read_as_the_reference_reads_or_refused_at_length(dataset, settings, max_length):
    check_reading(dataset, settings, max_length)


def check_train_only(dataset: Dataset, other: Dataset) -> None:
    """The vocabulary is the same whatever tuning and held_out hold."""
    swapped = Dataset(
        {shard: rows for shard, rows in dataset.shards.items() if shard[0] == "train"}
        | {
            shard: [(2**40 + number, time, code, value) for number, (_, time, code, value) in enumerate(rows)]
            for shard, rows in other.shards.items()
            if shard[0] != "train"
        },
        None,
    )
    # One subject an event: nothing of the other dataset's records is left but codes, times and numbers.
    offset = 0
    for shard, rows in swapped.shards.items():
        if shard[0] != "train":
            swapped.shards[shard] = [(2**40 + offset + n, *row[1:]) for n, row in enumerate(rows)]
            offset += len(rows)
    dataset.splits = None
    with tempfile.TemporaryDirectory() as folder:
        stores = [build(it, Path(folder) / name, SETTINGS[1]) for name, it in (("a", dataset), ("b", swapped))]
        for file in ("vocab.csv", "codes.parquet", "vocabulary.json"):
            assert (stores[0].folder / file).read_bytes() == (stores[1].folder / file).read_bytes(), file
    fuzz.counted(is_refused=False)


@small(15)
@given(datasets(with_damage=False), datasets(with_damage=False))
def test_statistics_are_of_train_only(dataset, other):
    check_train_only(dataset, other)


@pytest.mark.slow
@large(100)
@given(datasets(with_damage=False), datasets(with_damage=False))
def test_statistics_are_of_train_only_at_length(dataset, other):
    check_train_only(dataset, other)


@pytest.mark.slow
@large(300)
@given(st.lists(st.tuples(fuzz.CODES, st.text(max_size=8)), min_size=1, max_size=5), st.binary(max_size=30))
def test_any_lookup_file_is_read_or_refused(rows, tail):
    from ehr_embed.sources.code_texts import read_lookups

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lookup.csv"
        path.write_bytes(b"code,term\n" + "\n".join(",".join(row) for row in rows).encode(errors="replace") + tail)
        try:
            frame = read_lookups([str(path)])
        except UserError as error:
            fuzz.is_clear(error)
            fuzz.counted(is_refused=True)
        else:
            assert not frame.null_count().sum_horizontal().item()
            fuzz.counted(is_refused=False)


def test_a_subject_of_one_event_and_one_of_100_000(tmp_path):
    long = [(1, float(i // 7), f"C{i % 50}", float(i)) for i in range(100_000)]
    root = write_meds(
        tmp_path / "set",
        {"train": [*long, (2, 0.0, "C1", 1.0)], "tuning": [(3, 0.0, "C0", None)], "held_out": [(4, 0.0, "D", 9.0)]},
    )
    events = build_store(tmp_path / "store", MedsSource(root=str(root)), VocabularySettings()).split("train")
    start = 18_262 * DAY
    times = pl.Series([start + 5 * DAY, start + 10**9 * DAY // 10**5, start]).cast(pl.Datetime("us"))
    frame = pl.DataFrame({"subject_id": [1, 1, 2], "prediction_time": times})
    samples = build_samples(events, frame, np.zeros(3, np.int64), max_length=50_000)
    assert samples.lengths.tolist() == [42, 50_000, 1]
    assert samples.stop[0] == 42
    assert BatchDataset(events, samples)[np.arange(3)].is_event.sum(dim=1).tolist() == [42, 50_000, 1]


def store_of(tmp_path: Path, train: list, **others: list) -> EventStore:
    dataset = Dataset(
        {("train", 0): train, ("tuning", 0): [(8, 0, "A", None)], ("held_out", 0): [(9, 0, "A", None)]}, None, **others
    )
    shutil.rmtree(tmp_path / "set", ignore_errors=True)
    return build(dataset, tmp_path, SETTINGS[0])


@pytest.mark.parametrize("time", [fuzz.YEAR_9999 + 1, fuzz.YEAR_1 - 1, -(2**63), 2**63 - 1])
def test_a_time_that_is_no_date_is_refused(tmp_path, time):
    """int64's least number would have been taken for a static event, and Python cannot print the year 10000."""
    with refused("row 0: time", "1 to 9999"):
        store_of(tmp_path, [(1, time, "A", None)])


def test_an_event_between_two_microseconds_is_rounded_up(tmp_path):
    """Rounded down, it would be visible at a prediction time that it follows by some nanoseconds."""
    store = store_of(tmp_path, [(1, 5, "A", None)])
    shard = tmp_path / "set" / "data" / "train" / "0.parquet"
    for nanoseconds, microseconds in ((5001, 6), (5000, 5), (-5001, -5), (-4999, -4)):
        time = pl.Series("time", [nanoseconds]).cast(pl.Datetime("ns"))
        pl.DataFrame({"subject_id": [1], "time": time, "code": ["A"]}).write_parquet(shard)
        assert MedsSource(root=str(tmp_path / "set")).read(shard)["time"].cast(pl.Int64).to_list() == [microseconds]
    far = pl.Series("time", [2**62]).cast(pl.Datetime("ms"))
    pl.DataFrame({"subject_id": [1], "time": far, "code": ["A"]}).write_parquet(shard)
    with pytest.raises(UserError, match=r"0\.parquet, row 0: time .*1 to 9999"):
        MedsSource(root=str(tmp_path / "set")).read(shard)
    assert store.manifest["splits"]["train"]["n_events"] == 1


def test_ids_beyond_int64_are_refused(tmp_path):
    with refused("`subject_id`", "Int64"):
        store_of(tmp_path, [(1, 0, "A", None)], damage="subject beyond int64")


def test_codes_named_like_tokens_keep_their_own(tmp_path):
    codes = ["<padding>", "<unknown>", "A//bin_1_of_2", "A", "A", 'a"b', "a,b", "x\r\ny", "\x00"]
    train = [(1, n, code, float(n) if code == "A" else None) for n, code in enumerate(codes)]
    vocabulary = store_of(tmp_path, train).vocabulary
    assert len(set(vocabulary.strings)) == len(vocabulary)
    ids, _ = vocabulary.encode(pl.Series(codes), pl.Series([None] * len(codes), dtype=pl.Float32))
    assert [vocabulary.strings[token] for token in ids] == codes
    assert Vocabulary.load(tmp_path / "store").tokens.equals(vocabulary.tokens)


def test_an_event_before_the_birth_has_no_age(tmp_path):
    """A negative age would tell at the prediction time of a birth that lies after it."""
    store = store_of(tmp_path, [(1, 0, "A", None), (1, 5 * DAY, "MEDS_BIRTH", None), (1, 6 * DAY, "A", None)])
    events = store.split("train")
    frame = pl.DataFrame({"subject_id": [1, 1], "prediction_time": pl.Series([0, 6 * DAY]).cast(pl.Datetime("us"))})
    samples = build_samples(events, frame, np.zeros(2, np.int64), max_length=9)
    batch = BatchDataset(events, samples)[np.arange(2)]
    ages = [batch.age_days[row][batch.is_event[row]].tolist() for row in range(2)]
    assert math.isnan(ages[0][0])
    assert math.isnan(ages[1][0])
    assert ages[1][1:] == [0.0, 1.0]


def test_metadata_of_another_dtype_and_a_damaged_page_are_refused(tmp_path):
    store_of(tmp_path, [(1, 0, "A", None)])
    path = tmp_path / "set" / "metadata" / "codes.parquet"
    for column in ({"code": [1, 2]}, {"code": ["A"], "parent_codes": ["B"]}, {"code": ["A"], "description": [["x"]]}):
        pl.DataFrame(column).write_parquet(path)
        with pytest.raises(UserError, match=r"codes\.parquet: column `\w+` has dtype"):
            MedsSource(root=str(tmp_path / "set")).code_metadata()
    path.write_bytes(b"PAR1")
    with refused("codes.parquet", "not a readable"):
        MedsSource(root=str(tmp_path / "set")).code_metadata()


def test_a_lookup_file_that_is_no_utf8_is_refused(tmp_path):
    path = tmp_path / "lookup.csv"
    path.write_bytes(b"code,term\nA,fi\xe8vre\n")
    from ehr_embed.sources.code_texts import read_lookups

    with pytest.raises(UserError, match=r"lookup\.csv: .*code,term"):
        read_lookups([str(path)])
