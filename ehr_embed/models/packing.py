"""Packed batches: the events of all sequences one after the other, so that no computation is spent on padding.

Shapes: B rows, T places per row, N events of all rows, S sequences, D model width, H heads, K head width.
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
from ehr_embed.models.cpu_attention import applies, cpu_attention

log = logging.getLogger(__name__)
WIDEST_HEAD = 192
"""Widest head that the kernel is used for. Its forward pass supports 256, but above 192 some GPUs (compute capability
8.6, 8.9, 12.0) have no backward pass."""
CAPABILITY = (8, 0)
"""Least compute capability of the GPU, that of Ampere, from which on FlashAttention runs."""
LEAST_PADDING, LEAST_IN_16_BITS, LONG = 0.1, 0.2, 256
"""Least share of padding, and in 16 bits least share and least length in events, from which on packing pays on a CPU."""


@dataclass(frozen=True)
class Packing:
    """Describes where the events of a padded batch are, and which events attend to each other.

    Only `attend` with `at_once=False` makes the host wait for the device.

    Attributes:
        places: (N,) int64, b * T + t for the event at row b and place t, ascending.
        starts: (S + 1,) int32, the number of events before each sequence, and N at the end.
        longest: upper bound of the events per sequence, such as T.
        n_places: number B * T of places of the padded batch.
        is_causal: whether an event attends only to itself and earlier events, or to its whole sequence.
        at_once: whether torch's kernel computes all sequences at once; otherwise they are computed one after the other.
    """

    places: Tensor
    starts: Tensor
    longest: int
    n_places: int
    is_causal: bool
    at_once: bool = False

    def pack(self, x: Tensor) -> Tensor:
        """Return the events of a padded tensor, (B, T, ...) -> (N, ...)."""
        return x.flatten(0, 1).index_select(0, self.places)

    def unpack(self, x_ND: Tensor, n_rows: int, n_places: int) -> Tensor:
        """Return the padded tensor, (N, D) -> (B, T, D), with zeros at padding."""
        padded = x_ND.new_zeros(n_rows * n_places, x_ND.shape[-1])
        return padded.index_copy(0, self.places, x_ND).view(n_rows, n_places, -1)

    def with_first(self, n_rows: int, n_places: int) -> Packing:
        """Return the packing of (B, T + 1) rows that have one more element in front; each row is one sequence."""
        row_B = torch.arange(n_rows, device=self.places.device)
        moved_N = self.places + self.places // n_places + 1
        # Sorting gives the places without waiting for the device, which counting the True entries of a mask would do.
        places = torch.cat([row_B * (n_places + 1), moved_N]).sort().values
        starts = self.starts + torch.arange(n_rows + 1, device=self.starts.device, dtype=self.starts.dtype)
        return replace(self, places=places, starts=starts, longest=self.longest + 1, n_places=n_rows * (n_places + 1))

    def attend(self, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor) -> Tensor:
        """Return the attended values within each sequence, (N, H, K)."""
        return (attend_at_once if self.at_once else attend_one_by_one)(q_NHK, k_NHK, v_NHK, self)


Attend = Callable[[Tensor, Tensor, Tensor, Packing], Tensor]


def packing_of(inputs: dict[str, Tensor], *, is_causal: bool) -> Packing | None:
    """Return the packing of a model's inputs, or None for inputs without `places` and `sequence_starts`.

    A row is one sequence, or several if the model is causal and the inputs hold `segments`.

    Raises:
        UserError: `sequence_starts` belongs to another number of rows than the batch has.
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
    return Packing(inputs["places"], starts, n_places, n_rows * n_places, is_causal)


