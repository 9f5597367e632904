"""Metrics of a binary run on groups of its subjects: subjects with a given static code, and age bands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ehr_embed.data.batches import MICROSECONDS_PER_DAY
from ehr_embed.data.samples import Samples, ragged_arange
from ehr_embed.data.store import DAYS_PER_YEAR, STATIC_TIME, SplitEvents
from ehr_embed.data.vocabulary import UNKNOWN, Vocabulary
from ehr_embed.evaluation.metrics import binary_metrics

MIN_SUBJECTS = 20
"""Least number of subjects per group. Smaller groups are not reported: their metrics would be noise, and they might
identify a person."""
MAX_CODES = 50
"""Largest number of static codes that are evaluated, those with the most subjects; 10,000 codes would take hours."""
AGE_BANDS = (("0 to 17", 0), ("18 to 39", 18), ("40 to 64", 40), ("65 to 79", 65), ("80 and older", 80))


@dataclass(frozen=True)
class Subgroup:
    """A group of a split's samples, with its metrics.

    Attributes:
        name: the code or age band that the group shares.
        n: number of samples; None for a group that is too small to report.
        metrics: metrics as `binary_metrics` returns them; None for a group that is too small or has one class only.
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
    """Return the metrics of age bands and of the `MAX_CODES` most frequent static codes, and the number of other codes.

    Args:
        vocabulary: vocabulary of the events.
        events: events of the split.
        samples: n samples with labels 0 and 1.
        probabilities: (n,) probability of label 1.
        threshold: probability from which on a sample counts as predicted positive.
        n_bootstrap: number of bootstrap replicates for the intervals.
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
    """Return masks (n,) of the samples with each of the `MAX_CODES` most frequent static tokens.

    The second result is the number of tokens that are left out.
    Each value bin of a code is a group of its own. A token that all samples have is no group.
    """
    n_static = samples.static_stop - samples.static_start
    sample_N = np.repeat(np.arange(len(samples)), n_static)
    token_N = events.token_ids[ragged_arange(samples.static_start, n_static)]
    # The keys are one number per pair of a token and a sample that has the token, sorted by token.
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
    """Return masks (n,) of the bands of the age at the prediction time, without empty bands.

    The result is empty if no subject has a birth time.
    """
    birth = samples.birth_times
    is_known = birth != STATIC_TIME
    days = np.where(is_known, samples.prediction_times - np.where(is_known, birth, 0), 0) / MICROSECONDS_PER_DAY
    bounds = [DAYS_PER_YEAR * start for _, start in AGE_BANDS]
    band = np.searchsorted(bounds, days, side="right") - 1
    named = {f"age {name}": is_known & (band == number) for number, (name, _) in enumerate(AGE_BANDS)}
    return {name: is_member for name, is_member in named.items() if is_member.any()}
