"""Batches without padding: the events of all sequences one after the other, so that no product is spent on a place without one.

Shapes: B rows, T places a row, N events of all rows, S sequences, D model, H heads, K head width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ehr_embed.core.errors import UserError

log = logging.getLogger(__name__)
WIDEST_HEAD = 192
"""The kernel's forward pass takes 256, but above 192 some GPUs (compute capability 8.6, 8.9, 12.0) have no backward pass."""
CAPABILITY = (8, 0)
"""Of the GPU, at least: the kernel is FlashAttention, which begins with Ampere."""


@dataclass(frozen=True)
class Packing:
    """Where the events of a padded batch are, and which of them see each other. Nothing here waits for the device.

    Attributes:
        places: (N,) int64, b * T + t of every event, ascending.
        starts: (S + 1,) int32, how many of the N events stand before each sequence, and N.
        longest: events that no sequence exceeds, such as T.
        is_causal: whether an event sees itself and those before it, or all of its sequence.
        at_once: whether torch's kernel is used; without it one sequence after the other attends, which waits for the device.
    """

    places: Tensor
    starts: Tensor
    longest: int
    is_causal: bool
    at_once: bool = False

    def pack(self, x: Tensor) -> Tensor:
        """The events of (B, T, ...), (N, ...)."""
        return x.flatten(0, 1).index_select(0, self.places)

    def unpack(self, x_ND: Tensor, n_rows: int, n_places: int) -> Tensor:
        """(N, D) -> (B, T, D), zero where there is no event."""
        padded = x_ND.new_zeros(n_rows * n_places, x_ND.shape[-1])
        return padded.index_copy(0, self.places, x_ND).view(n_rows, n_places, -1)

    def with_first(self, n_rows: int, n_places: int) -> Packing:
        """The packing once each of B rows of T places, a sequence each, has got an element in front: of (B, T + 1)."""
        row_B = torch.arange(n_rows, device=self.places.device)
        moved_N = self.places + self.places // n_places + 1
        # Sorted, because finding them in a mask would wait for the device to count them.
        places = torch.cat([row_B * (n_places + 1), moved_N]).sort().values
        starts = self.starts + torch.arange(n_rows + 1, device=self.starts.device, dtype=self.starts.dtype)
        return replace(self, places=places, starts=starts, longest=self.longest + 1)

    def attend(self, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor) -> Tensor:
        """Attention within each sequence, (N, H, K)."""
        return (attend_at_once if self.at_once else attend_one_by_one)(q_NHK, k_NHK, v_NHK, self)


Attend = Callable[[Tensor, Tensor, Tensor, Packing], Tensor]


def packing_of(inputs: dict[str, Tensor], *, is_causal: bool) -> Packing | None:
    """The packing of a model's inputs; None where they do not say it with `places` and `sequence_starts`.

    A row is one sequence; several where the model is causal and the inputs have `segments`.

    Raises:
        UserError: they are of another number of rows than the batch.
    """
    if "places" not in inputs:
        return None
    n_rows, n_places = inputs["padding_mask"].shape
    starts = inputs["sequence_starts"]
    has_segments = is_causal and "segments" in inputs
    if len(starts) != n_rows + 1 and not has_segments:
        raise UserError(
            f"sequence_starts of {len(starts) - 1} sequences, but the batch has {n_rows} rows of one sequence each: rows were "
            "added or left out, or hold several sequences. Leave places and sequence_starts out of the inputs."
        )
    return Packing(inputs["places"], starts, n_places, is_causal)


def kernel_takes(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether `attend_at_once` is used there: a GPU whose kernel was seen to be right, 16 bits, heads whose width is a multiple of
    8 up to 192."""
    is_half, is_width = dtype in (torch.bfloat16, torch.float16), head_width % 8 == 0 and head_width <= WIDEST_HEAD
    return is_half and is_width and has_kernel(device) and is_right(device, dtype, head_width)


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether torch's kernel for sequences of different lengths runs on a device; not tried on AMD's."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    is_built = torch.backends.cuda.is_flash_attention_available()
    return is_nvidia and is_built and torch.cuda.get_device_capability(device) >= CAPABILITY


@cache
def is_right(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether the kernel agrees with `attend_one_by_one`, forward and backward, on a few small sequences; tried once.

    A kernel that a version of torch or a GPU does not have, or has wrong, costs speed then, and no run.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 20]
    starts = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    values = torch.randn(4, sum(lengths), 2, head_width, generator=generator).to(device, dtype)
    places = torch.arange(sum(lengths), device=device)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for is_causal in (False, True):
                packing = Packing(places, starts, max(lengths), is_causal)
                found = [_with_gradients(function, values, packing) for function in (attend_at_once, attend_one_by_one)]
                for at_once, one_by_one in zip(*found, strict=True):
                    torch.testing.assert_close(at_once, one_by_one, rtol=0.05, atol=0.05)
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        log.warning(
            "torch's attention for packed sequences does not work on %s in %s with heads of width %d (%s): batches keep their "
            "padding, which is slower and gives the same results",
            device, dtype, head_width, str(error).strip().partition("\n")[0],
        )  # fmt: skip
        return False
    return True


def _with_gradients(function: Attend, values: Tensor, packing: Packing) -> list[Tensor]:
    """Attention of the first three of `values` (4, N, H, K), and its gradients by the fourth."""
    q, k, v = (x.clone().requires_grad_() for x in values[:3])
    attended = function(q, k, v, packing)
    attended.backward(values[3])
    return [attended.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def attend_at_once(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, packing: Packing) -> Tensor:
    """Attention within each sequence in one kernel, (N, H, K); see `kernel_takes`."""
    # Imported here, since it loads torch's compiler and takes a second.
    from torch.nn.attention.varlen import varlen_attn

    lengths = (packing.starts, packing.starts, packing.longest, packing.longest)
    attended = varlen_attn(q_NHK, k_NHK, v_NHK, *lengths, window_size=(-1, 0 if packing.is_causal else -1))
    assert isinstance(attended, Tensor)  # it returns more only on request
    return attended


def attend_one_by_one(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, packing: Packing) -> Tensor:
    """The same in plain words, on any device and in any type, (N, H, K)."""
    lengths = packing.starts.diff().tolist()
    # (1, H, length, K), since torch has its fused kernels for four dimensions only.
    q, k, v = ([x.transpose(0, 1)[None] for x in y_NHK.split(lengths)] for y_NHK in (q_NHK, k_NHK, v_NHK))
    attended = [
        F.scaled_dot_product_attention(*sequence, is_causal=packing.is_causal) for sequence in zip(q, k, v, strict=True)
    ]
    return torch.cat(attended, dim=2)[0].transpose(0, 1)


def product_dtype(weight: Tensor) -> torch.dtype:
    """The type that products with a weight come out in: autocast's where it is on, else the weight's own."""
    device = weight.device.type
    if device == "meta":  # which has no autocast
        return weight.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
