"""Measures the speed of training, and the model FLOPs utilisation (mfu)."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from ehr_embed.models.body import Body
from ehr_embed.models.heads import EventHead
from ehr_embed.models.protocol import body_or_none, declarations

log = logging.getLogger(__name__)
PEAKS = {
    r"GB200": (2500e12, 80e12),
    r"B200": (2250e12, 75e12),
    r"H200( SXM)?": (989.5e12, 67e12),
    r"H200 NVL": (835.5e12, 60e12),
    r"H100 (80GB HBM3|SXM)": (989.5e12, 67e12),
    r"H100 NVL": (835.5e12, 60e12),
    r"H100 PCIe": (756.5e12, 51e12),
    r"A100(-SXM4-[48]0GB|-SXM-80GB|-PCIE-40GB| 80GB PCIe)": (312e12, 19.5e12),
    r"A40": (149.7e12, 37.4e12),
    r"A10": (125e12, 31.2e12),
    r"RTX A6000": (154.8e12, 38.7e12),
    r"L40S": (362.05e12, 91.6e12),
    r"L40": (181.05e12, 90.5e12),
    r"L4": (121e12, 30.3e12),
    r"GeForce RTX 4090": (165.2e12, 82.6e12),
    r"GeForce RTX 3090": (71e12, 35.6e12),
    r"T4": (65e12, 8.1e12),
    r"V100-SXM2-\d+GB": (125e12, 15.7e12),
    r"V100-PCIE-\d+GB": (112e12, 14e12),
    r"V100S-PCIE-32GB": (130e12, 16.4e12),
    r"MI300X": (1307.4e12, 163.4e12),
}
"""Peak FLOP/s per GPU in 16 bits (matrix units, float32 accumulation, no sparsity) and in float32 (without TF32).

A key is a regular expression for the end of the name that torch reports. A name with another end is another GPU, such
as `RTX 4090 Laptop GPU`, or a part of an H100 (`MIG 1g.10gb`).

