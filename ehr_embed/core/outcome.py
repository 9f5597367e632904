"""The outcome of a job of a multirun, which the process that ran the job writes into the job's folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import read_json, write_json
from ehr_embed.core.secrets import masked

OUTCOME = "outcome.json"
"""Name of the file in a job's folder that says how the job of a multirun ended."""
Row = dict[str, Any]
"""One run: run, state, objective; overrides by key; `<split>/<metric>` with /low and /high; seconds, events_per_s, ..."""
MAX_MESSAGE_LENGTH = 1000  # characters; a text field of Optuna's SQL storage holds 2048


@dataclass
class Outcome:
    """The end of a job.

    Attributes:
        state: `finished`, `pruned` or `failed`.
        values: objectives that the job returned, one per direction; None if it returned nothing.
        error: message of a failed job.
        seconds: duration of the job.
        overrides: overrides of the job, with secrets masked.
        results: metrics and facts of `metrics.json` by column name.
    """

    state: Literal["finished", "pruned", "failed"]
    values: list[float] | None = None
    error: str | None = None
    seconds: float | None = None
    overrides: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)


def outcome_of(returned: Any, *, seconds: float, overrides: Sequence[str]) -> Outcome:
    """Return the outcome of a job from its return value (a number, several numbers or None) or the exception it raised.

    >>> outcome_of(0.5, seconds=1.0, overrides=[]).values, outcome_of(float("nan"), seconds=1.0, overrides=[]).error
    ([0.5], 'the objective is nan')
    """
    import optuna  # here, because most readers of outcomes do not need it

    common: dict[str, Any] = {"seconds": seconds, "overrides": [masked(line) for line in overrides]}
    if isinstance(returned, optuna.TrialPruned):
        return Outcome("pruned", **common)
    if isinstance(returned, BaseException):
        return Outcome("failed", error=message_of(returned), **common)
    if returned is None:
        return Outcome("finished", **common)
    items = list(returned) if isinstance(returned, Sequence) and not isinstance(returned, str) else [returned]
    try:
        values = [float(item) for item in items]
    except (TypeError, ValueError):
        return Outcome("failed", error=f"the objective is {returned!r}, expected a number or several", **common)
    bad = [value for value in values if not math.isfinite(value)]
    if bad:
        return Outcome("failed", error=f"the objective is {bad[0]}", **common)
    return Outcome("finished", values, **common)


def message_of(error: BaseException) -> str:
    """Return the message of an exception with secrets masked; other errors than `UserError` begin with their type.

    >>> message_of(ValueError("bad")), message_of(UserError("do this"))
    ('ValueError: bad', 'do this')
    """
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return masked(text)[:MAX_MESSAGE_LENGTH]


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write `outcome.json` into the job's folder atomically."""
    write_json(folder / OUTCOME, asdict(outcome))


def read_outcome(folder: Path) -> Outcome | None:
    """Return the outcome in a job's folder; None if the job was killed before it wrote one."""
    path = folder / OUTCOME
    return Outcome(**read_json(path)) if path.exists() else None


def objective_columns(values: Sequence[float | None]) -> Row:
    """Return the column `objective`, or with several values the columns `objective_0`, `objective_1`, ..."""
    if len(values) == 1:
        return {"objective": values[0]}
    return {f"objective_{index}": value for index, value in enumerate(values)}


def split_overrides(overrides: Sequence[str]) -> dict[str, str]:
    """Return the key and the value of each override that sets a value.

    >>> split_overrides(["+model.x=1", "task.labels=[a,b]", "~data"])
    {'model.x': '1', 'task.labels': '[a,b]'}
    """
    pairs = (line.lstrip("+").partition("=") for line in overrides if "=" in line)
    return {key: value for key, _, value in pairs}
