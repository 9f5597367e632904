"""A split's events as tensors: over the memory map, or held whole on a GPU, where batches are then gathered."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy.typing as npt
import torch
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.data.store import SplitEvents

log = logging.getLogger(__name__)
DATA_DEVICES = ("auto", "host", "device")
HELD_SHARE = 0.25
"""Of a GPU's memory that is free but for events, what `auto` gives to those of all splits; training needs the rest."""
GIB = 2**30


@dataclass(frozen=True)
class EventTensors:
    """The arrays of `SplitEvents` that have a number an event, on one device.

    Attributes:
        token_ids: (N,) int32.
        times: (N,) int64, microseconds since 1970-01-01, `STATIC_TIME` for static events.
        values: (N,) float32 or None.
    """

    token_ids: Tensor
    times: Tensor
    values: Tensor | None


_held: WeakKeyDictionary[SplitEvents, dict[torch.device, EventTensors]] = WeakKeyDictionary()
# Beside the events and not in them, so that a worker process is not sent what is held here.


def event_tensors(events: SplitEvents, device: torch.device) -> EventTensors:
    """The events on `device`, copied there once for as long as they are in use; on the CPU they share the arrays' memory."""
    found = _held.setdefault(events, {})
    if device not in found:
        values = None if events.values is None else _tensor(events.values, device)
        found[device] = EventTensors(_tensor(events.token_ids, device), _tensor(events.times, device), values)
        if device.type == "cuda":
            log.info(
                "%d events (%.2f GiB) are held on %s: batches are gathered there, whatever trainer.num_workers is",
                len(events.times), n_bytes(events) / GIB, device,
            )  # fmt: skip
    return found[device]


def is_gathered_there(events: SplitEvents, device: torch.device, wanted: str) -> bool:
    """Whether batches for `device` are gathered on it, from events held there, and not on the host.

    Args:
        wanted: `host` (no), `device` (yes), or `auto`: on a GPU, if with those already held they take at most `HELD_SHARE` of
            the memory that is free but for them.

    Raises:
        UserError: `device` where the events do not fit, or on a device that cannot count days exactly.
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
    """What the events take on a device."""
    arrays = (events.token_ids, events.times, events.values)
    return sum(array.nbytes for array in arrays if array is not None)


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that no tensor and no other process has; what torch keeps for later tensors is free too."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _tensor(array: npt.NDArray, device: torch.device) -> Tensor:
    # Tensors of evaluation's inference mode could not be used in training.
    with warnings.catch_warnings(), torch.inference_mode(False):
        # Nothing writes to the tensor, and a writable map would have to fit the machine's memory.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array).to(device)
