"""Define sets of events by codes or patterns, such as the outcomes for which trajectories are generated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from meds import death_code

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.data.vocabulary import FIRST_TOKEN, Vocabulary


@dataclass(frozen=True)
class EventSet:
    """Set of the events with one of `codes`, or whose code or text matches a pattern by Python's `re.search`.

    Attributes:
        codes: codes as in the data; events with any value of such a code belong to the set.
        code_pattern: regular expression for the code.
        text_pattern: regular expression for the code's text; case is ignored.
    """

    codes: Sequence[str] = ()
    code_pattern: str | None = None
    text_pattern: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.codes, str):
            raise UserError(f"codes={self.codes}: expected a list, in brackets: [{self.codes}].")
        object.__setattr__(self, "codes", tuple(self.codes))  # so that sets made from a list and from a tuple are equal
        for name in ("code_pattern", "text_pattern"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise UserError(f"{name}={getattr(self, name)!r} is not a regular expression: {error}.") from error

    @classmethod
    def given(
        cls,
        task: str,
        *,
        codes: Sequence[str],
        code_pattern: str | None,
        text_pattern: str | None,
        definition: str | None,
        else_type: str = "",
    ) -> EventSet:
        """Return the set that a task's keys give, or that of the file `definition`.

        Args:
            task: name of the task, for the message.
            codes, code_pattern, text_pattern: the set.
            definition: YAML file that holds these keys instead; see `read`.
            else_type: further remedy at the end of the message.

        Raises:
            UserError: neither is given, or both.
        """
        inline = cls(codes=codes, code_pattern=code_pattern, text_pattern=text_pattern)
        if (inline != cls()) == (definition is not None):
            raise UserError(
                f"task={task} needs one event set. Type: task.codes=[CODE,CODE], task.code_pattern=REGEX, "
                f"task.text_pattern=REGEX, or task.definition=FILE.yaml{else_type}"
            )
        return inline if definition is None else cls.read(definition)

    @classmethod
    def read(cls, path: str | Path) -> EventSet:
        """Read a set from a YAML file with the keys codes, code_pattern, text_pattern.

        Raises:
            UserError: the file is missing, is no mapping, or has other keys.
        """
        if not Path(path).is_file():
            raise UserError(
                f"{path}: no such label definition. Expected a YAML file with codes, code_pattern or text_pattern."
            )
        try:
            found: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not valid YAML: {error}.") from error
        valid = tuple(cls.__dataclass_fields__)
        if not isinstance(found, dict):
            raise UserError(f"{path}: expected a mapping with {', '.join(valid)}, got {type(found).__name__}.")
        for key in found:
            if key not in valid:
                raise unknown_name(f"key of {path}", key, valid)
        return cls(**found)

    def tokens(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """Return the token ids of the set's events, those of all value bins of a code included.

        Raises:
            UserError: a code has no token. Only MEDS' code of death may have none, since not every dataset has deaths.
        """
        n = len(vocabulary) - FIRST_TOKEN
        code_of = vocabulary.decode(np.arange(FIRST_TOKEN, len(vocabulary)), np.full(n, np.nan, np.float32))["code"]
        wanted = set(self.codes)
        if absent := sorted(wanted - set(code_of) - {death_code}):
            raise UserError(
                f"code {absent[0]} and {len(absent) - 1} more have no token: train does not have them, or so rarely that they "
                "were folded into their parent. The run's vocabulary/vocab.csv lists the codes; nothing would ever match these."
            )
        found = []
        for token, (code, text) in enumerate(zip(code_of, vocabulary.texts[FIRST_TOKEN:], strict=True), FIRST_TOKEN):
            by_code = self.code_pattern is not None and re.search(self.code_pattern, code)
            by_text = self.text_pattern is not None and re.search(self.text_pattern, text, re.IGNORECASE)
            if code in wanted or by_code or by_text:
                found.append(token)
        return tuple(found)
