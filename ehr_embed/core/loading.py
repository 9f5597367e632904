"""Load modules, and end a process, without rounds of Python's collector of reference cycles."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def loading() -> Iterator[None]:
    """While inside, modules are imported without the collector, whose rounds took a quarter of the time.

    Modules live as long as the process, so the collector would find nothing among them. It goes on afterwards as before.

    >>> with loading():
    ...     import json
    >>> gc.isenabled()
    True
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@cache
def end_without_collection() -> None:
    """Let the process end without a last round of the collector, which took 1.7 s with the modules of a run.

    For a command's own process alone: an object in a cycle is then not finalised. Files are written by `with`, and libraries that
    must close something at the end register it with `atexit`, as this does.
    """
    atexit.register(gc.freeze)
