"""Share the parts of the fuzz tests: numbers of examples, odd datasets and configurations, and plain references."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st

from ehr_embed.core.errors import UserError

FACTOR = float(os.environ.get("EHR_EMBED_FUZZ", "1"))
DAY = 86_400_000_000
YEAR_1, YEAR_9999 = -62_135_596_800_000_000, 253_402_300_799_999_999
SPLITS = ("train", "tuning", "held_out")
_QUIET: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def small(n: int) -> Callable[[Any], Any]:
    """The same few examples every time, for `make test`."""
    return settings(max_examples=n, derandomize=True, database=None, **_QUIET)


def large(n: int) -> Callable[[Any], Any]:
    """New examples every time; a failure prints what repeats it. EHR_EMBED_FUZZ=10 takes ten times as many."""
    return settings(max_examples=max(1, int(n * FACTOR)), print_blob=True, **_QUIET)


def counted(*, is_refused: bool) -> None:
    """Count an event for `--hypothesis-show-statistics`."""
    event("refused" if is_refused else "accepted")


def is_clear(error: UserError) -> None:
    """A refusal reads as one: of some length, and without what only a programmer understands."""
    text = str(error)
    assert len(text) > 20, text
    assert "Traceback" not in text
    assert "object at 0x" not in text


def float32(value: float) -> float:
    """A number as float32 holds it, beyond its range infinite."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


@dataclass
class Dataset:
    """Rows as they are written, shard by shard, and what is wrong with the files beside.

    Attributes:
        shards: (split folder, number) -> rows (subject or None, microseconds or None, code or None, value or None).
        splits: subject -> split; None = the folders alone say it.
        damage: name of what the first train shard suffers when it is written.
    """

    shards: dict[tuple[str, int], list[tuple[Any, Any, Any, Any]]]
    splits: dict[int, str] | None
    damage: str | None = None
    labels: list[tuple[int, int]] = field(default_factory=list)


