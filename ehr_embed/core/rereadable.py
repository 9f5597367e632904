"""Hand on items that are too large to be kept in memory and are read more than once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Rereadable(Generic[T]):
    """An iterable that reads its items anew each time, in contrast to a generator, which gives them once.

    Attributes:
        read: reads the items.

    >>> numbers = Rereadable(lambda: iter([1, 2]))
    >>> list(numbers), list(numbers)
    ([1, 2], [1, 2])
    """

    read: Callable[[], Iterator[T]]

    def __iter__(self) -> Iterator[T]:
        return self.read()
