"""Odd label files: the samples a plain reference makes of them, or a refusal in our own words."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehr_embed.core.errors import UserError
from ehr_embed.data.labels import read_labels
from ehr_embed.data.store import EventStore, build_store
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.sources.meds import MedsSource
from ehr_embed.tasks.classification import Classification
from tests.helpers import fuzz
from tests.helpers.fuzz import DAY, large, small
from tests.helpers.refusals import refused
from tests.helpers.small_meds import write_meds

START = 18_262 * DAY
N = 6
SUBJECTS = {split: [100 * number + s for s in range(N)] for number, split in enumerate(fuzz.SPLITS)}
Row = tuple[int | None, int | None, Any]
"""Subject, microseconds, value."""

# Kinds of damage to the rows, and whether each is refused.
ROW_DAMAGES: dict[str, bool] = {
    "unknown subject": False,
    "only unknown subjects": True,
    "repeated row": True,
    "two labels at a time": True,
    "null subject": True,
    "null time": True,
    "null value": True,
    "before the first event": True,
    "at the first event": False,
    "a microsecond before the first event": True,
    "year 10000": True,
    "least time": True,
    "one class in train": True,
    "one class in held_out": True,
    "no labels in tuning": True,
    "no rows": True,
    "several times": False,
}
FILE_DAMAGES: dict[str, bool] = {
    "time as text": True,
    "time as date": True,
    "time with a zone": True,
    "time in ns": False,
    "time in ms": False,
    "subject as text": True,
    "subject as float": True,
    "subject as int32": False,
    "subject beyond int64": True,
    "subject missing": True,
    "value missing": True,
    "value as float": True,
    "value of another kind": True,
    "two values": True,
    "an empty column beside": False,
    "more columns": False,
    "an empty file beside": False,
    "an unreadable file beside": True,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> EventStore:
    """Six subjects a split, events on days 0 to 4."""
    folder = tmp_path_factory.mktemp("labels")
    splits = {split: [(s, float(d), "A", None) for s in own for d in range(5)] for split, own in SUBJECTS.items()}
    return build_store(folder / "store", MedsSource(root=str(write_meds(folder / "set", splits))), VocabularySettings())


@st.composite
def label_rows(draw: st.DrawFn) -> tuple[str, list[Row], list[str]]:
    """Value column, rows, and what was done to them; two classes in every split unless that is undone."""
    column = draw(st.sampled_from(["boolean_value", "integer_value", "categorical_value"]))
    pair = {
        "boolean_value": [False, True],
        "integer_value": draw(st.sampled_from([[0, 1], [-3, 10], [2, 2**40]])),
        "categorical_value": draw(st.sampled_from([["no", "yes"], ["", "é\n"], ["$a$", "a,b"]])),
    }[column]
    days = st.integers(0, 6).map(lambda day: START + day * DAY + 1)
    rows: list[Row] = [
        (subject, draw(days), pair[number % 2]) for own in SUBJECTS.values() for number, subject in enumerate(own)
    ]
    damages = draw(st.lists(st.sampled_from(list(ROW_DAMAGES)), max_size=2, unique=True))
    for damage in damages:
        rows = change_rows(rows, damage, pair)
    return column, draw(st.permutations(rows)), damages


def change_rows(rows: list[Row], damage: str, pair: list[Any]) -> list[Row]:
    first = (0, START, pair[0])
    added: dict[str, list[Row]] = {
        "unknown subject": [(7777, START, pair[0])],
        "repeated row": rows[:1],
        "two labels at a time": [(rows[0][0], rows[0][1], pair[1] if rows[0][2] == pair[0] else pair[0])]
        if rows
        else [],
        "null subject": [(None, START, pair[0])],
        "null time": [(0, None, pair[0])],
        "null value": [(0, START + 7, None)],
        "before the first event": [(0, START - DAY, pair[0])],
        "a microsecond before the first event": [(0, START - 1, pair[0])],
        "at the first event": [first],
        "year 10000": [(0, fuzz.YEAR_9999 + 1, pair[0])],
        "least time": [(0, -(2**63), pair[0])],
        "several times": [(1, START + 9 * DAY, pair[1]), (1, START + 10 * DAY, pair[0])],
    }
    changed: dict[str, Callable[[], list[Row]]] = {
        "only unknown subjects": lambda: [(None if s is None else s + 5000, t, v) for s, t, v in rows],
        "one class in train": lambda: [(s, t, pair[0] if s in SUBJECTS["train"] else v) for s, t, v in rows],
        "one class in held_out": lambda: [(s, t, pair[1] if s in SUBJECTS["held_out"] else v) for s, t, v in rows],
        "no labels in tuning": lambda: [row for row in rows if row[0] not in SUBJECTS["tuning"]],
        "no rows": list,
    }
    return changed[damage]() if damage in changed else [*rows, *added[damage]]


def write(folder: Path, column: str, rows: list[Row], damage: str | None) -> Path:
    dtype = {"boolean_value": pl.Boolean, "integer_value": pl.Int64, "categorical_value": pl.String}[column]
    schema: dict[str, Any] = {"subject_id": pl.Int64, "prediction_time": pl.Int64, column: dtype}
    frame = pl.DataFrame(rows, schema=schema, orient="row").with_columns(
        pl.col("prediction_time").cast(pl.Datetime("us"))
    )
    folder.mkdir()
    number = pl.col("prediction_time").cast(pl.Int64)
    other = "categorical_value" if column != "categorical_value" else "boolean_value"
    expressions: dict[str, pl.Expr] = {
        "time as text": pl.lit("2020-01-01").alias("prediction_time"),
        "time as date": pl.lit(1).cast(pl.Date).alias("prediction_time"),
        "time with a zone": pl.col("prediction_time").dt.replace_time_zone("UTC"),
        # Some nanoseconds after each microsecond: rounded up, a time would show an event that follows it.
        "time in ns": pl.when(number.abs() < 9 * 10**15)
        .then(number * 1000 + 999)
        .cast(pl.Datetime("ns"))
        .alias("prediction_time"),
        "time in ms": (number // 1000).cast(pl.Datetime("ms")).alias("prediction_time"),
        "subject as text": pl.col("subject_id").cast(pl.String),
        "subject as float": pl.col("subject_id").cast(pl.Float64),
        "subject as int32": pl.col("subject_id").cast(pl.Int32),
        "subject beyond int64": pl.lit(2**63, pl.UInt64).alias("subject_id"),
        "value as float": pl.lit(0.5).alias(column),
        "value of another kind": pl.lit(3 if column == "categorical_value" else "3").alias(column),
        "two values": pl.lit("x" if other == "categorical_value" else True).alias(other),
        "an empty column beside": pl.lit(None, pl.String if other == "categorical_value" else pl.Boolean).alias(other),
        "more columns": pl.lit(1.5).alias("score"),
    }
    if damage in expressions:
        frame = frame.with_columns(expressions[damage])
    frame.drop({"subject missing": ["subject_id"], "value missing": [column]}.get(damage or "", [])).write_parquet(
        folder / "0.parquet"
    )
    if damage == "an empty file beside":
        frame.clear().write_parquet(folder / "1.parquet")
    if damage == "an unreadable file beside":
        (folder / "1.parquet").write_bytes(b"PAR1 PAR1")
    return folder


def is_valid(rows: list[Row]) -> bool:
    """The reference: row by row, then split by split."""
    if any(part is None for row in rows for part in row):
        return False
    if len({row[:2] for row in rows}) < len(rows):
        return False
    if any(not fuzz.YEAR_1 <= row[1] <= fuzz.YEAR_9999 for row in rows):  # type: ignore[operator]
        return False
    classes = {split: {row[2] for row in rows if row[0] in own} for split, own in SUBJECTS.items()}
    known = [row for row in rows if any(row[0] in own for own in SUBJECTS.values())]
    return all(len(found) == 2 for found in classes.values()) and all(row[1] >= START for row in known)  # type: ignore[operator]


def check(store: EventStore, case: tuple[str, list[Row], list[str]], damage: str | None) -> None:
    column, rows, damages = case
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "set", column, rows, damage)
        task = Classification(labels=str(path))
        refusal = None
        try:
            task.setup(store, Path(folder), 3)
        except UserError as error:
            fuzz.is_clear(error)
            refusal = error
    fuzz.counted(is_refused=refusal is not None)
    is_bad = FILE_DAMAGES.get(damage or "", False)
    if damage in ("time in ns", "time in ms"):
        # Nanoseconds cannot hold every time, and milliseconds take the microsecond after a day's begin away.
        times = [None if t is None else (t // 1000 * 1000 if damage == "time in ms" else t) for _, t, _ in rows]
        if damage == "time in ns" and any(t is not None and abs(t) >= 9 * 10**15 for t in times):
            assert refusal is not None
            return
        rows = [(s, t, v) for (s, _, v), t in zip(rows, times, strict=True)]
    assert (refusal is None) == (is_valid(rows) and not is_bad), (damages, damage, refusal)
    if refusal is not None:
        return
    for split, own in SUBJECTS.items():
        samples = task.samples[split]
        found = [
            (int(s), int(t), task.class_names[int(label)], int(n))
            for s, t, label, n in zip(
                samples.subject_ids, samples.prediction_times, samples.labels, samples.lengths, strict=True
            )
        ]
        expected = [
            (
                s,
                t,
                str(v).lower() if isinstance(v, bool) else str(v),
                min(3, sum(START + d * DAY <= t for d in range(5))),
            )
            for s, t, v in sorted((row for row in rows if row[0] in own), key=lambda row: (row[0], row[1]))
        ]
        assert found == expected


@small(60)
@given(case=label_rows(), damage=st.sampled_from([None, None, None, *FILE_DAMAGES]))
def test_labels_are_those_of_the_reference_or_refused(store, case, damage):
    check(store, case, damage)


@pytest.mark.slow
@large(2000)
@given(case=label_rows(), damage=st.sampled_from([None, None, None, *FILE_DAMAGES]))
def test_labels_are_those_of_the_reference_or_refused_at_length(store, case, damage):
    check(store, case, damage)


@pytest.mark.parametrize("damage", [name for name, is_bad in FILE_DAMAGES.items() if is_bad])
def test_each_wrong_file_is_refused_by_name(tmp_path, damage):
    rows: list[Row] = [(0, START, "a"), (1, START, "b")]
    path = write(tmp_path / "set", "categorical_value", rows, damage)
    with pytest.raises(UserError, match=r"set/\d\.parquet"):
        read_labels(str(path), tmp_path)


def test_a_prediction_time_beyond_the_calendar_is_refused(store, tmp_path):
    """Python cannot print the year 10000, so that the refusal itself failed."""
    path = write(tmp_path / "set", "boolean_value", [(0, fuzz.YEAR_9999 + 1, True)], None)
    with refused("row 0", "prediction_time", "1 to 9999", "1 such rows"):
        read_labels(str(path), tmp_path)


def test_an_empty_file_among_others_is_no_mistake(tmp_path):
    path = write(tmp_path / "set", "boolean_value", [(0, START, True)], "an empty file beside")
    assert len(read_labels(str(path), tmp_path).frame) == 1
    (path / "0.parquet").unlink()
    with pytest.raises(UserError, match=r"set: .*label files .*Type: python train\.py \.\.\. task\.labels=NAME"):
        read_labels(str(path), tmp_path)
