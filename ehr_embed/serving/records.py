"""Check the records of a request, MEDS events in JSON, one by one before any of them is predicted for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ehr_embed.core.errors import UserError
from ehr_embed.data.store import STATIC_TIME

EPOCH = datetime(1970, 1, 1)
MICROSECOND = EPOCH.resolution
TOO_FINE = re.compile(r"[.,]\d{7,}")
MAX_FLOAT32 = float(np.finfo(np.float32).max)
Code = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
Id = Annotated[int, Field(ge=-(2**63), lt=2**63)]
CODE_SCHEMA: dict[str, Any] = {"code": pl.String, "description": pl.String, "parent_codes": pl.List(pl.String)}


class Given(BaseModel):
    """Base class: other keys than the declared ones are refused, since a misspelt one would be left out without a word."""

    model_config = ConfigDict(extra="forbid", strict=True)


class GivenEvent(Given):
    """One event of a record, with the columns of MEDS."""

    code: Code
    time: str | None = Field(None, description="ISO 8601 without a time zone; null = static")
    numeric_value: Annotated[float, Field(allow_inf_nan=False)] | None = None
    description: Annotated[str, StringConstraints(max_length=2000)] | None = Field(
        None, description="the code's text, by which a code that the run never saw is read"
    )


class GivenRecord(Given):
    """One record, and the time at which to predict."""

    events: list[GivenEvent]
    prediction_time: str | None = Field(
        None, description="events after it are not seen; null = the time of the last event"
    )
    subject_id: Id | str | None = Field(None, description="returned as it is")


class GivenRequest(Given):
    """The body of a request: several records, or the keys of one record in place of `records`."""

    records: list[GivenRecord]
    attributions: bool = Field(False, description="whether to say what each event contributed")
    target: str | None = Field(None, description="the class whose log-odds are attributed; null = the last one")


@dataclass(frozen=True)
class Record:
    """A record whose events are those that are visible at its prediction time, in order of time, static ones first.

    Attributes:
        subject_id: as it was given.
        prediction_time: microseconds since 1970-01-01.
        codes: (n,) code of each event.
        times: (n,) int64 microseconds since 1970-01-01, `STATIC_TIME` for static events.
        values: (n,) float32, NaN = no number.
        descriptions: code -> its text, for codes that came with one.
        n_given: number of events in the request.
    """

    subject_id: int | str | None
    prediction_time: int
    codes: list[str]
    times: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    descriptions: dict[str, str] = field(default_factory=dict)
    n_given: int = 0

    @property
    def when(self) -> str:
        """Return the prediction time in ISO 8601."""
        return (EPOCH + self.prediction_time * MICROSECOND).isoformat()


def read_request(body: bytes, *, max_records: int, max_events: int) -> tuple[GivenRequest, list[Record]]:
    """Return a request and its records.

    Args:
        body: JSON.
        max_records: largest number of records.
        max_events: largest number of events of a record.

    Raises:
        UserError: the body is no such request; the message names the first key that is wrong, but no value.
    """
    try:
        try:
            request = GivenRequest.model_validate_json(body)
        except ValidationError as error:
            if not _is_one_record(error):
                raise
            request = _of_one_record(body)
    except ValidationError as error:
        raise UserError(_told(error)) from None
    if not request.records:
        raise UserError("records: expected at least one record.")
    if len(request.records) > max_records:
        raise UserError(
            f"records: expected at most {max_records} records, got {len(request.records)}. Send several requests."
        )
    found = []
    for number, given in enumerate(request.records):
        where = f"records[{number}]"
        if len(given.events) > max_events:
            raise UserError(
                f"{where}.events: expected at most {max_events:,} events, got {len(given.events):,}. The model reads the last ones "
                "only: leave the oldest out."
            )
        found.append(read_record(given, where))
    return request, found


class _GivenLoneRecord(GivenRecord):
    attributions: bool = False
    target: str | None = None


def _is_one_record(error: ValidationError) -> bool:
    missing = {tuple(one["loc"]) for one in error.errors(include_url=False) if one["type"] == "missing"}
    return ("records",) in missing


def _of_one_record(body: bytes) -> GivenRequest:
    lone = _GivenLoneRecord.model_validate_json(body)
    record = GivenRecord(events=lone.events, prediction_time=lone.prediction_time, subject_id=lone.subject_id)
    return GivenRequest(records=[record], attributions=lone.attributions, target=lone.target)


def read_record(given: GivenRecord, where: str = "record") -> Record:
    """Return the part of a record that is visible at its prediction time.

    Args:
        given: as it came.
        where: its place in the request, for messages.

    Raises:
        UserError: a time cannot be read, a number is too large, a code has two descriptions, or no event is visible.

    >>> events = [GivenEvent(code="B", time="2020-01-02"), GivenEvent(code="A"), GivenEvent(code="C", time="2020-01-03")]
    >>> record = read_record(GivenRecord(events=events, prediction_time="2020-01-02T12:00"))
    >>> record.codes, record.when, record.n_given
    (['A', 'B'], '2020-01-02T12:00:00', 3)
    """
    events = given.events
    times = np.array(
        [
            STATIC_TIME if event.time is None else microseconds_of(event.time, f"{where}.events[{number}].time")
            for number, event in enumerate(events)
        ],
        np.int64,
    )
    is_timed = times != STATIC_TIME
    if given.prediction_time is not None:
        until = microseconds_of(given.prediction_time, f"{where}.prediction_time")
    elif is_timed.any():
        until = int(times.max())
    else:
        raise UserError(
            f"{where}: expected a prediction_time, or an event with a time, at the last of which is predicted; found neither."
        )
    visible = np.flatnonzero(times <= until)
    if not len(visible):
        raise UserError(
            f"{where}: none of its {len(events)} events is at or before the prediction time {given.prediction_time or ''}, so "
            "there is nothing to predict from."
        )
    if is_timed.any() and not is_timed[visible].any():
        raise UserError(
            f"{where}.prediction_time={given.prediction_time} lies before every timed event, so that nothing but static events is "
            "seen. Mend the time, or leave the later events out."
        )
    order = visible[np.argsort(times[visible], kind="stable")]
    chosen = [events[index] for index in order.tolist()]
    for number in order.tolist():
        if abs(events[number].numeric_value or 0.0) > MAX_FLOAT32:
            raise UserError(f"{where}.events[{number}].numeric_value does not fit float32, the dtype of MEDS 0.4.")
    return Record(
        subject_id=given.subject_id,
        prediction_time=until,
        codes=[event.code for event in chosen],
        times=times[order],
        values=np.array([np.nan if e.numeric_value is None else e.numeric_value for e in chosen], np.float32),
        descriptions=_descriptions(chosen, where),
        n_given=len(events),
    )


def _descriptions(events: Iterable[GivenEvent], where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for event in events:
        text = (event.description or "").strip()
        if text and found.setdefault(event.code, text) != text:
            raise UserError(
                f"{where}: an event's code has two descriptions, of which only one can be meant. Give one per code."
            )
    return found


def microseconds_of(text: str, where: str) -> int:
    """Return the microseconds from 1970-01-01 to a time.

    Args:
        text: ISO 8601 without a time zone.
        where: the key, for messages.

    Raises:
        UserError: the text is no such time.

    >>> microseconds_of("1970-01-01T00:00:01.5", "time")
    1500000
    >>> microseconds_of("2020-01-01T00:00:00Z", "time")
    Traceback (most recent call last):
    ehr_embed.core.errors.UserError: time: expected a time without a time zone, as MEDS has it: that of the place of care.
    """
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{where}: expected a time as 2020-01-31 or 2020-01-31T12:00:00.") from None
    if time.tzinfo is not None:
        raise UserError(f"{where}: expected a time without a time zone, as MEDS has it: that of the place of care.")
    if TOO_FINE.search(text):
        raise UserError(f"{where}: expected a time of whole microseconds, as MEDS has it.")
    return (time - EPOCH) // MICROSECOND


def _told(error: ValidationError) -> str:
    """Return in a sentence what is wrong with a request, with the key and without the value."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    first = problems[0]
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]]
    where = "".join(parts).lstrip(".") or "the body"
    more = f" ({len(problems) - 1} more such problems)" if len(problems) > 1 else ""
    return f"{where}: {first['msg'][:200]}{more}. Expected records of events as MEDS has them; /openapi.json says all keys."


