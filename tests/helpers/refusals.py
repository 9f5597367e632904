"""Expect a refusal by what it must say: the key or file, the value, and the remedy. The rest of its message is prose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ehr_embed.core.errors import UserError


@contextmanager
def refused(*parts: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Pass if the body raises a `UserError` whose message has all of `parts`."""
    with pytest.raises(UserError) as caught:
        yield caught
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} is not in: {caught.value}"
