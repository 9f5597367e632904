"""Define `UserError`, the one exception that users are meant to see, and the wording of its commonest cases."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from ehr_embed.core.programs import as_typed


class UserError(Exception):
    """Report a mistake that the user can mend.

    The message says what was expected, what arrived, why that matters and which command to type next. The command-line
    entry points print it without a traceback. Commands in a message are written as a checkout has them, `python train.py`; where
    the package was installed without one, or the console script was started, the message names `ehr-embed train` in their place.
    """

    def __str__(self) -> str:
        """Return the message with its commands as they are typed here."""
        return as_typed(super().__str__())


def check_range(key: str, value: float, least: float, most: float | None = None, *, remedy: str = "") -> None:
    """Refuse a number outside [least, most].

    Raises:
        UserError: names the key and the range.

    >>> check_range("model.n_layers", 0, 1, 1024)
    Traceback (most recent call last):
    ehr_embed.core.errors.UserError: model.n_layers=0: expected 1 to 1024.
    """
    if not (least <= value and (most is None or value <= most)):
        expected = f"{least} or more" if most is None else f"{least} to {most}"
        raise UserError(f"{key}={value}: expected {expected}.{' ' + remedy if remedy else ''}")


def unknown_name(kind: str, name: object, valid: Iterable[object], remedy: str = "") -> UserError:
    """Return a `UserError` for a name that is not among the valid ones; its message lists them.

    >>> print(unknown_name("label set", "mortalty", ["mortality", "readmission"]))
    unknown label set 'mortalty': did you mean 'mortality'? Valid: mortality, readmission.
    """
    names = sorted(str(item) for item in valid)
    close = get_close_matches(str(name), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    listing = ", ".join(names) if names else "(none)"
    return UserError(f"unknown {kind} {str(name)!r}: {hint}Valid: {listing}.{' ' + remedy if remedy else ''}")
