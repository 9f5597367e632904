"""Name the outcomes of a time-to-event task: sets of events, from the configuration or from a definition file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.data.event_set import EventSet
from ehr_embed.data.store import MICROSECONDS_PER_DAY, STATIC_TIME, SplitEvents
from ehr_embed.data.vocabulary import FIRST_TOKEN, Vocabulary

AUTO = "auto"
KEYS = tuple(EventSet.__dataclass_fields__)


def named_sets(outcomes: str | Mapping[str, Any]) -> dict[str, EventSet]:
    """Return the event set of each named outcome.

    Args:
        outcomes: name -> keys of `EventSet` or the path of a definition file; or the path of a YAML file that holds such a
            mapping, or the predicates of an ACES configuration.

    Raises:
        UserError: there is no outcome, an outcome has no key or an unknown one, or a file is missing or has another form.

    >>> named_sets({"death": {"codes": ["MEDS_DEATH"]}})["death"].codes
    ('MEDS_DEATH',)
    """
    where = "task.outcomes"
    if isinstance(outcomes, str):
        where, outcomes = outcomes, _read(outcomes)
    if not outcomes:
        raise UserError(
            f"{where}: expected one outcome or more, such as task.outcomes={{death: {{codes: [MEDS_DEATH]}}}}, or "
            "task.outcomes=auto to pretrain on every frequent code"
        )
    return {str(name): _event_set(f"{where}.{name}", keys) for name, keys in outcomes.items()}


def _event_set(where: str, keys: Any) -> EventSet:
    if isinstance(keys, str):
        return EventSet.read(keys)
    if not isinstance(keys, Mapping) or not keys:
        raise UserError(f"{where}={keys}: expected one or more of {', '.join(KEYS)}, or the path of a definition file.")
    for key in keys:
        if key not in KEYS:
            raise unknown_name(f"key of {where}", key, KEYS)
    return EventSet(**keys)


def _read(path: str) -> dict[str, Any]:
    """Read the outcomes of a YAML file: a mapping of names, one event set, or the `predicates` of an ACES configuration."""
    if not Path(path).expanduser().is_file():
        raise UserError(
            f"task.outcomes={path}: expected auto, outcomes by name such as {{death: {{codes: [MEDS_DEATH]}}}}, or a YAML file "
            "with them; there is no such file"
        )
    try:
        found: Any = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected outcomes by name, got {type(found).__name__}.")
    if "predicates" in found:
        return _aces(path, found["predicates"])
    return {Path(path).stem: found} if set(found) <= set(KEYS) else found


def _aces(path: str, predicates: Any) -> dict[str, Any]:
    """Return the plain predicates of an ACES configuration (code, regex, any) as event sets; others are refused."""
    sets: dict[str, Any] = {}
    if not isinstance(predicates, dict):
        raise UserError(f"{path}: predicates: expected a mapping, got {type(predicates).__name__}.")
    for name, predicate in predicates.items():
        code = predicate.get("code") if isinstance(predicate, dict) and set(predicate) == {"code"} else None
        if isinstance(code, str):
            sets[name] = {"codes": [code]}
        elif isinstance(code, dict) and set(code) == {"any"}:
            sets[name] = {"codes": list(code["any"])}
        elif isinstance(code, dict) and set(code) == {"regex"}:
            sets[name] = {"code_pattern": str(code["regex"])}
        else:
            raise UserError(
                f"{path}: predicate {name}={predicate}: expected code: CODE, code: {{any: [...]}} or code: {{regex: ...}}; an "
                "expression or a range of values is no set of codes. Write the outcome out: codes: [CODE, CODE]"
            )
    return sets


def tokens_by_name(sets: Mapping[str, EventSet], vocabulary: Vocabulary) -> dict[str, list[int]]:
    """Return the token ids of each outcome.

    Raises:
        UserError: no token of the vocabulary is in an outcome, so it could never be seen.
    """
    found = {name: list(event_set.tokens(vocabulary)) for name, event_set in sets.items()}
    for name, tokens in found.items():
        if not tokens:
            raise UserError(
                f"task.outcomes.{name}: no event of the vocabulary is in {sets[name]}, so the outcome could never be seen. "
                "vocabulary/vocab.csv in the run's folder lists the codes and texts. Type: task.outcomes={NAME: {text_pattern: "
                "REGEX}} with a pattern that occurs there"
            )
    return found


def token_log_rates(events: SplitEvents, n_tokens: int) -> npt.NDArray[np.float64]:
    """Return the log of each token's timed events per day of record, (V,); half an event is added, so that none is infinite."""
    times = np.asarray(events.times)
    is_timed = times != STATIC_TIME
    counts = np.bincount(np.asarray(events.token_ids)[is_timed], minlength=n_tokens).astype(np.float64)
    counts[:FIRST_TOKEN] = 0
    first, last = events.offsets[:-1], events.offsets[1:] - 1
    row = np.repeat(np.arange(len(first)), np.diff(events.offsets))
    first_time = np.full(len(first), np.iinfo(np.int64).max)
    np.minimum.at(first_time, row[is_timed], times[is_timed])
    has_time = times[last] != STATIC_TIME
    days = ((times[last] - first_time)[has_time] / MICROSECONDS_PER_DAY).sum()
    return np.log((counts + 0.5) / max(float(days), 1.0))
