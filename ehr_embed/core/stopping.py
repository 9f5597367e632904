"""Being asked to stop: a signal ends a run where nothing finished is lost, with an exit code to requeue on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE = getattr(os, "EX_TEMPFAIL", 75)
"""Exit code of a run that was asked to stop: "try again" in sysexits.h. The same command continues it."""
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""Ctrl-C, and what schedulers send before they kill (Slurm's `--signal=USR1@60` for one)."""


class Stopped(KeyboardInterrupt):
    """The process was asked to stop and has saved what there was; the same command continues."""


def stopped_by(name: str) -> Stopped:
    """The end of a process outside of training, by the signal `name`."""
    return Stopped(f"stopped by {name}; what was finished is kept, and the same command continues")


class StopRequest:
    """A signal handler that remembers the first signal.

    Args:
        is_deferred: leave it to the caller to ask for `name` and stop, instead of raising `Stopped` on the spot. A second
            Ctrl-C always ends the process at once.
    """

    def __init__(self, *, is_deferred: bool) -> None:
        self.is_deferred = is_deferred
        self.name: str | None = None
        """The signal's name, None as long as nothing came."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        is_first = self.name is None
        self.name = self.name or signal.Signals(number).name
        if is_first and not self.is_deferred:
            raise stopped_by(self.name)
        # Schedulers repeat SIGTERM; only a person who presses Ctrl-C again cannot wait.
        if not is_first and number == signal.SIGINT:
            raise KeyboardInterrupt


@contextmanager
def stop_requests(*, is_deferred: bool) -> Iterator[StopRequest]:
    """Listen to `SIGNALS` while inside. Handlers that others have set (a search, submitit) stay as they are.

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
