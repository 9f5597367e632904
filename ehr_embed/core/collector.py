"""Let Python's collector of reference cycles run rarely in the process of a command."""

from __future__ import annotations

import atexit
import gc
from functools import cache

OBJECTS = 100_000
"""New objects between two rounds of the collector; Python's default is 700 or 2,000."""


@cache
def collect_rarely() -> None:
    """Let the collector run rarely from now on, and not at the end of the process.

    Importing the libraries of a run makes a million objects, hardly any of them garbage: with Python's default a fifth of the time
    goes into rounds of the collector (docs/speed.md). Tensors are freed by counting references, so that training needs no rounds.

    For a command's own process alone: at its end an object in a cycle is not finalised. Files are written by `with`, and
    libraries that must close something at the end register it with `atexit`, as this does.
    """
    gc.set_threshold(OBJECTS, 10, 10)
    atexit.register(gc.freeze)
