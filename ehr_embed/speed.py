"""How fast training was, and what share of the hardware's arithmetic the model's own took."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from ehr_embed.models.body import Body
from ehr_embed.models.heads import EventHead

PEAKS = {
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "T4": (65e12, 8.1e12),
    "V100": (125e12, 15.7e12),
}
"""FLOP/s by a part of the GPU's name, in 16 bits (dense, tensor cores) and in float32: NVIDIA's data sheets."""
MATRIX, N_PRODUCTS = 1024, 5


@dataclass(frozen=True)
class TrainingFlops:
    """Floating point operations of forward and backward pass.

    Attributes:
        per_event: of the matrices that every event passes.
        per_pair: of attention, for two events of one sequence.
    """

    per_event: float
    per_pair: float


def training_flops(model: nn.Module, n_tokens: int) -> TrainingFlops | None:
    """6 N an event and 12 L D a pair (Chowdhery et al. 2022, arXiv:2204.02311, appendix B); None for a model without a `Body`.

    A lower bound: left out are the projection of event vectors, made once for many events, a pooled head, and the scores of
    masked events. A causal model attends to half of the pairs. Where the body is frozen there is its forward pass alone.

    Args:
        n_tokens: V, which a decoder that predicts events scores after every event.
    """
    body, head = getattr(model, "body", None), getattr(model, "head", None)
    if not isinstance(body, Body):
        return None
    matrices = [p for name, p in body.named_parameters() if p.ndim == 2 and not name.startswith("input.project.")]
    passes = 3 if any(p.requires_grad for p in body.parameters()) else 1
    per_event = passes * 2.0 * sum(p.numel() for p in matrices)
    is_causal, model_dim = bool(getattr(model, "is_causal", False)), len(body.norm.weight)
    if is_causal and isinstance(head, EventHead):
        per_event += 6.0 * n_tokens * model_dim
    return TrainingFlops(per_event, passes * 4.0 * model_dim * len(body.blocks) / (2 if is_causal else 1))


def rates(
    n_events: float, n_padded: float, n_pairs: float, seconds: float, flops: TrainingFlops | None, peak: float | None
) -> dict[str, float]:
    """events_per_s (without padding), tokens_per_s (with it), padding_share, and where both are known mfu: model FLOPs of
    the events, without padding and recomputation, as a share of `peak` FLOP/s.

    >>> rates(80, 100, 0, 2.0, TrainingFlops(10.0, 1.0), 1000.0)
    {'events_per_s': 40.0, 'tokens_per_s': 50.0, 'padding_share': 0.19999999999999996, 'mfu': 0.4}
    """
    found = {
        "events_per_s": n_events / seconds,
        "tokens_per_s": n_padded / seconds,
        "padding_share": 1 - n_events / n_padded,
    }
    if flops is not None and peak is not None:
        found["mfu"] = (flops.per_event * n_events + flops.per_pair * n_pairs) / seconds / peak
    return found


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that the device can reach in `precision`: of a GPU from `PEAKS` (None if it is not there), of a CPU as measured
    once by products of square matrices with the threads that torch has."""
    is_half = not precision.startswith("32")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next(
            (peaks[0 if is_half else 1] for part, peaks in PEAKS.items() if re.search(rf"\b{part}\b", name)), None
        )
    if device.type != "cpu":
        return None
    return _measured(torch.bfloat16 if is_half else torch.float32, torch.get_num_threads())


@cache
def _measured(dtype: torch.dtype, threads: int) -> float:
    """The best of a few products: what else runs on the machine makes them slower, never faster."""
    x = torch.ones(MATRIX, MATRIX, dtype=dtype)
    best = float("inf")
    for _ in range(N_PRODUCTS):
        began = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - began)
    return 2 * MATRIX**3 / best
