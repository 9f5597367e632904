"""The one exception users are meant to see, and the wording of its commonest case."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake the user can mend: its message says what was expected, what arrived, why it matters
    and which command to type next. The command-line entry points print it without a traceback."""


def unknown_name(kind: str, name: object, valid: Iterable[object], remedy: str = "") -> UserError:
    """A `UserError` for a name that is not among the valid ones.

    >>> print(unknown_name("label set", "mortalty", ["mortality", "readmission"]))
    unknown label set 'mortalty': did you mean 'mortality'? Valid: mortality, readmission.
    """
    names = sorted(str(item) for item in valid)
    close = get_close_matches(str(name), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    listing = ", ".join(names) if names else "(none)"
    return UserError(f"unknown {kind} {str(name)!r}: {hint}Valid: {listing}.{' ' + remedy if remedy else ''}")
