"""Batches of a split for the training loop: which samples a process reads in an epoch, in which order, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ehr_embed.core.errors import UserError
from ehr_embed.data.batches import EventDataset, batch_loader
from ehr_embed.data.bucket_sampler import BucketSampler
from ehr_embed.data.samples import Samples
from ehr_embed.tasks.protocol import Task
from ehr_embed.tasks.set_up import dataset_of
from ehr_embed.training.processes import Processes
from ehr_embed.training.settings import TrainerSettings


class SplitBatches:
    """Batches of the splits of a task, as one process reads them.

    Args:
        task: after `setup`.
        settings: sizes of a batch, and how batches are loaded.
        processes: the processes that share the batches.
        seed: seed of the order of the batches, and of what the task draws for an epoch.

    Attributes:
        weigh: returns the weights (n,), of mean 1, of the samples of n subjects: training draws samples by these weights, with
            replacement; None = each sample once per epoch.
    """

    def __init__(self, task: Task, settings: TrainerSettings, processes: Processes, *, seed: int) -> None:
        self._task, self._settings, self._processes, self._seed = task, settings, processes, seed
        self.weigh: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]] | None = None

    def n_of_epoch(self, epoch: int) -> int:
        """Return the number of this process's batches in a training epoch."""
        return len(self._sampler(self._dataset("train", epoch), epoch, 0))

    def loader(self, split: str, epoch: int | None = None, first: int = 0) -> Any:
        """Return the batches of a split: of a training epoch in random order from batch `first` on, else in order of length."""
        dataset = self._dataset(split, epoch)
        return batch_loader(
            dataset,
            self._sampler(dataset, epoch, first),
            num_workers=self._settings.num_workers,
            device=self._processes.fabric.device,
            data_device=self._settings.data_device,
            prefetch=self._settings.prefetch,
        )

    def _dataset(self, split: str, epoch: int | None) -> EventDataset:
        """Return the samples of a split; of a training epoch with what the task draws for that epoch."""
        return dataset_of(self._task, split, None if epoch is None else np.random.default_rng([self._seed, epoch]))

    def _sampler(self, dataset: EventDataset, epoch: int | None, first: int) -> BucketSampler:
        """Return the rows of each batch of this process; `epoch` and `first` are those of `loader`."""
        sampler = BucketSampler(
            dataset.lengths,
            batch_size=self._settings.batch_size,
            batch_tokens=self._settings.most_batch_tokens,
            shuffle=epoch is not None,
            bucket_batches=self._settings.bucket_batches,
            seed=self._seed,
            rank=self._processes.rank,
            world_size=self._processes.size,
            weights=None if epoch is None else self._weights(dataset),
        )
        sampler.set_epoch(epoch or 0, first)
        return sampler

    def _weights(self, dataset: EventDataset) -> npt.NDArray[np.float64] | None:
        """Return the weights (n,) by which the samples of an epoch are drawn; None = each once.

        Raises:
            UserError: the rows are no samples, but pieces of several records.
        """
        if self.weigh is None:
            return None
        samples = getattr(dataset, "samples", None)
        if not isinstance(samples, Samples) or len(samples) != len(dataset):
            raise UserError(
                "data.pool_weights=datasets draws samples, and this task packs pieces of several records into each row. Type: "
                "data.pool_weights=samples"
            )
        return self.weigh(samples.subject_ids)
