"""Read the next batch in a thread while the caller computes with this one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

END = object()


class PrefetchedLoader:
    """Yields the batches of a DataLoader in the same order, each read, gathered and page-locked by a thread one batch ahead.

    The main thread alone draws random numbers, so that a run with this loader equals one without. An error of the thread is raised
    where its batch would have come.

    Args:
        loader: builds its batches in this process.
        device: the GPU for which batches are page-locked, or the CPU.

    Attributes:
        dataset, sampler: those of the loader.
    """

    def __init__(self, loader: DataLoader[Any], device: torch.device) -> None:
        self._loader, self._device = loader, device
        self.dataset, self.sampler = loader.dataset, loader.sampler

    def __iter__(self) -> Iterator[Any]:
        """Begin to read: the loader draws one random number here, as it would without the thread."""
        return _ahead(iter(self._loader), self._device)


def _ahead(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    # A thread begins with the first GPU.
    choose = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, thread_name_prefix="next batch", initializer=choose) as pool:
        coming = pool.submit(next, batches, END)
        while (batch := coming.result()) is not END:
            coming = pool.submit(next, batches, END)
            yield batch
