"""Let Python's collector of reference cycles run rarely while a command loads its modules."""

from __future__ import annotations

import gc

OBJECTS = 100_000
"""New objects between two rounds of the collector while modules are loaded; Python's default is 700 or 2,000."""
USUAL = gc.get_threshold()


def collect_rarely() -> None:
    """Let the collector run rarely until `collect_as_usual`.

    Importing the libraries of a run makes a million objects, hardly any of them garbage: with Python's default a fifth of the time
    goes into rounds of the collector (docs/speed.md). For a command's own process alone.
    """
    gc.set_threshold(OBJECTS, 10, 10)


def collect_as_usual() -> None:
    """Let the collector run as Python does by itself: what an earlier run of the process left in cycles, such as its model, goes.

    >>> collect_rarely(), gc.get_threshold()[0] > USUAL[0]
    (None, True)
    >>> collect_as_usual(), gc.get_threshold() == USUAL
    (None, True)
    """
    gc.set_threshold(*USUAL)
