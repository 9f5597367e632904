"""Texts that several processes embed, some few and many; the processes import them too."""

from __future__ import annotations

TEXTS = [f"{'Heart failure ' * (number % 7 + 1)}of grade {number}" for number in range(90)]
MANY = [f"Finding {number} of the {'left ' * (number % 30)}lung" for number in range(30_000)]