The figures are from the makers' documents. From Ampere on these give most matrix figures with sparsity, which are
halved here. The documents are NVIDIA's data sheets
Blackwell (HGX B200, GB200 NVL72), H200 Tensor Core GPU, H100 Tensor Core GPU (editions with PCIe and with NVL), A100, A40,
A10, RTX A6000, L40, L40S, L4, T4, V100; its whitepapers of the architectures GA102 (RTX 3090) and Ada (RTX 4090), appendix A;
AMD's data sheet of the Instinct MI300X. A10G, GH200 and MI250 are missing because no such figure was found.
"""
MATRIX, N_PRODUCTS = 1024, 5
_WRONG_PEAKS: set[float] = set()
"""Peaks about which a warning was given, so that each gets one warning."""


@dataclass(frozen=True)
class TrainingFlops:
    """Floating-point operations of the forward and backward pass.

    Attributes:
        per_event: operations per event, in the matrix products that every event passes.
        per_pair: operations of attention per pair of events of a sequence.
    """

    per_event: float
    per_pair: float


def training_flops(model: nn.Module, n_tokens: int) -> TrainingFlops | None:
    """Return the floating-point operations of training, or None for a model without a `Body`.

    With N weights, L blocks and width D there are 6 N operations per event and 12 L D per pair of events (Chowdhery et
    al. 2022, arXiv:2204.02311, appendix B). A causal model attends to half of the pairs. A frozen body has its forward
    pass alone. The result is a lower bound: it leaves out the projection of event vectors, which many events share, a
    pooled head, and the scores of masked events.

    Args:
        model: the model that is trained.
        n_tokens: size V of the vocabulary, whose tokens a decoder that predicts events scores after every event.
    """
    body, head = body_or_none(model), getattr(model, "head", None)
    if not isinstance(body, Body):
        return None
    matrices = [p for name, p in body.named_parameters() if p.ndim == 2 and not name.startswith("input.project.")]
    passes = 3 if any(p.requires_grad for p in body.parameters()) else 1
    per_event = passes * 2.0 * sum(p.numel() for p in matrices)
    is_causal, model_dim = bool(declarations(model).is_causal), len(body.norm.weight)
    if is_causal and isinstance(head, EventHead):
        per_event += 6.0 * n_tokens * model_dim
    return TrainingFlops(per_event, passes * 4.0 * model_dim * len(body.blocks) / (2 if is_causal else 1))


def rates(
    n_events: float, n_padded: float, n_pairs: float, seconds: float, flops: TrainingFlops | None, peak: float | None
) -> dict[str, float]:
    """Return events_per_s (without padding), tokens_per_s (with padding), padding_share, and mfu if it is known.

    The mfu is the share of `peak` FLOP/s that the model's operations took, without padding and recomputation. A share
    above 1 shows that the peak is wrong; then there is no mfu, and one warning per peak.

    >>> rates(80, 100, 0, 2.0, TrainingFlops(10.0, 1.0), 1000.0)
    {'events_per_s': 40.0, 'tokens_per_s': 50.0, 'padding_share': 0.19999999999999996, 'mfu': 0.4}
    """
    found = {
        "events_per_s": n_events / seconds,
        "tokens_per_s": n_padded / seconds,
        "padding_share": 1 - n_events / n_padded,
    }
    if flops is not None and peak is not None:
        mfu = (flops.per_event * n_events + flops.per_pair * n_pairs) / seconds / peak
        if mfu <= 1:
            found["mfu"] = mfu
        else:
            _warn_of_peak(peak, mfu)
    return found


def _warn_of_peak(peak: float, mfu: float) -> None:
    if peak in _WRONG_PEAKS:
        return
    _WRONG_PEAKS.add(peak)
    log.warning(
        "training reached %.2f times the %.1e FLOP/s that are assumed as this device's peak, so that peak is wrong and "
        "no mfu is given. The peak of a CPU is measured when training begins, and other programs make it too low; the "
        "peak of a GPU is looked up by its name",
        mfu,
        peak,
    )


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the peak FLOP/s of the device in `precision`, or None if it is unknown.

    The peak of a GPU is that of `PEAKS`. The peak of a CPU is measured once, by products of square matrices with
    torch's number of threads.
    """
    is_half = not precision.startswith("32")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peaks[0 if is_half else 1] for end, peaks in PEAKS.items() if re.search(rf"\b{end}$", name)), None)
    if device.type != "cpu":
        return None
    return _measured(torch.bfloat16 if is_half else torch.float32, torch.get_num_threads())


@dataclass(frozen=True)
class Speed:
    """Gives the `rates` of all processes together from the counts of one of them, on average.

    Attributes:
        flops: of the model, if they are known.
        peak: FLOP/s that all devices together can reach, if they are known.
        n_processes: that train together.
    """

    flops: TrainingFlops | None
    peak: float | None
    n_processes: int

    @classmethod
    def of(cls, model: nn.Module, *, n_tokens: int, device: torch.device, precision: str, n_processes: int) -> Speed:
        """Return the speed of a model on devices of one kind; the peak of a CPU is measured here.

        Args:
            model: may be frozen in part, which needs fewer operations.
            n_tokens: V, see `training_flops`.
            device: of this process.
            precision: not `auto`.
            n_processes: each with a device of its own.
        """
        flops = training_flops(model, n_tokens)
        peak = None if flops is None else peak_flops(device, precision)
        return cls(flops, None if peak is None else n_processes * peak, n_processes)

    def __call__(self, n_events: float, n_padded: float, n_pairs: float, seconds: float) -> dict[str, float]:
        """Return the rates; see `rates`."""
        n = self.n_processes
        return rates(n * n_events, n * n_padded, n * n_pairs, seconds, self.flops, self.peak)


@cache
def _measured(dtype: torch.dtype, threads: int) -> float:
    """Return the highest FLOP/s of a few matrix products, because other programs can only make a product slower."""
    x = torch.ones(MATRIX, MATRIX, dtype=dtype)
    best = float("inf")
    for _ in range(N_PRODUCTS):
        began = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - began)
    return 2 * MATRIX**3 / best
