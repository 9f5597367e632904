"""Earlier prediction times: in training, a sample's record is at times cut some hours before its prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ehr_embed.core.errors import UserError
from ehr_embed.data.samples import Samples, ragged_searchsorted
from ehr_embed.data.store import STATIC_TIME, SplitEvents

MICROSECONDS_PER_HOUR = 3_600_000_000


@dataclass(frozen=True)
class Prefixes:
    """Settings of prefixes: how far before the prediction time records are cut, and how often.

    For tasks whose label holds at earlier times too, such as how a stay ends; not for what happens within a time from the
    prediction.

    Attributes:
        hours: before the prediction time.
        shares: probability of each; the rest of the samples stays whole.

    Raises:
        UserError: lists of different lengths, hours that are not above 0, or shares that are not probabilities.
    """

    hours: Sequence[float] = (12.0, 24.0)
    shares: Sequence[float] = (0.2, 0.2)

    def __post_init__(self) -> None:
        is_right = len(self.hours) == len(self.shares) and all(h > 0 for h in self.hours)
        if not is_right or any(share < 0 for share in self.shares) or sum(self.shares) > 1 + 1e-9:
            raise UserError(
                f"task.prefixes has hours={list(self.hours)} and shares={list(self.shares)}: expected as many shares as hours, "
                "hours above 0 and probabilities that add up to 1 at most. Type: task.prefixes={hours:[12,24],shares:[0.2,0.2]}"
            )

    def draw(self, events: SplitEvents, samples: Samples, rng: np.random.Generator, *, max_length: int) -> Samples:
        """Return the samples, each cut at the hours drawn for it; one that would have no timed event left stays whole."""
        hours = np.array([0.0, *self.hours])
        shares = np.array([1 - sum(self.shares), *self.shares]).clip(0)
        drawn = rng.choice(len(hours), len(samples), p=shares / shares.sum())
        return cut(events, samples, hours[drawn], max_length=max_length)


def drawn(
    prefixes: Prefixes | None,
    events: SplitEvents,
    samples: Samples,
    rng: np.random.Generator | None,
    *,
    max_length: int,
) -> Samples:
    """Return the samples as training draws them by `prefixes`, or as they are: without prefixes, and in evaluation, where `rng` is
    None."""
    if prefixes is None or rng is None:
        return samples
    return prefixes.draw(events, samples, rng, max_length=max_length)


def cut(events: SplitEvents, samples: Samples, hours: npt.NDArray[np.float64], *, max_length: int) -> Samples:
    """Return the samples as of `hours` (n,) before their prediction times, each with the last `max_length` events that are visible
    then; one that would have no timed event left stays as it is."""
    times = samples.prediction_times - (hours * MICROSECONDS_PER_HOUR).astype(np.int64)
    order = np.argsort(events.subject_ids, kind="stable")
    rows = order[np.searchsorted(events.subject_ids, samples.subject_ids, sorter=order)]
    first, last = events.offsets[rows], events.offsets[rows + 1]
    first_timed = ragged_searchsorted(events.times, first, last, np.full_like(times, STATIC_TIME))
    stop = ragged_searchsorted(events.times, first, last, times)
    n_static = samples.static_stop - samples.static_start
    start = np.maximum(first_timed, stop - (max_length - n_static))
    is_cut = (hours > 0) & (stop > first_timed)
    return replace(
        samples,
        prediction_times=np.where(is_cut, times, samples.prediction_times),
        start=np.where(is_cut, start, samples.start),
        stop=np.where(is_cut, np.maximum(stop, start), samples.stop),
    )
