"""Stop a run on a signal without losing finished work, with an exit code on which a scheduler can requeue it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE = getattr(os, "EX_TEMPFAIL", 75)
"""Exit code of a run that was asked to stop ("try again" in sysexits.h); the same command continues the run."""
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""Signals of Ctrl-C and of schedulers before they kill a process (as Slurm does with `--signal=USR1@60`)."""


class Stopped(KeyboardInterrupt):
    """The process was asked to stop and has saved its finished work; the same command continues from there."""


def stopped_by(name: str) -> Stopped:
    """Return the exception that ends a process outside of training, after the signal `name`."""
    return Stopped(f"stopped by {name}; what was finished is kept, and the same command continues")


class StopRequest:
    """Handle signals, and remember the first one.

    Args:
        is_deferred: whether the caller will look at `name` and stop by itself; if False, the first signal raises
            `Stopped` at once. A second Ctrl-C always ends the process at once.
    """

    def __init__(self, *, is_deferred: bool) -> None:
        self.is_deferred = is_deferred
        self.name: str | None = None
        """Name of the first signal; None as long as no signal has arrived."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        is_first = self.name is None
        self.name = self.name or signal.Signals(number).name
        if is_first and not self.is_deferred:
            raise stopped_by(self.name)
        # Schedulers repeat SIGTERM, so only a second Ctrl-C, which a person pressed, ends the process at once.
        if not is_first and number == signal.SIGINT:
            raise KeyboardInterrupt


@contextmanager
def stop_requests(*, is_deferred: bool) -> Iterator[StopRequest]:
    """Handle `SIGNALS` while the context is open; a handler that other code set (a search, submitit) stays in place.

    >>> with stop_requests(is_deferred=True) as stop:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     stop.name
    'SIGTERM'
    """
    request, before = StopRequest(is_deferred=is_deferred), {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler) or isinstance(handler, StopRequest):
                before[number] = signal.signal(number, request)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