DAMAGES: dict[str, bool] = {
    # name: whether the file is refused for it
    "time as text": True,
    "time with a zone": True,
    "time in ns": False,
    "time in ms": False,
    "code missing": True,
    "code categorical": False,
    "code as number": True,
    "subject as float": True,
    "subject as int32": False,
    "subject beyond int64": True,
    "value as text": True,
    "value as float64": False,
    "value huge": True,
    "value missing": False,
    "more columns": False,
    "truncated": True,
    "not parquet": True,
}
CODES = st.one_of(
    st.sampled_from(["A", "A", "B", "B", "C", "LAB//x", "MEDS_BIRTH", "MEDS_BIRTH//2", "MEDS_DEATH"]),
    st.sampled_from(
        [
            "<padding>",
            "<unknown>",
            "A//bin_1_of_2",
            "A//bin_2_of_2",
            '"',
            ',"',
            "a,b",
            "\n",
            "a\r\nb",
            " ",
            "//",
            "_",
            "\x00",
        ]
    ),
    st.sampled_from(
        ["null", "NaN", "日本語", "é", "e\u0301", "🩺", "x" * 5000, "'", "\ufeff", "\t", "#", "-1", "\u202e"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6),
)
VALUES = st.one_of(
    st.none(),
    st.none(),
    st.sampled_from([0.0, -0.0, 1.0, 2.0, 1e-45, -1e-40, 3.4e38, -3.4e38, 1e30, 16_777_217.0]),
    st.floats(-100, 100, width=32),
)
TIMES = st.one_of(
    st.none(),
    st.integers(0, 5).map(lambda day: day * DAY),
    st.integers(-20, 20),
    st.sampled_from([-10_000_000_000_000_000, 8_000_000_000_000_000, YEAR_1, YEAR_9999]),  # 1653, 2223
)
IDS = st.one_of(st.integers(0, 30), st.sampled_from([-1, -(2**63), 2**63 - 1, 2**53 + 1]))
BAD_ROWS = st.sampled_from(
    [
        (None, 0, "A", None),
        (5, 0, None, None),
        (5, 0, "", None),
        (5, 0, "A", math.nan),
        (5, 0, "A", math.inf),
        (5, YEAR_9999 + 1, "A", None),
        (5, YEAR_1 - 1, "A", None),
        (5, -(2**63), "A", None),
    ]
)


def _order(event: tuple[Any, Any, Any, Any]) -> tuple[bool, int]:
    return (event[1] is not None, event[1] or 0)


@st.composite
def datasets(draw: st.DrawFn, *, with_damage: bool = True) -> Dataset:
    """Mostly valid: three to eight subjects, ties, static events, odd codes and numbers; about half with one thing wrong."""
    ids = draw(st.lists(IDS, min_size=4, max_size=8, unique=True))
    shards: dict[tuple[str, int], list[Any]] = {(split, 0): [] for split in SPLITS}
    splits = {}
    is_sorted = not with_damage or draw(st.integers(0, 7)) > 0
    labels = []
    for number, subject in enumerate(ids):
        split = SPLITS[number] if number < 3 else draw(st.sampled_from(SPLITS))
        splits[subject] = split
        events = draw(st.lists(st.tuples(st.just(subject), TIMES, CODES, VALUES), min_size=number < 3, max_size=9))
        if events and draw(st.integers(0, 3)) == 0:
            events.append(draw(st.sampled_from(events)))  # a repeated row
        shards.setdefault((split, draw(st.integers(0, 1))), []).extend(
            sorted(events, key=_order) if is_sorted else events
        )
        times = [time for _, time, _, _ in events if time is not None]
        for time in draw(st.lists(st.sampled_from(times), max_size=2, unique=True)) if times else []:
            labels.append((subject, min(YEAR_9999, time + draw(st.sampled_from([0, 0, 1, DAY])))))
    if draw(st.booleans()):
        shards.setdefault(("train", 7), [])  # a shard without rows
    if not with_damage:
        return Dataset(shards, splits, None, labels)
    wrong = draw(st.sampled_from(["nothing"] * 4 + ["row", "files", "files", "two shards", "no split", "folders"]))
    if wrong == "row":
        shards[("train", 0)].append(draw(BAD_ROWS))
        splits[5] = splits.get(5, "train")
    elif wrong == "two shards":
        shards.setdefault(("train", 3), []).append((ids[0], 0, "A", None))
    elif wrong == "no split":
        del splits[ids[draw(st.integers(0, 2))]]
    damage = draw(st.sampled_from(list(DAMAGES))) if wrong == "files" else None
    return Dataset(shards, None if wrong == "folders" else splits, damage, labels)


SCHEMA = {"subject_id": pl.Int64, "time": pl.Int64, "code": pl.String, "numeric_value": pl.Float32}


def write(dataset: Dataset, root: Path) -> Path:
    """The dataset as MEDS files."""
    for (split, number), rows in dataset.shards.items():
        folder = root / "data" / split
        folder.mkdir(parents=True, exist_ok=True)
        values = [(s, t, c, None if v is None else float32(v)) for s, t, c, v in rows]
        frame = pl.DataFrame(values, schema=SCHEMA, orient="row").with_columns(pl.col("time").cast(pl.Datetime("us")))
        is_damaged = dataset.damage is not None and (split, number) == ("train", 0)
        path = folder / f"{number}.parquet"
        if is_damaged:
            frame = damaged(frame, dataset.damage or "")
        frame.write_parquet(path)
        if is_damaged and dataset.damage == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if is_damaged and dataset.damage == "not parquet":
            path.write_bytes(b"subject_id,time,code\n1,2,A\n")
    (root / "metadata").mkdir(exist_ok=True)
    if dataset.splits is not None:
        rows = list(dataset.splits.items())
        splits = pl.DataFrame(rows, schema={"subject_id": pl.Int64, "split": pl.String}, orient="row")
        splits.write_parquet(root / "metadata" / "subject_splits.parquet")
    return root


def damaged(frame: pl.DataFrame, damage: str) -> pl.DataFrame:
    """The frame with one column of another kind; times stay what they are where their unit can hold them."""
    number = pl.col("time").cast(pl.Int64)
    expressions = {
        "time as text": pl.col("time").cast(pl.String),
        "time with a zone": pl.col("time").dt.replace_time_zone("UTC"),
        # A nanosecond before each microsecond, which rounds up to it; only those that nanoseconds can hold.
        "time in ns": pl.when(number.abs() < 9 * 10**15).then(number * 1000 - 1).cast(pl.Datetime("ns")).alias("time"),
        "time in ms": (number // 1000).cast(pl.Datetime("ms")).alias("time"),
        "code categorical": pl.col("code").cast(pl.Categorical),
        "code as number": pl.lit(5).alias("code"),
        "subject as float": pl.col("subject_id").cast(pl.Float64),
        "subject as int32": pl.col("subject_id").cast(pl.Int32, strict=False),
        "subject beyond int64": pl.lit(2**63, pl.UInt64).alias("subject_id"),
        "value as text": pl.lit("high").alias("numeric_value"),
        "value as float64": pl.col("numeric_value").cast(pl.Float64),
        "value huge": pl.lit(1e300).alias("numeric_value"),
        "more columns": pl.lit("x").alias("text_value"),
    }
    if damage in expressions:
        return frame.with_columns(expressions[damage])
    return frame.drop({"code missing": ["code"], "value missing": ["numeric_value"]}.get(damage, []))


def is_valid(dataset: Dataset) -> bool:
    """Return whether MEDS and this project's contract allow the rows, without `damage`, by looking at one row after the other."""
    where: dict[int, tuple[str, int]] = {}
    n_events = dict.fromkeys(SPLITS, 0)
    for shard, rows in dataset.shards.items():
        last: tuple[Any, Any] | None = None
        done: set[int] = set()
        for subject, time, code, value in rows:
            if subject is None or not code or (time is not None and not YEAR_1 <= time <= YEAR_9999):
                return False
            if value is not None and not math.isfinite(float32(value)):
                return False
            if last is None or last[0] != subject:
                if subject in done:
                    return False
                done.add(subject)
            elif _order((0, last[1], 0, 0)) > _order((0, time, 0, 0)):
                return False
            last = (subject, time)
            if where.setdefault(subject, shard) != shard:
                return False
            split = shard[0] if dataset.splits is None else dataset.splits.get(subject)
            if split != shard[0]:
                return False
            n_events[shard[0]] += 1
    return all(n_events.values())


def records(dataset: Dataset) -> dict[int, list[tuple[Any, Any, str, Any]]]:
    """Each subject's events in their order, values as float32."""
    found: dict[int, list[Any]] = {}
    for rows in dataset.shards.values():
        for subject, time, code, value in rows:
            found.setdefault(subject, []).append((subject, time, code, None if value is None else float32(value)))
    return found


@dataclass
class Fit:
    """Return for each code of train how often it occurs, and its numbers, sorted."""

    counts: dict[str, int]
    values: dict[str, list[float]]


def fit(dataset: Dataset) -> Fit:
    counts: dict[str, int] = {}
    values: dict[str, list[float]] = {}
    for (split, _), rows in dataset.shards.items():
        for _, _, code, value in rows if split == "train" else []:
            counts[code] = counts.get(code, 0) + 1
            if value is not None:
                values.setdefault(code, []).append(float32(value))
    return Fit(counts, {code: sorted(numbers) for code, numbers in values.items()})


def token_name(fitted: Fit, code: str, value: float | None, *, min_count: int, n_bins: int) -> str | None:
    """Name of an event's token, None for the unknown one; only for codes whose distinct numbers do not exceed `n_bins`."""
    if code not in fitted.counts:
        return None
    numbers = fitted.values.get(code, [])
    distinct = sorted(set(numbers))
    has_bins = fitted.counts[code] >= min_count and len(numbers) >= min_count and len(distinct) > 1
    if value is None or not has_bins:
        return code
    return f"{code}//bin_{max(1, sum(number <= value for number in distinct))}_of_{len(distinct)}"


def normal(fitted: Fit, code: str, value: float | None) -> float | None:
    """A number in robust standard deviations from the train median, None where there is none."""
    if value is None or code not in fitted.counts:
        return None
    numbers = fitted.values.get(code, [])
    if not numbers:
        return max(-10.0, min(10.0, value))
    low, median, high = (_quantile(numbers, share) for share in (0.25, 0.5, 0.75))
    mean = math.fsum(numbers) / len(numbers)
    deviation = math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / len(numbers))
    scale = (high - low) / 1.349 or deviation or 1.0
    return max(-10.0, min(10.0, (value - median) / scale))


def _quantile(numbers: Sequence[float], share: float) -> float:
    position = share * (len(numbers) - 1)
    below = math.floor(position)
    above = min(below + 1, len(numbers) - 1)
    return numbers[below] + (position - below) * (numbers[above] - numbers[below])


@dataclass
class Seen:
    """Return what a sample may see: events in their order, days of each before the prediction, since the one before it, since the
    first, since birth (None = unknown)."""

    events: list[tuple[Any, Any, str, Any]]
    days: list[float]
    gaps: list[float]
    elapsed: list[float]
    ages: list[float | None]


def seen(events: Sequence[tuple[Any, Any, str, Any]], prediction_time: int, max_length: int) -> Seen:
    """The reference: static events first, then the last timed ones up to and with the prediction time."""
    static = [event for event in events if event[1] is None][:max_length]
    timed = [event for event in events if event[1] is not None and event[1] <= prediction_time]
    room = max_length - len(static)
    timed = timed[len(timed) - min(room, len(timed)) :]
    first = timed[0][1] if timed else prediction_time
    chosen = [*static, *timed]
    times = [first if event[1] is None else event[1] for event in chosen]
    births = [
        event[1]
        for event in events
        if event[1] is not None and (event[2] == "MEDS_BIRTH" or event[2].startswith("MEDS_BIRTH//"))
    ]
    born = min(births) if births else None
    return Seen(
        chosen,
        [(prediction_time - time) / DAY for time in times],
        [0.0, *((after - before) / DAY for before, after in pairwise(times))],
        [(time - times[0]) / DAY for time in times],
        [None if born is None or born > time else (time - born) / DAY for time in times],
    )
