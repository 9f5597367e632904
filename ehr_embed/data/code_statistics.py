"""Count each code in train and summarise its numeric values, in memory that does not grow with the number of events."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import cannot_write
from ehr_embed.sources.protocol import Source

MAX_VALUES_PER_CODE = 20_000
"""Values kept per code to compute its quantiles; a code with more values keeps a uniform sample of this size."""
SPARE = 10 * MAX_VALUES_PER_CODE**0.5
"""Spare values that are kept per code, ten standard deviations of the number that a threshold on random priorities keeps: fewer
than `MAX_VALUES_PER_CODE` remain only with negligible probability."""
VALUES_IN_MEMORY = 500_000
N_FILES = 32
RECORD = np.dtype([("code", np.int32), ("value", np.float32), ("priority", np.float64)])
T = TypeVar("T")


def code_statistics(
    source: Source, summary: Callable[[npt.NDArray[np.float32]], T], *, scratch: Path | None, seed: int
) -> tuple[pl.DataFrame, dict[str, T]]:
    """Return counts (code, count) of train, frequent codes first, and a summary of each code's values if it has any.

    The values are drawn by bottom-k sampling (Cohen and Kaplan 2007): each gets a random priority, and the k lowest of a
    code are a uniform sample over all shards. A shard keeps what lies below a threshold that falls as the code's values
    become more, so that nearly all values that cannot be among the k lowest are never stored. Kept values are moved to
    unnamed temporary files, so that memory holds one shard at a time, and in the end the values of one group of codes.

    Args:
        source: the source of the events.
        summary: function of at most `MAX_VALUES_PER_CODE` values of one code.
        scratch: folder for the temporary files; None = the system's.
        seed: seed of the priorities.

    Raises:
        UserError: train has no event, or `scratch` cannot be written to.
    """
    with _Spill(scratch) as spill:
        gathered = _Gathered(spill)
        for number, shard in enumerate(source.shards):
            gathered.add(source.read(shard), np.random.default_rng([seed, number]))
        codes = gathered.index["code"]
        summaries = {codes[code]: summary(values) for part in spill.parts() for code, values in _samples(part)}
    if not len(codes):
        raise UserError("the train split has no events: nothing can be fitted. Check metadata/subject_splits.parquet.")
    total = pl.DataFrame({"code": codes, "count": gathered.n_events_C})
    return total.sort("count", "code", descending=[True, False]), summaries


class _Gathered:
    """Collect the C codes seen so far, with the numbers of their events (C,) and values (C,); values go to `spill`."""

    def __init__(self, spill: _Spill) -> None:
        self.spill = spill
        self.index = pl.DataFrame(schema={"code": pl.String, "id": pl.Int32})
        self.n_events_C, self.n_values_C = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def add(self, events: pl.DataFrame, rng: np.random.Generator) -> None:
        """Add a shard. This is a function of its own so that its frames are freed before the next shard is read."""
        train = events.filter(split="train").select("code", "numeric_value")
        counts = train.group_by("code").len()
        new = (
            counts.join(self.index, on="code", how="anti")
            .select("code")
            .sort("code")
            .with_row_index("id", len(self.index))
        )
        self.index = pl.concat([self.index, new.select("code", pl.col("id").cast(pl.Int32))])
        more = np.zeros(len(new), np.int64)
        self.n_events_C, self.n_values_C = np.append(self.n_events_C, more), np.append(self.n_values_C, more)
        counts = counts.join(self.index, on="code", how="left")
        self.n_events_C[counts["id"].to_numpy()] += counts["len"].to_numpy()

        numbers = train.filter(pl.col("numeric_value").is_not_null())
        ids = numbers.select("code").join(self.index, on="code", how="left", maintain_order="left")["id"].to_numpy()
        priority = rng.random(len(ids))
        self.n_values_C += np.bincount(ids, minlength=len(self.n_values_C))
        threshold_C = (MAX_VALUES_PER_CODE + SPARE) / np.maximum(self.n_values_C, 1)
        kept = np.flatnonzero(priority < threshold_C[ids])
        records = np.empty(len(kept), RECORD)
        records["code"], records["priority"] = ids[kept], priority[kept]
        records["value"] = numbers["numeric_value"].to_numpy()[kept]
        self.spill.add(records)


def _samples(records: npt.NDArray[Any]) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Yield the number of each code and the sample of its values, which are in the order of the shards."""
    records = records[np.argsort(records["code"], kind="stable")]
    ends = np.flatnonzero(np.diff(records["code"], append=-1)) + 1
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True) if len(records) else ():
        group = records[start:end]
        if len(group) > MAX_VALUES_PER_CODE:
            lowest = np.argpartition(group["priority"], MAX_VALUES_PER_CODE)[:MAX_VALUES_PER_CODE]
            group = group[np.sort(lowest)]
        yield int(group["code"][0]), np.ascontiguousarray(group["value"])


class _Spill:
    """Store of records, in memory while they are few, else in temporary files that end with the process."""

    def __init__(self, scratch: Path | None) -> None:
        self.scratch, self.files = scratch, ExitStack()
        self.pending: list[npt.NDArray[Any]] = []
        self.parted: list[Any] = []

    def __enter__(self) -> _Spill:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()

    def add(self, records: npt.NDArray[Any]) -> None:
        self.pending.append(records)
        if sum(map(len, self.pending)) > VALUES_IN_MEMORY:
            self._flush()

    def parts(self) -> Iterator[npt.NDArray[Any]]:
        """Yield all records in parts; those of one code are in one part, in the order in which they were added."""
        if not self.parted:
            yield self._taken()
            return
        self._flush()
        for file in self.parted:
            file.seek(0)
            yield np.frombuffer(file.read(), RECORD)

    def _taken(self) -> npt.NDArray[Any]:
        records, self.pending = np.concatenate([np.empty(0, RECORD), *self.pending]), []
        return records

    def _flush(self) -> None:
        records = self._taken()
        part = (records["code"] % N_FILES).astype(np.uint8)
        records = records[np.argsort(part, kind="stable")]
        ends = np.cumsum(np.bincount(part, minlength=N_FILES))
        try:
            if not self.parted:
                if self.scratch is not None:
                    self.scratch.mkdir(parents=True, exist_ok=True)
                files = (tempfile.TemporaryFile(dir=self.scratch, buffering=0) for _ in range(N_FILES))  # noqa: SIM115
                self.parted = [self.files.enter_context(file) for file in files]
            for file, group in zip(self.parted, np.split(records, ends[:-1]), strict=True):
                data = group.view(np.uint8).data
                while len(data):
                    data = data[file.write(data) :]
        except OSError as error:
            raise cannot_write(self.scratch or tempfile.gettempdir(), error) from error
