"""Find when outcomes follow a prediction time, and until when the subject is observed.

An outcome is a set of events. A subject is observed until the last timed event of the record, or until the first event of
an end-of-follow-up set after the prediction time, or until a competing event such as death, whichever comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ehr_embed.data.samples import Samples, ragged_arange, ragged_searchsorted
from ehr_embed.data.store import MICROSECONDS_PER_DAY, STATIC_TIME, SplitEvents

CENSORED, EVENT, COMPETING, EXCLUDED = 0, 1, 2, 3
"""Status of an outcome: not seen until the end of observation, seen, preceded by a competing event, or not asked for."""


@dataclass(frozen=True)
class FollowUp:
    """Times and statuses of K outcomes after n prediction times.

    Attributes:
        days: (n, K) float64, days from the prediction time to the outcome, the competing event or the end of observation.
        status: (n, K) int8, one of CENSORED, EVENT, COMPETING and EXCLUDED. A sample is excluded from an outcome that
            lies at or before its prediction time (if such outcomes are excluded), and from every outcome if nothing is
            observed after its prediction time; its days are NaN.
        has_prior: (n, K) bool, whether the outcome lies at or before the prediction time.
    """

    days: npt.NDArray[np.float64]
    status: npt.NDArray[np.int8]
    has_prior: npt.NDArray[np.bool_]


class TokenPlaces:
    """The places of each token in a split's events, found once for any number of outcomes.

    Args:
        events: the split's events.
        n_tokens: size of the vocabulary.
    """

    def __init__(self, events: SplitEvents, n_tokens: int) -> None:
        token_ids = np.asarray(events.token_ids)
        self._places = np.argsort(token_ids, kind="stable")
        self._first = np.searchsorted(token_ids[self._places], np.arange(n_tokens + 1))

    def of(self, tokens: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the ascending places of the events with one of `tokens`, (m,)."""
        first = self._first[np.asarray(tokens, np.int64)] if len(tokens) else np.empty(0, np.int64)
        count = self._first[np.asarray(tokens, np.int64) + 1] - first if len(tokens) else first
        return np.sort(self._places[ragged_arange(first, count)])


def record_rows(events: SplitEvents, subject_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the row of each subject's record in a split, (n,); every subject must be in the split."""
    order = np.argsort(events.subject_ids, kind="stable")
    return order[np.searchsorted(events.subject_ids, subject_ids, sorter=order)]


def follow_up(
    events: SplitEvents,
    samples: Samples,
    outcomes: Sequence[Sequence[int]],
    *,
    places: TokenPlaces,
    competing: Sequence[int] = (),
    end: Sequence[int] = (),
    excludes_prior: bool = True,
) -> FollowUp:
    """Return when each outcome follows each sample's prediction time.

    The boundary is that of the samples: an event at the prediction time is visible, so it is prior and no outcome. An
    outcome at the time of the end of observation, or at the time of a competing event, counts as seen.

    Args:
        events: the split's events.
        samples: (n,) samples of the split; only their subjects and prediction times are used.
        outcomes: K sets of token ids.
        places: of the split's tokens.
        competing: token ids of competing events. An outcome's own tokens do not compete with it.
        end: token ids of events that end the follow-up. A sample whose record has one at or before its prediction time
            is not observed any more.
        excludes_prior: whether a sample is excluded from an outcome that lies at or before its prediction time;
            otherwise the outcome may recur.
    """
    rows, predicted = record_rows(events, samples.subject_ids), samples.prediction_times
    first, last = events.offsets[rows], events.offsets[rows + 1]
    start = ragged_searchsorted(events.times, first, last, predicted)
    observed_until = np.maximum(np.asarray(events.times)[last - 1], predicted)
    if len(end):
        of_end = places.of(end)
        ended_before, when = _around(events, of_end, first, start, last)
        observed_until = np.where(when == NEVER, observed_until, np.minimum(observed_until, when))
        observed_until = np.where(ended_before, predicted, observed_until)
    days = np.full((len(samples), len(outcomes)), np.nan)
    status = np.full(days.shape, EXCLUDED, np.int8)
    has_prior = np.zeros(days.shape, bool)
    is_observed = observed_until > predicted
    for column, tokens in enumerate(outcomes):
        prior, when = _around(events, places.of(tokens), first, start, last)
        rival = [token for token in competing if token not in set(tokens)]
        died_before, when_rival = _around(events, places.of(rival), first, start, last)
        stop = np.minimum(np.minimum(when, when_rival), observed_until)
        kind = np.full(len(samples), CENSORED, np.int8)
        kind[(when_rival == stop)] = COMPETING
        kind[(when == stop)] = EVENT
        asked = is_observed & ~died_before & ~(prior & excludes_prior)
        days[asked, column] = (stop - predicted)[asked] / MICROSECONDS_PER_DAY
        status[asked, column] = kind[asked]
        has_prior[:, column] = prior
    return FollowUp(days, status, has_prior)


NEVER = np.iinfo(np.int64).max


def _around(
    events: SplitEvents,
    found: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    start: npt.NDArray[np.int64],
    last: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Return whether one of the places `found` lies in [first, start), and the time of the first one in [start, last).

    The time is `NEVER` where there is none.
    """
    if not len(found):
        return np.zeros(len(first), bool), np.full(len(first), NEVER)
    at = np.searchsorted(found, start)
    before = found[np.maximum(at - 1, 0)]
    has_prior = (at > 0) & (before >= first)
    after = found[np.minimum(at, len(found) - 1)]
    follows = (at < len(found)) & (after < last)
    when = np.where(follows, np.asarray(events.times)[after], NEVER)
    return has_prior, when


def drawn_times(
    events: SplitEvents, *, per_record: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw prediction times from the times of the records' own events, each before the record's last event.

    Args:
        events: the split's events.
        per_record: largest number of times per record; a record with fewer distinct times gives all of them.
        rng: draws the times.

    Returns:
        Subject ids and prediction times (microseconds), (n,) each, in order of subject and time.
    """
    times = np.asarray(events.times)
    row = np.repeat(np.arange(len(events.subject_ids)), np.diff(events.offsets))
    is_last_of_time = np.ones(len(times), bool)
    is_last_of_time[:-1] = (times[1:] != times[:-1]) | (row[1:] != row[:-1])
    before_end = times < times[events.offsets[1:] - 1][row]
    place = np.flatnonzero(is_last_of_time & before_end & (times != STATIC_TIME))
    # A random order within each record, of which the first `per_record` are kept.
    order = np.lexsort((rng.random(len(place)), row[place]))
    rank = np.arange(len(place)) - np.searchsorted(row[place][order], row[place][order])
    kept = np.sort(place[order[rank < per_record]])
    return events.subject_ids[row[kept]], times[kept]
