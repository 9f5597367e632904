"""Let a command go on when nobody reads what it prints any more, as in `ehr-embed ask ... | head`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class _MayBeLeft:
    """A text stream whose reader may leave: then the process's own stream is turned to the null device, and writing goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._turn_away()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._turn_away()

    def _turn_away(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """While inside, a reader of standard output or error that leaves ends nothing: the work goes on and its files are written.

    Python would raise `BrokenPipeError` in the middle of the work, since it ignores the signal that ends other programs there.
    """
    own = sys.stdout, sys.stderr
    inside: list[Any] = [None if stream is None else _MayBeLeft(stream) for stream in own]
    sys.stdout, sys.stderr = inside
    try:
        yield
    finally:
        for stream in inside:
            if stream is not None:
                stream.flush()
        # Whoever has replaced a stream in the meantime, such as a test, restores it alone.
        sys.stdout = own[0] if sys.stdout is inside[0] else sys.stdout
        sys.stderr = own[1] if sys.stderr is inside[1] else sys.stderr
