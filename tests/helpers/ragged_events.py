"""Event arrays and label rows from records given as lists."""

from __future__ import annotations

import numpy as np
import polars as pl
from hypothesis import strategies as st

from ehr_embed.data.batches import MICROSECONDS_PER_DAY
from ehr_embed.data.store import STATIC_TIME, SplitEvents

subjects = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(-5, 20), max_size=12)).filter(lambda s: s[0] + len(s[1]) > 0),
    min_size=1,
    max_size=5,
)


def make_events(records: list[tuple[int, list[int]]]) -> tuple[SplitEvents, list[list[int]]]:
    """Events with distinct token ids; days of each record with STATIC_TIME for static ones. Subject ids descend."""
    times = [[STATIC_TIME] * n + [day * MICROSECONDS_PER_DAY for day in sorted(days)] for n, days in records]
    flat = np.array([time for record in times for time in record], np.int64)
    offsets = np.cumsum([0, *map(len, times)])
    ids = np.arange(len(records))[::-1].astype(np.int64) * 7
    return SplitEvents(
        np.arange(2, 2 + len(flat), dtype=np.int32), flat, None, ids, offsets, np.full(len(ids), STATIC_TIME)
    ), times


def label_frame(events: SplitEvents, rows: list[int], days: list[float]) -> pl.DataFrame:
    times = pl.Series([int(day * MICROSECONDS_PER_DAY) for day in days], dtype=pl.Int64).cast(pl.Datetime("us"))
    return pl.DataFrame({"subject_id": events.subject_ids[rows], "prediction_time": times})
