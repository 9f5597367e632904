"""How well a binary run does on groups of its subjects: those with a static code, and age bands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ehr_embed.data.batches import MICROSECONDS_PER_DAY
from ehr_embed.data.samples import Samples, ragged_arange
from ehr_embed.data.store import STATIC_TIME, SplitEvents
from ehr_embed.data.vocabulary import UNKNOWN, Vocabulary
from ehr_embed.evaluation.metrics import binary_metrics

MIN_SUBJECTS = 20
"""Of smaller groups nothing is told: a metric would be noise, and a group of a few may be somebody."""
MAX_CODES = 50
"""Static codes that are evaluated, those with most subjects: of 10,000 codes the rest would cost hours, and nobody reads them."""
AGE_BANDS = (("0 to 17", 0), ("18 to 39", 18), ("40 to 64", 40), ("65 to 79", 65), ("80 and older", 80))
DAYS_PER_YEAR = 365.25


@dataclass(frozen=True)
class Subgroup:
    """Some of a split's samples.

    Attributes:
        name: what its subjects share.
        n: samples; None where it is too small to tell.
        metrics: as `binary_metrics` gives them; None where it is too small, or a class is missing.
    """

    name: str
    n: int | None
    metrics: dict[str, Any] | None


def subgroups(
    vocabulary: Vocabulary,
    events: SplitEvents,
    samples: Samples,
    probabilities: npt.NDArray[np.float64],
    *,
    threshold: float,
    n_bootstrap: int,
) -> tuple[list[Subgroup], int]:
    """Return the metrics of every age band and of the `MAX_CODES` static codes with most subjects, by name, and the number of
    static codes left out.

    Args:
        vocabulary: of the events.
        events: of the split.
        samples: with labels 0 and 1.
        probabilities: (n,) of label 1.
        threshold: from which a sample counts as predicted positive.
        n_bootstrap: replicates of the intervals.
    """
    found = []
    codes, n_left_out = static_codes(vocabulary, events, samples)
    for name, is_member in (age_bands(samples) | codes).items():
        ids, labels = samples.subject_ids[is_member], samples.labels[is_member]
        if len(np.unique(ids)) < MIN_SUBJECTS:
            found.append(Subgroup(name, None, None))
            continue
        metrics = None
        if 0 < labels.sum() < len(labels):
            metrics = binary_metrics(
                labels,
                probabilities[is_member],
                threshold=threshold,
                subject_ids=ids,
                n_bootstrap=n_bootstrap,
                split_name=name,
            )
        found.append(Subgroup(name, len(labels), metrics))
    return found, n_left_out


def static_codes(
    vocabulary: Vocabulary, events: SplitEvents, samples: Samples
) -> tuple[dict[str, npt.NDArray[np.bool_]], int]:
    """Return the members (n,) of the `MAX_CODES` static tokens with most subjects by name, and the number of tokens left out.

    A code's value bins are apart. A code that all samples have is no group.
    """
    n_static = samples.static_stop - samples.static_start
    sample_N = np.repeat(np.arange(len(samples)), n_static)
    token_N = events.token_ids[ragged_arange(samples.static_start, n_static)]
    # One number per token and sample that has it, sorted by token.
    key = np.unique(token_N.astype(np.int64) * len(samples) + sample_N)
    tokens, first = np.unique(key // len(samples), return_index=True)
    of_token = [
        key[start:stop] % len(samples)
        for start, stop in zip(first, np.r_[first[1:], len(key)][: len(first)], strict=True)
    ]
    groups = {
        int(token): members
        for token, members in zip(tokens, of_token, strict=True)
        if token != UNKNOWN and len(members) < len(samples)
    }
    n_subjects = {token: len(np.unique(samples.subject_ids[members])) for token, members in groups.items()}
    largest = sorted(groups, key=lambda token: -n_subjects[token])[:MAX_CODES]
    found, strings = {}, vocabulary.strings
    for token in largest:
        found[strings[token]] = np.zeros(len(samples), bool)
        found[strings[token]][groups[token]] = True
    return dict(sorted(found.items())), len(groups) - len(found)


def age_bands(samples: Samples) -> dict[str, npt.NDArray[np.bool_]]:
    """Members (n,) of each band of the age at the prediction time; empty where no subject has a timed birth."""
    birth = samples.birth_times
    is_known = birth != STATIC_TIME
    days = np.where(is_known, samples.prediction_times - np.where(is_known, birth, 0), 0) / MICROSECONDS_PER_DAY
    bounds = [DAYS_PER_YEAR * start for _, start in AGE_BANDS]
    band = np.searchsorted(bounds, days, side="right") - 1
    named = {f"age {name}": is_known & (band == number) for number, (name, _) in enumerate(AGE_BANDS)}
    return {name: is_member for name, is_member in named.items() if is_member.any()}
