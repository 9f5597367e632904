"""Decide which samples meet in a batch: samples of similar length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from ehr_embed.core.errors import UserError
from ehr_embed.data.batches import padded_length

BUCKET_BATCHES = 64
"""Number of batches whose samples are sorted by length together, after the samples were shuffled, unless a setting says another."""


class BucketSampler(Sampler[npt.NDArray[np.int64]]):
    """Yield index arrays of batches whose samples have similar lengths.

    With `shuffle`, each epoch shuffles the samples, sorts them by length within groups of `bucket_batches` batches, and
    shuffles the batches; the order depends on (seed, epoch) alone. Every rank takes the same number of batches, since
    the ranks wait for each other in each step. If the number of batches is no multiple of the number of ranks, the last
    few are dropped with `shuffle`; without it some ranks repeat batches of others (see `n_own`).

    Args:
        lengths: (n,) events of each sample.
        batch_size: largest number of samples of a batch; None = no limit.
        batch_tokens: largest number of events of a batch, padding included.
        shuffle: whether to draw the order anew for every epoch; if False, batches are in order of length.
        bucket_batches: batches whose samples are sorted together; 1 = any samples may meet in a batch.
        seed: seed of the order.
        rank, world_size: number of this process, and number of processes that share the batches.
        weights: (n,) with `shuffle`, n samples are drawn by these weights, with replacement; None = each once.

    Raises:
        UserError: a sample is longer than `batch_tokens`.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int64],
        *,
        batch_size: int | None,
        batch_tokens: int,
        shuffle: bool,
        bucket_batches: int = BUCKET_BATCHES,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        weights: npt.NDArray[np.float64] | None = None,
    ) -> None:
        self._shares = None if weights is None else weights / weights.sum()
        if batch_size is not None and batch_size < 1:
            raise UserError(f"trainer.batch_size={batch_size}: expected 1 or more samples.")
        self.padded = padded_length(lengths)
        if len(lengths) and self.padded.max() > batch_tokens:
            raise UserError(
                f"trainer.batch_tokens={batch_tokens} is less than the longest sample, {self.padded.max()} events. "
                f"Type: trainer.batch_tokens={self.padded.max()} or more, or a smaller model.max_length"
            )
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.shuffle, self.bucket_batches = shuffle, bucket_batches
        self.seed, self.epoch, self.first = seed, 0, 0
        self.rank, self.world_size = rank, world_size
        self._batches: list[npt.NDArray[np.int64]] | None = None

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch whose order is drawn next, and the number of this rank's first batches to be left out."""
        self.epoch, self.first, self._batches = epoch, first, None

    def batches(self) -> list[npt.NDArray[np.int64]]:
        """Return the epoch's batches of all ranks; they are drawn once per epoch, since that sorts every sample."""
        if self._batches is None:
            self._batches = self._drawn()
        return self._batches

    def _drawn(self) -> list[npt.NDArray[np.int64]]:
        n = len(self.padded)
        if not self.shuffle:
            return self._cut(np.argsort(self.padded, kind="stable"))
        rng = np.random.default_rng([self.seed, self.epoch])
        in_batch = self.batch_size or max(1, int(self.batch_tokens * n // max(1, self.padded.sum())))
        order = rng.permutation(n) if self._shares is None else rng.choice(n, size=n, p=self._shares)
        group = self.bucket_batches * in_batch
        groups = [order[i : i + group] for i in range(0, n, group)]
        batches = [batch for part in groups for batch in self._cut(part[np.argsort(self.padded[part], kind="stable")])]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _cut(self, order: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Cut samples in ascending order of padded length into batches; the last sample of a batch is its longest.

        The loop is over the distinct padded lengths, of which there are few: samples of one length fill equal batches.
        """
        padded, n = self.padded[order], len(order)
        if not n:
            return []
        run_starts = np.flatnonzero(np.diff(padded, prepend=-1))
        run_stops = np.append(run_starts[1:], n)
        sizes = np.minimum(self.batch_size or n, self.batch_tokens // padded[run_starts])
        stops, start = [], 0
        for run_start, run_stop, size in zip(run_starts.tolist(), run_stops.tolist(), sizes.tolist(), strict=True):
            if run_start - start >= size:  # a sample of this length would exceed the limits of the open batch
                stops.append(np.array([run_start]))
                start = run_start
            full = np.arange(start + size, run_stop + 1, size)
            stops.append(full)
            start += size * len(full)
        stops.append(np.array([n] if start < n else [], np.int64))
        every = np.concatenate(stops).tolist()
        return [order[begin:stop] for begin, stop in zip([0, *every[:-1]], every, strict=True)]

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        return iter(self._own()[self.first :])

    def __len__(self) -> int:
        """Return the number of this rank's batches in the current epoch, those before `first` included."""
        return len(self._own())

    @property
    def n_own(self) -> int:
        """Return how many of this rank's batches repeat no batch of another rank; repetitions come last."""
        return len(self.batches()[self.rank :: self.world_size])

    def _own(self) -> list[npt.NDArray[np.int64]]:
        batches = self.batches()
        n_each = len(batches) // self.world_size if self.shuffle else -(-len(batches) // self.world_size)
        return [batches[(self.rank + i * self.world_size) % len(batches)] for i in range(n_each)]
