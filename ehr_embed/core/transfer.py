"""Give a device numbers and count on it without making the host wait.

A host that reads a number back from a GPU waits until the GPU has finished all queued work, and the GPU then idles until the host
has queued more. Where a size depends on the data, a step on a GPU therefore computes with an upper bound that the host knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_copies: Any = WeakTensorKeyDictionary()


def sent(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers (an array, a tensor or a list) that change with each batch as a tensor on `device`.

    The numbers go through page-locked memory, because a GPU's copy from other memory makes the host wait until the GPU has
    finished its queued work.

    >>> sent([1, 2], torch.device("cpu")), sent(np.zeros(2), torch.device("cpu"), torch.float32).dtype
    (tensor([1, 2]), torch.float32)
    """
    x = torch.from_numpy(numbers) if isinstance(numbers, np.ndarray) else torch.as_tensor(numbers)
    x = x if dtype is None else x.to(dtype)
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def kept_on(device: torch.device, x: Tensor) -> Tensor:
    """Return a tensor that never changes, such as class weights, on `device`; the copy is made once and kept as long as `x` is.

    >>> weights = torch.ones(3)
    >>> kept_on(torch.device("meta"), weights) is kept_on(torch.device("meta"), weights)
    True
    """
    if x.device == device:
        return x
    copies = _copies.setdefault(x, {})
    if device not in copies:
        with torch.inference_mode(False):  # a copy made in an evaluation could not be used in training
            copies[device] = x.to(device)
    found: Tensor = copies[device]
    return found


def reads_freely(device: torch.device) -> bool:
    """Return whether a number can be read back from a device without waiting; only the host's own memory is like that."""
    return device.type == "cpu"


def places_of(mask: Tensor, n_most: int) -> Tensor:
    """Return the indices (n_most,) int64 of the first True entries of a mask (F,), ascending, then -1; nothing is read back.

    >>> places_of(torch.tensor([False, True, False, True]), 3).tolist()
    [1, 3, -1]
    """
    rank = mask.long().cumsum(0) - 1
    slot = torch.where(mask, rank, n_most).clamp(max=n_most)
    found = torch.full((n_most + 1,), -1, dtype=torch.int64, device=mask.device)
    return found.scatter(0, slot, torch.arange(len(mask), device=mask.device))[:n_most]


def grouped(key: Tensor, fill: int) -> tuple[Tensor, Tensor]:
    """Return the distinct keys in ascending order, then `fill`, (N,), and the number of each key's group, (N,), of keys (N,).

    It is `unique(return_inverse=True)` with a result as long as the input, so that nothing is read back.

    >>> [x.tolist() for x in grouped(torch.tensor([7, 3, 7]), 9)]
    [[3, 7, 9], [1, 0, 1]]
    """
    ordered, order = key.sort(stable=True)
    number = torch.zeros_like(ordered)
    number[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    distinct = torch.full_like(ordered, fill).scatter(0, number, ordered)
    return distinct, torch.empty_like(number).scatter(0, order, number)