def kernel_takes(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Return whether `attend_at_once` supports a device, number format and head width.

    It needs a GPU whose kernel passed `is_right`, a 16-bit format, and a head width that is a multiple of 8 up to 192.
    """
    is_half, is_width = dtype in (torch.bfloat16, torch.float16), head_width % 8 == 0 and head_width <= WIDEST_HEAD
    return is_half and is_width and has_kernel(device) and is_right(device, dtype, head_width)


@cache
def has_kernel(device: torch.device) -> bool:
    """Return whether torch's kernel for sequences of different lengths runs on a device; AMD's GPUs are not tried."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    is_built = torch.backends.cuda.is_flash_attention_available()
    return is_nvidia and is_built and torch.cuda.get_device_capability(device) >= CAPABILITY


@cache
def is_right(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Return whether the kernel agrees with `attend_one_by_one`, forward and backward, on a few small sequences.

    The result is cached. If a kernel is missing or wrong in a version of torch or on a GPU, a run is slower but does
    not fail.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 20]
    starts = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    values = torch.randn(4, sum(lengths), 2, head_width, generator=generator).to(device, dtype)
    places = torch.arange(sum(lengths), device=device)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for is_causal in (False, True):
                packing = Packing(places, starts, max(lengths), sum(lengths), is_causal)
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
    """Return the attention of the queries, keys and values in `values` (4, N, H, K), and their gradients.

    The fourth entry of `values` is the gradient of the output.
    """
    q, k, v = (x.clone().requires_grad_() for x in values[:3])
    attended = function(q, k, v, packing)
    attended.backward(values[3])
    return [attended.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def attend_at_once(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, packing: Packing) -> Tensor:
    """Return the attended values within each sequence, (N, H, K), by one call of torch's kernel; see `kernel_takes`."""
    # The import is here because it loads torch's compiler and takes a second.
    from torch.nn.attention.varlen import varlen_attn

    lengths = (packing.starts, packing.starts, packing.longest, packing.longest)
    attended = varlen_attn(q_NHK, k_NHK, v_NHK, *lengths, window_size=(-1, 0 if packing.is_causal else -1))
    assert isinstance(attended, Tensor)  # varlen_attn returns a tuple only on request
    return attended


def attend_one_by_one(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, packing: Packing) -> Tensor:
    """Return the attended values within each sequence, (N, H, K), one sequence at a time, on any device."""
    lengths = packing.starts.diff().tolist()
    # The shape is (1, H, length, K), because torch has its fused kernels for four dimensions only.
    q, k, v = ([x.transpose(0, 1)[None] for x in y_NHK.split(lengths)] for y_NHK in (q_NHK, k_NHK, v_NHK))
    attended = [_whole(*sequence, is_causal=packing.is_causal) for sequence in zip(q, k, v, strict=True)]
    return torch.cat([x[0].transpose(0, 1) for x in attended])


def _whole(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
    """Return the attended values of one sequence without padding, (1, H, T, K)."""
    if applies(q, k):
        return cpu_attention(q, k, v, None if is_causal else q.new_ones(1, 1, 1, q.shape[-2], dtype=torch.bool))
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def pays_on_cpu(packing: Packing, dtype: torch.dtype) -> bool:
    """Return whether a CPU computes a batch faster packed, with attention one sequence at a time.

    It does from a tenth of padding on (docs/speed.md). In 16 bits it does from a fifth on, and only if the sequences are long too,
    because short ones share products in `cpu_attention`.

    >>> starts = torch.tensor([0, 8, 12])
    >>> packing = Packing(torch.tensor([*range(8), *range(8, 12)]), starts, longest=8, n_places=16, is_causal=False)
    >>> pays_on_cpu(packing, torch.float32), pays_on_cpu(packing, torch.bfloat16)
    (True, False)
    """
    if packing.places.device.type != "cpu":
        return False
    padding = 1 - len(packing.places) / packing.n_places
    if dtype == torch.float32:
        return padding >= LEAST_PADDING
    return padding >= LEAST_IN_16_BITS and packing.longest >= LONG


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return the number format of products with a weight: that of autocast where it is on, else that of the weight."""
    device = weight.device.type
    if device == "meta":  # the meta device has no autocast
        return weight.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
