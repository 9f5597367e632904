"""Overrides of a command that a test builds from shared ones."""

from __future__ import annotations

from collections.abc import Iterable


def last_of_each(arguments: Iterable[str]) -> list[str]:
    """Return a command's arguments with the last value of each key alone: the command line takes a key once.

    >>> last_of_each(["-m", "seed=1", "x=2", "+seed=3"])
    ['-m', 'x=2', '+seed=3']
    """
    kept = list(arguments)
    keys = [argument.lstrip("+").partition("=")[0] if "=" in argument else None for argument in kept]
    return [argument for i, argument in enumerate(kept) if keys[i] is None or keys[i] not in keys[i + 1 :]]
