"""Warn when a part of the data is left out, or refuse to go on when hardly any data would be left."""

from __future__ import annotations

import logging

from ehr_embed.core.errors import UserError

log = logging.getLogger(__name__)
NEARLY_ALL = 0.9
"""Share of lost data from which on the loss is taken for a mistake in the data or the configuration, and is refused."""

ONLY_SAID = float("inf")
"""Value of `refused_from` for losses that are never refused, since no share reaches it."""


def say_or_refuse(n: int, of: int, what: str, *, remedy: str, refused_from: float = NEARLY_ALL) -> None:
    """Warn that `n` of `of` rows, labels or subjects are lost, or refuse to go on if these are nearly all of them.

    Args:
        n: how many are lost; there is no warning for 0.
        of: how many there were.
        what: the rest of the sentence that begins with "3 of 10": what they are, what is wrong with them, and that they are
            left out, such as "rows have no subject and are left out".
        remedy: a whole sentence that says what to type or mend.
        refused_from: lost share from which on the loss is refused.

    Raises:
        UserError: the lost share is `refused_from` or more.

    >>> say_or_refuse(0, 10, "rows have no subject", remedy="Add it.")
    >>> say_or_refuse(9, 10, "rows have no subject", remedy="Add it.")
    Traceback (most recent call last):
    ehr_embed.core.errors.UserError: 9 of 10 rows have no subject. Too little would be left to trust a result. Add it.
    """
    if not n:
        return
    if n >= refused_from * of:
        raise UserError(f"{n:,} of {of:,} {what}. Too little would be left to trust a result. {remedy}")
    log.warning("%s of %s %s. %s", f"{n:,}", f"{of:,}", what, remedy)
