"""Enforce the time boundary: no sample reaches past its prediction time, whichever code built it.

`check_boundary` is the check. `ehr_embed.tasks.set_up`, through which every task gets its samples and the trainer every dataset,
calls it for each split and for each dataset (`data/checked.py`). tests/data/test_boundary.py tries to get past it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ehr_embed.core.errors import UserError
from ehr_embed.core.lost_data import say_or_refuse
from ehr_embed.data.samples import Samples, ragged_searchsorted
from ehr_embed.data.store import MICROSECONDS_PER_DAY, STATIC_TIME, SplitEvents

REMEDY = (
    "Build the samples with ehr_embed.api.build_samples, or let `stop` of each be the index of the first event later than its "
    "prediction time, in the record of its own subject, so that this event is left out"
)


def check_boundary(events: SplitEvents, samples: Samples, *, where: str = "these samples") -> None:
    """Refuse samples that show an event later than their prediction time, or an event of another record.

    Events of a record are in order of time, static ones first, so it suffices to look at the last event of a sample's
    two ranges: at most two times per sample are read from the store, whatever the length of the records. A static event
    is always visible. The prediction time of a pretraining window is by construction the time of its last event
    (`window_samples`), so for windows the check can find only an error of that construction.

    Args:
        events: the split's events.
        samples: (n,) samples of this split.
        where: the label set or task to which the samples belong, for the message.

    Raises:
        UserError: a range is reversed or not within its subject's record, or shows an event after the prediction time.
    """
    if not len(samples):
        return
    ranges = ((samples.static_start, samples.static_stop), (samples.start, samples.stop))
    reversed_ = np.zeros(len(samples), bool)
    for start, stop in ranges:
        reversed_ |= start > stop
    if reversed_.any():
        raise _refusal(samples, reversed_, where, "begin after their end")
    is_foreign, is_late = np.zeros(len(samples), bool), np.zeros(len(samples), bool)
    for start, stop in ranges:
        filled = np.flatnonzero(stop > start)
        first, last = start[filled], stop[filled] - 1
        in_store = (first >= 0) & (last < len(events.times))
        is_foreign[filled[~in_store]] = True
        filled, first, last = filled[in_store], first[in_store], last[in_store]
        row = np.searchsorted(events.offsets, first, side="right") - 1
        is_own = (last < events.offsets[row + 1]) & (events.subject_ids[row] == samples.subject_ids[filled])
        is_foreign[filled[~is_own]] = True
        is_late[filled] |= events.times[last] > samples.prediction_times[filled]
    if is_foreign.any():
        raise _refusal(samples, is_foreign, where, "hold events that are not in the record of their subject")
    if is_late.any():
        number = int(np.flatnonzero(is_late)[0])
        last_time = max(int(events.times[stop[number] - 1]) for start, stop in ranges if stop[number] > start[number])
        days = (last_time - int(samples.prediction_times[number])) / MICROSECONDS_PER_DAY
        raise _refusal(
            samples, is_late, where, "reach past their prediction time", f", by {days:.4g} days with its last event"
        )


@dataclass
class UnseenRecords:
    """Count the samples whose prediction time lies before every timed event of their subject.

    Such a sample shows static events only. Its prediction time is mostly in another unit, or a default such as
    1900-01-01.

    Attributes:
        n: number of such samples.
        of: number of samples that were examined.
        example: prediction time and subject of the first such sample.
    """

    n: int = 0
    of: int = 0
    example: str = ""

    def add(self, events: SplitEvents, samples: Samples) -> None:
        """Examine further samples of a split, or of a part of one; they must have passed `check_boundary`."""
        self.of += len(samples)
        blank = np.flatnonzero(samples.start == samples.stop)
        order = np.argsort(events.subject_ids, kind="stable")
        row = order[np.searchsorted(events.subject_ids, samples.subject_ids[blank], sorter=order)]
        end, times = events.offsets[row + 1], samples.prediction_times[blank]
        first_timed = ragged_searchsorted(events.times, events.offsets[row], end, np.full_like(times, STATIC_TIME))
        early = np.zeros(len(blank), bool)
        has_timed = np.flatnonzero(first_timed < end)
        # A sample may lack timed events only because static events fill max_length; its prediction time is then correct.
        early[has_timed] = events.times[first_timed[has_timed]] > times[has_timed]
        if not early.any():
            return
        if not self.n:
            number = blank[np.flatnonzero(early)[0]]
            when = samples.prediction_times[number].astype("datetime64[us]")
            self.example = f"{when} of subject {samples.subject_ids[number]}"
        self.n += int(early.sum())

    def say(self, where: str) -> None:
        """Warn if there were such samples; `where` names their label set or task, for the message.

        Raises:
            UserError: all samples, or nearly all, are such samples.
        """
        say_or_refuse(
            self.n,
            self.of,
            f"prediction times of {where}, such as {self.example}, lie before every timed event of their subject, so that "
            "nothing but static events is seen",
            remedy="Mend the times of the label set (column prediction_time), or remove these rows.",
        )


def say_unseen(events: SplitEvents, samples: Samples, *, where: str) -> None:
    """Warn if samples of a split have a prediction time before every timed event of their subject (`UnseenRecords`).

    Raises:
        UserError: all samples, or nearly all, have such a prediction time.
    """
    found = UnseenRecords()
    found.add(events, samples)
    found.say(where)


def _refusal(samples: Samples, wrong: npt.NDArray[np.bool_], where: str, what: str, detail: str = "") -> UserError:
    number = int(np.flatnonzero(wrong)[0])
    when = samples.prediction_times[number].astype("datetime64[us]")
    return UserError(
        f"{where}: {int(wrong.sum())} of {len(samples)} samples {what}, such as that of subject {samples.subject_ids[number]} at "
        f"{when}{detail}. Expected events of the subject's own record, none later than the prediction time: metrics of a "
        f"model that sees later events would be meaningless. {REMEDY}."
    )
