"""Say in words where the numbers of two codes of one text cannot agree: another unit, another quantity, or numbers on one side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ehr_embed.embedding.alignment import Rules, phrasings

FAR = 3.0
"""Medians that differ by this factor, both positive, are warned of."""
NUMBERS_HERE, NUMBERS_THERE = "numbers here and none there", "numbers there and none here"


def disagreement(here: Sequence[float | None], there: Sequence[float | None]) -> str:
    """Return in words how the 10, 50 and 90 % quantiles of two codes' numbers disagree; empty if they do not.

    >>> disagreement((30.0, 40.0, 100.0), (0.35, 0.5, 1.0))
    'median 40 here, 0.5 there: 80 times as large'
    >>> disagreement((130.0, 138.0, 145.0), (133.0, 139.0, 144.0))
    ''
    >>> disagreement((88.0, 97.0, 100.0), (8.0, 10.0, 13.0)), disagreement((None, None, None), (1.0, 2.0, 3.0))
    ('median 97 here, 10 there: 9.7 times as large', 'numbers there and none here')
    """
    has = [all(x is not None and x == x for x in side) for side in (here, there)]
    if not all(has):
        return NUMBERS_THERE if has[1] else NUMBERS_HERE if has[0] else ""
    numbers = [x for x in (*here, *there) if x is not None]
    low, median, high, their_low, their_median, their_high = numbers
    said = f"median {median:.4g} here, {their_median:.4g} there"
    if median > 0 and their_median > 0:
        factor = median / their_median
        if factor > FAR or factor < 1 / FAR:
            return f"{said}: {f'{factor:.2g} times as large' if factor > 1 else f'{1 / factor:.2g} times as small'}"
    return f"{said}: the middle 80 % do not overlap" if low > their_high or high < their_low else ""


def of_other_kind(
    text_S: list[str],
    text_T: list[str],
    is_number_S: npt.NDArray[np.bool_],
    is_number_T: npt.NDArray[np.bool_],
    rules: Rules,
) -> list[str]:
    """Return for each code of the target what is wrong where the source has its text, but numbers stand on one side alone; else
    an empty string."""
    kinds: dict[str, set[bool]] = {}
    for text, is_number in zip(text_S, is_number_S.tolist(), strict=True):
        kinds.setdefault(phrasings(text, rules)[0], set()).add(is_number)
    said = []
    for text, is_number in zip(text_T, is_number_T.tolist(), strict=True):
        found = kinds.get(phrasings(text, rules)[0], {is_number})
        said.append("" if is_number in found else NUMBERS_HERE if is_number else NUMBERS_THERE)
    return said
