"""Length-bucketed batches, built by vectorised gathers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ehr_embed.errors import UserError
from ehr_embed.models.body import LENGTH_MULTIPLE
from ehr_embed.samples import Samples, ragged_arange
from ehr_embed.store import STATIC_TIME, SplitEvents

MICROSECONDS_PER_DAY = 86_400_000_000
BUCKET_BATCHES = 64
"""Batches' worth of shuffled samples that are sorted by length together."""


@dataclass(frozen=True)
class Batch:
    """B rows of up to T events; a row is one sample, or in a packed batch several sequences one after the other.

    Attributes:
        token_ids: (B, T) int32, 0 = padding.
        days: (B, T) float32, days before the prediction time; a static event has those of the first timed event.
        gap_days, elapsed_days: (B, T) float32, since the previous and since the first event of the sequence.
        age_days: (B, T) float32, since birth; NaN where the record does not tell it.
        values: (B, T) float32, NaN = none; None when the vocabulary carries no values.
        is_event: (B, T) bool, False = padding.
        is_static: (B, T) bool, an event without a time, which stands before the timed ones.
        is_next: (B, T) bool, a timed event whose predecessor in the record stands before it in the same sequence.
        segments: (B, T) int32, equal within a sequence of a packed row, 0 = padding; None where a row is one sample.
        event_index: (B, T) int64, number of the event within its sequence; None where a row is one sample.
        labels: (B,) int64 or (B, L) float32.
        sample: (B,) int64, position in the split's samples (of a packed row: its number).
    """

    token_ids: Tensor
    days: Tensor
    gap_days: Tensor
    elapsed_days: Tensor
    age_days: Tensor
    values: Tensor | None
    is_event: Tensor
    is_static: Tensor
    is_next: Tensor
    segments: Tensor | None
    event_index: Tensor | None
    labels: Tensor
    sample: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies do not block where memory is pinned."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by the DataLoader)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {name: None if x is None else function(x) for name, x in tensors.items()}
        return Batch(**mapped)


class EventDataset(Protocol):
    """What the trainer takes batches from."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(n,) events in each row."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: npt.NDArray[np.int64]) -> Batch:
        """The rows at `index`, (B,)."""
        ...


class BatchDataset(Dataset[Batch]):
    """Gathers a whole batch at once: `dataset[indices]` is a `Batch`, with no loop over samples."""

    def __init__(self, events: SplitEvents, samples: Samples) -> None:
        self.events = events
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(n,) events in each row."""
        return self.samples.lengths

    def __getitem__(self, index: npt.NDArray[np.int64]) -> Batch:
        chosen = self.samples.take(index)
        lengths = chosen.lengths
        position_T = np.arange(padded_length(lengths.max()))
        n_static = (chosen.static_stop - chosen.static_start)[:, None]
        is_event_BT = position_T < lengths[:, None]
        event_BT = (
            np.where(position_T < n_static, chosen.static_start[:, None], chosen.start[:, None] - n_static) + position_T
        )
        sample_BT = np.broadcast_to(np.arange(len(chosen))[:, None], event_BT.shape)
        return gather(self.events, chosen, event_BT, sample_BT, is_event_BT, sample=np.asarray(index, np.int64))


class PackedDataset(Dataset[Batch]):
    """Rows filled with several sequences one after the other, so that hardly any place is padding.

    Args:
        events: the split's events.
        samples: the sequences, row after row.
        row: (n,) int64, ascending, the row of each sequence.
    """

    def __init__(self, events: SplitEvents, samples: Samples, row: npt.NDArray[np.int64]) -> None:
        self.events, self.samples = events, samples
        n_rows = int(row[-1]) + 1
        self.first = np.searchsorted(row, np.arange(n_rows + 1))
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(samples.lengths)])
        self.lengths = np.diff(ends[self.first])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: npt.NDArray[np.int64]) -> Batch:
        counts = np.diff(self.first)[index]
        sequences = ragged_arange(self.first[index], counts)
        chosen = self.samples.take(sequences)
        lengths, row_of = chosen.lengths, np.repeat(np.arange(len(index)), counts)
        n_static = chosen.static_stop - chosen.static_start
        before_sequence = np.cumsum(lengths) - lengths
        row_lengths = self.lengths[index]
        before_row = np.cumsum(row_lengths) - row_lengths

        sequence_N = np.repeat(np.arange(len(chosen)), lengths)
        position_N = np.arange(len(sequence_N)) - before_sequence[sequence_N]
        is_static_N = position_N < n_static[sequence_N]
        origin_N = np.where(is_static_N, chosen.static_start[sequence_N], (chosen.start - n_static)[sequence_N])
        row_N = row_of[sequence_N]
        column_N = np.arange(len(sequence_N)) - before_row[row_N]

        shape = (len(index), padded_length(row_lengths.max()))
        event_BT, sequence_BT = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        is_event_BT = np.zeros(shape, bool)
        event_BT[row_N, column_N] = origin_N + position_N
        sequence_BT[row_N, column_N] = sequence_N
        is_event_BT[row_N, column_N] = True
        segments_BT = np.where(is_event_BT, sequence_BT + 1, 0).astype(np.int32)
        return gather(
            self.events, chosen, event_BT, sequence_BT, is_event_BT, sample=np.asarray(index, np.int64),
            segments_BT=segments_BT,
        )  # fmt: skip


def gather(
    events: SplitEvents,
    samples: Samples,
    event_BT: npt.NDArray[np.int64],
    sample_BT: npt.NDArray[np.int64],
    is_event_BT: npt.NDArray[np.bool_],
    *,
    sample: npt.NDArray[np.int64],
    segments_BT: npt.NDArray[np.int32] | None = None,
) -> Batch:
    """The batch whose place (b, t) holds event `event_BT[b, t]`, seen by sample `sample_BT[b, t]` of `samples`."""
    event_BT = np.where(is_event_BT, event_BT, 0)
    token_ids_BT = events.token_ids[event_BT]
    token_ids_BT[~is_event_BT] = 0
    times_BT = events.times[event_BT]
    is_timed_BT = is_event_BT & (times_BT != STATIC_TIME)
    has_timed = samples.start < samples.stop
    first_time = np.where(has_timed, events.times[np.where(has_timed, samples.start, 0)], samples.prediction_times)
    times_BT = np.where(is_timed_BT, times_BT, first_time[sample_BT])
    days_BT = (samples.prediction_times[sample_BT] - times_BT) / MICROSECONDS_PER_DAY
    days_BT[~is_event_BT] = 0
    continues_BT = is_event_BT.copy()
    continues_BT[:, 0] = False
    continues_BT[:, 1:] &= sample_BT[:, 1:] == sample_BT[:, :-1]
    is_next_BT = continues_BT & is_timed_BT
    is_next_BT[:, 1:] &= event_BT[:, 1:] == event_BT[:, :-1] + 1
    # From whole microseconds: of two days as float32, counted from a distant end, a difference would lose minutes.
    gap_BT = np.where(continues_BT, np.diff(times_BT, axis=1, prepend=times_BT[:, :1]), 0) / MICROSECONDS_PER_DAY
    place_T = np.arange(event_BT.shape[1])
    first_BT = np.maximum.accumulate(np.where(continues_BT, 0, place_T), axis=1)
    elapsed_BT = (times_BT - np.take_along_axis(times_BT, first_BT, axis=1)) / MICROSECONDS_PER_DAY
    elapsed_BT[~is_event_BT] = 0
    birth_BT = samples.birth_times[sample_BT]
    # An event before the birth has no age: a negative one would tell of a birth that the sample may not see yet.
    is_aged_BT = is_event_BT & (birth_BT != STATIC_TIME) & (times_BT >= birth_BT)
    age_BT = np.where(is_aged_BT, (times_BT - birth_BT) / MICROSECONDS_PER_DAY, np.nan)
    values_BT = None
    if events.values is not None:
        values_BT = events.values[event_BT]
        values_BT[~is_event_BT] = np.nan
    return Batch(
        token_ids=torch.from_numpy(token_ids_BT),
        days=torch.from_numpy(days_BT.astype(np.float32)),
        gap_days=torch.from_numpy(gap_BT.astype(np.float32)),
        elapsed_days=torch.from_numpy(elapsed_BT.astype(np.float32)),
        age_days=torch.from_numpy(age_BT.astype(np.float32)),
        values=None if values_BT is None else torch.from_numpy(values_BT),
        is_event=torch.from_numpy(is_event_BT),
        is_static=torch.from_numpy(is_event_BT & ~is_timed_BT),
        is_next=torch.from_numpy(is_next_BT),
        segments=None if segments_BT is None else torch.from_numpy(segments_BT),
        event_index=None if segments_BT is None else torch.from_numpy(place_T - first_BT),
        labels=torch.from_numpy(samples.labels if segments_BT is None else np.zeros(len(sample), np.int64)),
        sample=torch.from_numpy(sample),
    )


def padded_length(lengths: Any) -> Any:
    """Lengths rounded up to a multiple of `LENGTH_MULTIPLE`.

    >>> padded_length(np.array([1, 8, 9])).tolist()
    [8, 8, 16]
    """
    return -(-lengths // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


class BucketSampler(Sampler[npt.NDArray[np.int64]]):
    """Index arrays of batches whose samples have similar lengths.

    A batch holds at most `batch_size` samples and, padded, at most `batch_tokens` events. With `shuffle` the samples are
    shuffled, sorted by length within groups of `BUCKET_BATCHES` batches, and the batches shuffled, anew for every epoch
    from (seed, epoch). Over several processes every rank takes the same number of batches, since each waits for the others;
    where they do not divide, the last few are dropped with `shuffle`, and without it some ranks repeat others' (see `n_own`).

    Raises:
        UserError: a sample is longer than `batch_tokens`.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int64],
        *,
        batch_size: int,
        batch_tokens: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"trainer.batch_size={batch_size}: expected 1 or more samples.")
        self.padded = padded_length(lengths)
        if len(lengths) and self.padded.max() > batch_tokens:
            raise UserError(
                f"trainer.batch_tokens={batch_tokens} is less than the longest sample, {self.padded.max()} events. "
                f"Type: trainer.batch_tokens={self.padded.max()} or more, or a smaller model.max_length"
            )
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.shuffle, self.seed, self.epoch, self.first = shuffle, seed, 0, 0
        self.rank, self.world_size = rank, world_size

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch whose order is drawn next, and the first of this rank's batches to be taken."""
        self.epoch, self.first = epoch, first

    def batches(self) -> list[npt.NDArray[np.int64]]:
        """All batches of the epoch, over all ranks."""
        n = len(self.padded)
        if not self.shuffle:
            return self._cut(np.argsort(self.padded, kind="stable"))
        rng = np.random.default_rng([self.seed, self.epoch])
        order, group = rng.permutation(n), BUCKET_BATCHES * self.batch_size
        groups = [order[i : i + group] for i in range(0, n, group)]
        batches = [batch for part in groups for batch in self._cut(part[np.argsort(self.padded[part], kind="stable")])]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _cut(self, order: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Cut samples in ascending order of length; the longest of a batch is its last."""
        batches, start = [], 0
        for stop in range(1, len(order) + 1):
            full = stop - start == self.batch_size or stop == len(order)
            if full or (stop - start + 1) * self.padded[order[stop]] > self.batch_tokens:
                batches.append(order[start:stop])
                start = stop
        return batches

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        return iter(self._own()[self.first :])

    def __len__(self) -> int:
        """Batches of this rank in the current epoch, those before `first` included."""
        return len(self._own())

    @property
    def n_own(self) -> int:
        """This rank's batches that are no repetition of another's; those come last."""
        return len(self.batches()[self.rank :: self.world_size])

    def _own(self) -> list[npt.NDArray[np.int64]]:
        batches = self.batches()
        n_each = len(batches) // self.world_size if self.shuffle else -(-len(batches) // self.world_size)
        return [batches[(self.rank + i * self.world_size) % len(batches)] for i in range(n_each)]


def batch_loader(
    dataset: EventDataset, sampler: BucketSampler, *, num_workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """A DataLoader that yields whole batches; `num_workers=0` builds them in this process."""
    return DataLoader(
        cast("Dataset[Batch]", dataset),
        batch_size=None, sampler=sampler, num_workers=num_workers, pin_memory=pin_memory,
    )  # fmt: skip
