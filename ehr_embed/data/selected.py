"""Leave events out of records, so that a model sees only those that it knows how to read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ehr_embed.data.store import EventStore, SplitEvents
from ehr_embed.data.vocabulary import UNKNOWN


def without_others(events: SplitEvents, keep_V: npt.NDArray[np.bool_]) -> SplitEvents:
    """Return the events whose token is kept, and of each subject the first event in any case, as the unknown event if its token is
    not kept: a record without events has no samples.

    Args:
        events: events of a split.
        keep_V: (V,) whether each token is kept.

    >>> two = np.array([0, 3, 5])
    >>> events = SplitEvents(np.array([2, 3, 2, 3, 2], np.int32), np.arange(5), None, np.array([7, 8]), two, two[:2])
    >>> found = without_others(events, np.array([False, False, True, False]))
    >>> found.token_ids.tolist(), found.times.tolist(), found.offsets.tolist()
    ([2, 2, 1, 2], [0, 2, 3, 4], [0, 2, 4])
    """
    is_kept = keep_V[events.token_ids]
    first = events.offsets[:-1][np.diff(events.offsets) > 0]
    others = first[~is_kept[first]]
    is_kept[first] = True
    token_ids = events.token_ids[is_kept]
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_kept)])
    token_ids[before[others]] = UNKNOWN
    values = None if events.values is None else events.values[is_kept]
    if values is not None:
        values[before[others]] = np.nan
    return SplitEvents(
        token_ids, events.times[is_kept], values, events.subject_ids, before[events.offsets], events.birth_times
    )


class SelectedStore(EventStore):
    """An event store of which some tokens' events are left out, in memory.

    Args:
        store: the whole store.
        keep_V: (V,) whether each token's events are kept.
        why: digest of what chose the tokens, so that nothing is cached for the whole store.
    """

    def __init__(self, store: EventStore, keep_V: npt.NDArray[np.bool_], *, why: str) -> None:
        self.folder, self._whole, self._keep_V = store.folder, store, keep_V
        self.manifest = store.manifest | {"selected": why}
        self.vocabulary = store.vocabulary
        self._splits: dict[str, SplitEvents] = {}

    def split(self, name: str) -> SplitEvents:
        """Return the events of a split that are kept."""
        if name not in self._splits:
            self._splits[name] = without_others(self._whole.split(name), self._keep_V)
        return self._splits[name]
