"""A pickle that would call a function when it is read."""

from __future__ import annotations

from typing import Any


class Call:
    """Pickles as a call of `function`, the way an attack does."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments
