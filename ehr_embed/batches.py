"""Length-bucketed batches, built by vectorised gathers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ehr_embed.errors import UserError
from ehr_embed.samples import Samples
from ehr_embed.store import STATIC_TIME, SplitEvents

MICROSECONDS_PER_DAY = 86_400_000_000
LENGTH_MULTIPLE = 8
"""Sequences are padded to a multiple of this: few distinct shapes, and whole vector registers."""
BUCKET_BATCHES = 64
"""Batches' worth of shuffled samples that are sorted by length together."""


@dataclass(frozen=True)
class Batch:
    """B samples of up to T events.

    Attributes:
        token_ids: (B, T) int32, 0 = padding.
        days: (B, T) float32, days before the prediction time; a static event has those of the first timed event.
        values: (B, T) float32, NaN = none; None when the vocabulary carries no values.
        is_event: (B, T) bool, False = padding.
        labels: (B,) int64 or (B, L) float32.
        sample: (B,) int64, position in the split's samples.
    """

    token_ids: Tensor
    days: Tensor
    values: Tensor | None
    is_event: Tensor
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


class BatchDataset(Dataset[Batch]):
    """Gathers a whole batch at once: `dataset[indices]` is a `Batch`, with no loop over samples."""

    def __init__(self, events: SplitEvents, samples: Samples) -> None:
        self.events = events
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: npt.NDArray[np.int64]) -> Batch:
        chosen = self.samples.take(index)
        lengths = chosen.lengths
        width = -(-int(lengths.max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        position_T = np.arange(width)
        n_static = (chosen.static_stop - chosen.static_start)[:, None]
        is_static_BT = position_T < n_static
        is_event_BT = position_T < lengths[:, None]
        event_BT = np.where(is_static_BT, chosen.static_start[:, None], chosen.start[:, None] - n_static) + position_T
        event_BT[~is_event_BT] = 0

        token_ids_BT = self.events.token_ids[event_BT]
        token_ids_BT[~is_event_BT] = 0
        times_BT = self.events.times[event_BT]
        is_timed_BT = is_event_BT & (times_BT != STATIC_TIME)
        ago_BT = np.where(is_timed_BT, (chosen.prediction_times[:, None] - times_BT) / MICROSECONDS_PER_DAY, 0.0)
        days_BT = np.where(is_event_BT & ~is_timed_BT, ago_BT.max(axis=1, keepdims=True), ago_BT)
        values_BT = None
        if self.events.values is not None:
            values_BT = self.events.values[event_BT]
            values_BT[~is_event_BT] = np.nan
        return Batch(
            token_ids=torch.from_numpy(token_ids_BT),
            days=torch.from_numpy(days_BT.astype(np.float32)),
            values=None if values_BT is None else torch.from_numpy(values_BT),
            is_event=torch.from_numpy(is_event_BT),
            labels=torch.from_numpy(chosen.labels),
            sample=torch.from_numpy(np.asarray(index, np.int64)),
        )


class BucketSampler(Sampler[npt.NDArray[np.int64]]):
    """Index arrays of batches whose samples have similar lengths.

    A batch holds at most `batch_size` samples and, padded, at most `batch_tokens` events. With `shuffle` the samples are
    shuffled, sorted by length within groups of `BUCKET_BATCHES` batches, and the batches shuffled, anew for every epoch
    from (seed, epoch). Over several processes every rank takes the same number of batches; in training the last few are
    dropped where they do not divide, without `shuffle` they are kept (ranks may differ by one).

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
        self.padded = -(-lengths // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        if len(lengths) and self.padded.max() > batch_tokens:
            raise UserError(
                f"trainer.batch_tokens={batch_tokens} is less than the longest sample, {self.padded.max()} events. "
                f"Type: trainer.batch_tokens={self.padded.max()} or more, or a smaller model.max_length"
            )
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self.rank, self.world_size = rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is drawn next."""
        self.epoch = epoch

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
        batches = self.batches()
        if self.shuffle and self.world_size > 1:
            batches = batches[: len(batches) // self.world_size * self.world_size]
        return iter(batches[self.rank :: self.world_size])

    def __len__(self) -> int:
        """Batches of this rank in the current epoch."""
        return sum(1 for _ in self)


def batch_loader(
    dataset: BatchDataset, sampler: BucketSampler, *, num_workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """A DataLoader that yields whole batches; `num_workers=0` builds them in this process."""
    return DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=num_workers, pin_memory=pin_memory)
