"""Data that would vanish without a word: the count is said, or nothing is done where hardly any would be left."""

from __future__ import annotations

import logging

from ehr_embed.core.errors import UserError

log = logging.getLogger(__name__)
NEARLY_ALL = 0.9
"""From this share on a loss is a mistake in the data or the configuration, not a property of the data."""

ONLY_SAID = float("inf")
"""A share that no loss reaches."""


def say_or_refuse(n: int, of: int, what: str, *, remedy: str, refused_from: float = NEARLY_ALL) -> None:
    """Warn that `n` of `of` things are lost, or refuse to go on where they are all or nearly all of them.

    Args:
        n, of: how many are lost, and of how many; nothing is said of 0.
        what: the things, what is wrong with them and what becomes of them; reads on from "3 of 10 ".
        remedy: a whole sentence that says what to type or mend.
        refused_from: share of things lost from which on the loss is refused.

    Raises:
        UserError: the share lost is `refused_from` or more.

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