class RecordsSource:
    """Source of the events of several records, in memory; the number of a record is its subject's id.

    Args:
        records: the records.
        text_of: code -> description.
    """

    writes = False
    name = "request"
    labels_dir = Path()
    shards = (Path("request"),)

    def __init__(self, records: list[Record], text_of: dict[str, str]) -> None:
        self._records, self._text_of = records, text_of

    def read(self, shard: Path) -> pl.DataFrame:
        """Return the events of all records."""
        times = pl.Series(np.concatenate([record.times for record in self._records]))
        values = pl.Series(np.concatenate([record.values for record in self._records]))
        return pl.DataFrame(
            {
                "subject_id": np.repeat(np.arange(len(self._records)), [len(record.times) for record in self._records]),
                "time": times.set(times == STATIC_TIME, None).cast(pl.Datetime("us")),
                "code": pl.Series([code for record in self._records for code in record.codes], dtype=pl.String),
                "numeric_value": values.fill_nan(None),
            }
        )

    @property
    def prediction_times(self) -> pl.DataFrame:
        """Return one row per record: subject_id and prediction_time."""
        times = pl.Series([record.prediction_time for record in self._records], dtype=pl.Int64)
        return pl.DataFrame(
            {"subject_id": np.arange(len(self._records)), "prediction_time": times.cast(pl.Datetime("us"))}
        )

    def code_metadata(self) -> pl.DataFrame:
        """Return the descriptions that came with the events."""
        rows = [(code, text, None) for code, text in self._text_of.items()]
        return pl.DataFrame(rows, schema=CODE_SCHEMA, orient="row")

    def fingerprint(self) -> dict[str, Any]:
        """Return nothing: a request is read once."""
        return {}
