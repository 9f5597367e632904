"""Let a command go on when nobody reads what it prints any more, as in `ehr-embed ask ... | head`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


class _MayBeLeft:
    """A stream whose reader may leave: then the process's own stream is turned to the null device, and writing goes on.

    Args:
        stream: a text stream, or the binary one below it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # a copy that has no stream yet would look for it here without end
            raise AttributeError(name)
        return getattr(self._stream, name)

    @property
    def buffer(self) -> _MayBeLeft:
        return _MayBeLeft(self._stream.buffer)

    def write(self, text: Any) -> int:
        try:
            return int(self._stream.write(text))
        except BrokenPipeError:
            self._turn_away()
            return len(text)

    def writelines(self, lines: Iterable[Any]) -> None:
        for line in lines:
            self.write(line)

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
        try:
            yield
        except BaseException:
            with suppress(OSError, ValueError):  # the error of the work says more than one of the stream
                _flush(inside)
            raise
        _flush(inside)
    finally:
        # Whoever has replaced a stream in the meantime, such as a test, restores it alone.
        sys.stdout = own[0] if sys.stdout is inside[0] else sys.stdout
        sys.stderr = own[1] if sys.stderr is inside[1] else sys.stderr


def _flush(streams: Iterable[Any]) -> None:
    for stream in streams:
        if stream is not None:
            stream.flush()
