"""Let a CPU compute as a GPU does, where counting would make the host wait."""

from __future__ import annotations

import sys

import pytest


def count_nothing(patch: pytest.MonkeyPatch, *, counts: bool = False) -> None:
    """Let every module of the package believe that reading a number back waits; `counts` = let all count."""
    found = [m for name, m in list(sys.modules.items()) if name.startswith("ehr_embed.") and hasattr(m, "reads_freely")]
    assert found
    for module in found:
        patch.setattr(module, "reads_freely", lambda device: counts)
