"""Find the events of a vocabulary whose texts are nearest to words, such as those of a question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.data.vocabulary import FIRST_TOKEN, Vocabulary

STEPS = 20
"""Steps per unit of cosine in which a margin is advised."""


class NearEvent(NamedTuple):
    """An event near to words.

    Attributes:
        token: its token without a value.
        cosine: likeness of its text to the words.
    """

    token: int
    cosine: float


def nearest_events(vector: Tensor, vocabulary: Vocabulary, table: Tensor, *, n_events: int) -> list[NearEvent]:
    """Return the events nearest to a vector, nearest first.

    A code is one event whatever its value: the text of its token without a value says what it is.

    Args:
        vector: (E,) of the words.
        vocabulary: the vocabulary.
        table: (V, E) vectors of its tokens.
        n_events: most events to return.
    """
    plain = torch.from_numpy(np.unique(vocabulary.plain_tokens[FIRST_TOKEN:]))
    cosine = F.cosine_similarity(table.cpu()[plain], vector.cpu()[None], dim=1)
    order = cosine.argsort(descending=True, stable=True)[:n_events].tolist()
    return [NearEvent(int(plain[i]), float(cosine[i])) for i in order]


def near_enough(near: Sequence[NearEvent], *, min_cosine: float, margin: float) -> list[NearEvent]:
    """Return the events that count as what the words mean.

    Args:
        near: events, nearest first.
        min_cosine: least cosine.
        margin: an event whose cosine is lower than the first one's by more than this is left out.

    >>> near_enough([NearEvent(7, 0.9), NearEvent(4, 0.85), NearEvent(5, 0.7)], min_cosine=0.5, margin=0.1)
    [NearEvent(token=7, cosine=0.9), NearEvent(token=4, cosine=0.85)]
    """
    return [event for event in near if event.cosine >= max(min_cosine, near[0].cosine - margin)]


def margin_for(near: Sequence[NearEvent], *, min_cosine: float, margin: float) -> float | None:
    """Return the margin, in steps of 0.05, with which every event that is near enough by its cosine would count; None where the
    margin leaves none of them out.

    Args:
        near, min_cosine, margin: as in `near_enough`.

    >>> margin_for([NearEvent(7, 0.875), NearEvent(4, 0.764), NearEvent(5, 0.4)], min_cosine=0.5, margin=0.1)
    0.15
    """
    enough = [event.cosine for event in near if event.cosine >= min_cosine]
    if not enough or enough[-1] >= near[0].cosine - margin:
        return None
    return margin_to(near[0].cosine, enough[-1])


def margin_to(nearest: float, cosine: float) -> float:
    """Return the margin, in steps of 0.05, with which an event counts.

    >>> margin_to(0.875, 0.764), margin_to(0.875, 0.583)
    (0.15, 0.3)
    """
    return math.ceil((nearest - cosine) * STEPS) / STEPS


def nothing_near(
    words: str, near: Sequence[NearEvent], vocabulary: Vocabulary, *, min_cosine: float, where: str = "", else_type: str
) -> UserError:
    """Return the error that no event is near enough to words.

    Args:
        words: the words.
        near: the nearest events.
        vocabulary: the vocabulary.
        min_cosine: least cosine.
        where: what the key min_cosine begins with, such as "task.".
        else_type: what to type in place of a smaller `min_cosine`.
    """
    listed = "; ".join(f"{vocabulary.texts[event.token]} ({event.cosine:.2f})" for event in near[:3])
    return UserError(
        f"question {words!r}: no event of the run's vocabulary has a text with a cosine of {where}min_cosine={min_cosine} or "
        f"more; the nearest are {listed}. Type: {where}min_cosine=SMALLER if one of them is meant, {else_type}"
    )


def with_bins(plain: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """Return the tokens of codes, those of their value bins included.

    Args:
        plain: the codes' tokens without a value.
        vocabulary: the vocabulary.
    """
    found: list[int] = np.flatnonzero(np.isin(vocabulary.plain_tokens, plain)).tolist()
    return found
