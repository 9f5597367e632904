"""A dataset of people of three ages, with a group that is too small to be told of."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ehr_embed.sources.protocol import SPLITS
from tests.helpers.small_meds import Event, write_meds

AGE_OF = {0: 10, 1: 30, 2: 70}  # by subject modulo 3
FIRST_ID = 7_000_000


def write_people(root: Path) -> Path:
    """90 subjects a split, of three ages, three of them of sex X, all in COUNTRY//A; label by chance."""
    rng = np.random.default_rng(0)
    splits: dict[str, list[Event]] = {}
    labels = []
    for number, split in enumerate(SPLITS):
        splits[split] = []
        for i in range(90):
            subject, sex = FIRST_ID + 1000 * number + i, "X" if i < 3 else "FM"[i % 2]
            born = -365.25 * AGE_OF[i % 3] - 100
            splits[split] += [(subject, None, f"SEX//{sex}", None), (subject, None, "COUNTRY//A", None)]
            splits[split] += [(subject, born, "MEDS_BIRTH", None)]
            splits[split] += [(subject, float(d), f"N{rng.integers(5)}", None) for d in range(4)]
            labels.append((subject, 10.0, bool(rng.random() < 0.5) if i % 3 else False))
    return write_meds(root, splits, labels={"case": labels})
