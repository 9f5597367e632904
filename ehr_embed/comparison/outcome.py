"""How a job of a multirun ended, left in its folder by whichever process ran it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import read_json, write_json
from ehr_embed.core.secrets import masked
from ehr_embed.run_folder.layout import OUTCOME

MAX_MESSAGE_LENGTH = 1000  # a storage's text field holds 2048


@dataclass
class Outcome:
    """State `finished`, `pruned` or `failed`; values returned, one an objective; the overrides the job had."""

    state: Literal["finished", "pruned", "failed"]
    values: list[float] | None = None
    error: str | None = None
    seconds: float | None = None
    overrides: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)


def outcome_of(returned: Any, *, seconds: float, overrides: Sequence[str]) -> Outcome:
    """The outcome of a job that returned a value, several, nothing, or raised.

    >>> outcome_of(0.5, seconds=1.0, overrides=[]).values, outcome_of(float("nan"), seconds=1.0, overrides=[]).error
    ([0.5], 'the objective is nan')
    """
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
    """An exception in one text: ours as it is, others with their type.

    >>> message_of(ValueError("bad")), message_of(UserError("do this"))
    ('ValueError: bad', 'do this')
    """
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return masked(text)[:MAX_MESSAGE_LENGTH]


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Leave `outcome.json` in the job's folder, atomically."""
    write_json(folder / OUTCOME, asdict(outcome))


def read_outcome(folder: Path) -> Outcome | None:
    """What the job left; None if it did not come to its end."""
    path = folder / OUTCOME
    return Outcome(**read_json(path)) if path.exists() else None
