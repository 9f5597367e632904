"""Provide a split's events as tensors that share the store's memory map, or are held whole on a GPU."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Annotated
from weakref import WeakKeyDictionary

import numpy.typing as npt
import torch
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import OneOf
from ehr_embed.data.store import SplitEvents

log = logging.getLogger(__name__)
DataDevice = Annotated[str, OneOf("auto", "host", "device")]
HELD_SHARE = 0.25
"""Largest share of a GPU's free memory that `auto` gives to the events of all splits; training needs the rest."""
GIB = 2**30


@dataclass(frozen=True)
class EventTensors:
    """The arrays of `SplitEvents` that have one number per event, as tensors on one device.

    Attributes:
        token_ids: (N,) int32.
        times: (N,) int64, microseconds since 1970-01-01, `STATIC_TIME` for static events.
        values: (N,) float32 or None.
    """

    token_ids: Tensor
    times: Tensor
    values: Tensor | None


_held: WeakKeyDictionary[SplitEvents, dict[torch.device, EventTensors]] = WeakKeyDictionary()
# The tensors are no attribute of the events, since the events are pickled for worker processes.


def event_tensors(events: SplitEvents, device: torch.device) -> EventTensors:
    """Return the events on `device`; they are copied once and stay there while `events` is in use.

    On the CPU the tensors share the memory of the arrays.
    """
    found = _held.setdefault(events, {})
    if device not in found:
        values = None if events.values is None else _tensor(events.values, device)
        found[device] = EventTensors(_tensor(events.token_ids, device), _tensor(events.times, device), values)
        if device.type == "cuda":
            log.info(
                "%d events (%.2f GiB) are held on %s: batches are gathered there, and trainer.num_workers has no effect",
                len(events.times), n_bytes(events) / GIB, device,
            )  # fmt: skip
    return found[device]


def is_gathered_there(events: SplitEvents, device: torch.device, wanted: str) -> bool:
    """Return whether batches for `device` are gathered there, from events held there, rather than on the host.

    Args:
        events: the split's events.
        device: the device that will use the batches.
        wanted: `host` (no), `device` (yes), or `auto`: yes on a GPU if these events, together with those already held,
            take at most `HELD_SHARE` of the memory that would be free without any of them.

    Raises:
        UserError: `wanted` is `device` and the events do not fit there, or the device has no float64.
    """
    if wanted == "host" or (wanted == "auto" and device.type != "cuda"):
        return False
    if device.type not in ("cuda", "cpu"):
        raise UserError(
            f"trainer.data_device=device: {device.type} has no float64, without which times would be rounded. "
            "Type: trainer.data_device=host"
        )
    if device.type == "cpu" or device in _held.get(events, {}):
        return True
    needed, free = n_bytes(events), free_bytes(device)
    if wanted == "device" and needed > free:
        raise UserError(
            f"trainer.data_device=device: the events of a split take {needed / GIB:.2f} GiB, and {free / GIB:.2f} GiB of "
            f"{device} are free. Type: trainer.data_device=auto, which leaves on the host what does not fit"
        )
    held = sum(n_bytes(split) for split, places in _held.items() if device in places)
    return wanted == "device" or needed + held <= HELD_SHARE * (free + held)


def n_bytes(events: SplitEvents) -> int:
    """Return the bytes that the events take on a device."""
    arrays = (events.token_ids, events.times, events.values)
    return sum(array.nbytes for array in arrays if array is not None)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that no tensor and no other process uses.

    Memory that torch has reserved for later tensors counts as free.
    """
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _tensor(array: npt.NDArray, device: torch.device) -> Tensor:
    # Inference mode is switched off, since a tensor made in it, as by an evaluation, could not be used in training.
    with warnings.catch_warnings(), torch.inference_mode(False):
        # The map is read-only, since a writable map of private pages would have to fit in memory; nothing writes to the
        # tensor.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array).to(device)
