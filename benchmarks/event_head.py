"""Time and peak memory of the scores of a large vocabulary in training: the package's chunks against torch's fused function.

    python -m benchmarks.event_head
    python -m benchmarks.event_head --bfloat16 1
    python -m benchmarks.event_head --device cuda --events 65536 --model-dim 640

Each way computes the loss of all events and its gradients for the hidden states, the weights and the biases. `ours` is
`token_scores`, which keeps no scores and computes them again in the backward pass, and `compiled` (with `--compiled 1`) the same as
trainer.compile=true has it; `torch_none` and `torch_sum` are
`torch.nn.functional.linear_cross_entropy` with a loss per event and with the sum alone, whose gradients it computes in the forward
pass; `whole` holds all scores. The times alternate in one process; the peak memory on a CPU is that of a process per way, above its
highest before the step, and on a GPU that above what was held before it. A way that fails is named in `failed`.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import alternate, parser, ratio, report, seconds
from ehr_embed.models.heads import N_SPECIAL, Score, _token_scores, token_scores
from ehr_embed.training.memory import peak_memory_mib

HAS_FUSED = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
"""torch 2.11, with which this package works too, has none."""


@cache
def compiled_scores() -> Score:
    """Return the package's scores of a chunk, compiled."""
    return torch.compile(_token_scores, dynamic=True)


def fused(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, *, reduction: str) -> Tensor:
    """Return the sum of the losses by torch's function, with its own choice of chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    same = weight.to(x.dtype), bias.to(x.dtype)
    return F.linear_cross_entropy(x, same[0], target, linear_bias=same[1], reduction=reduction, options=options).sum()


def ours(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """Return the sum of the losses by the package."""
    return token_scores(x, weight, bias, target, with_ranks=False)[0].sum()


def compiled(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """Return the same sum with chunks that torch compiled, as with trainer.compile=true."""
    return token_scores(x, weight, bias, target, with_ranks=False, score=compiled_scores())[0].sum()


def whole(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """Return the sum of the losses from all scores at once."""
    return F.cross_entropy(F.linear(x, weight.to(x.dtype), bias.to(x.dtype)).float(), target, reduction="sum")


WAYS: dict[str, Callable[..., Tensor]] = {"ours": ours, "compiled": compiled, "whole": whole} | (
    {f"torch_{name}": partial(fused, reduction=name) for name in ("none", "sum")} if HAS_FUSED else {}
)


def made(options: argparse.Namespace) -> tuple[Tensor, ...]:
    """Return hidden states, weights, biases and targets."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if options.bfloat16 else torch.float32
    x = torch.randn(options.events, options.model_dim, generator=generator).to(options.device, dtype)
    weight = (torch.randn(options.vocabulary, options.model_dim, generator=generator) / 16).to(options.device)
    bias = torch.zeros(options.vocabulary).to(options.device)
    bias[:N_SPECIAL] = -torch.inf
    target = torch.randint(N_SPECIAL, options.vocabulary, (options.events,), generator=generator).to(options.device)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), target


def step(way: str, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the loss and the gradients of one way."""
    x, weight, bias, target = tensors
    for tensor in (x, weight, bias):
        tensor.grad = None
    loss = WAYS[way](x, weight, bias, target)
    loss.backward()
    return [loss.detach(), *(tensor.grad for tensor in (x, weight, bias) if tensor.grad is not None)]


def peak(way: str, options: argparse.Namespace, threads: int) -> float:
    """Return the MiB that one step of a way takes at its peak above the highest before it, on a GPU above what is held before."""
    torch.set_num_threads(threads)
    device = torch.device(options.device)
    small = argparse.Namespace(**vars(options) | {"events": 8, "vocabulary": 16})
    step(way, made(small))  # libraries
    tensors = made(options)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = peak_memory_mib(device)
    step(way, tensors)
    return peak_memory_mib(device) - before


def peaks_of(ways: list[str], options: argparse.Namespace) -> tuple[dict[str, float], dict[str, str]]:
    """Return the peak of each way, and why others failed: one of torch's kernels need not take every size on every GPU."""
    peaks, failed = dict[str, float](), dict[str, str]()
    for way in ways:
        try:
            # A GPU reports its own peak, so that no process is started for it.
            if torch.device(options.device).type == "cuda":
                peaks[way] = peak(way, options, torch.get_num_threads())
                continue
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                peaks[way] = pool.submit(peak, way, options, torch.get_num_threads()).result()
        except Exception as error:
            if way == "ours":
                raise
            failed[way] = f"{type(error).__name__}: {error}"[:300]
    return peaks, failed


def errors(ways: list[str], tensors: tuple[Tensor, ...]) -> dict[str, float]:
    """Return the largest relative error of each way, over loss and gradients, from float32 with the same rounded numbers."""
    x, weight, bias, target = tensors
    rounded = (weight.detach().to(x.dtype).float().requires_grad_(), bias.detach().to(x.dtype).float().requires_grad_())
    exact = step("whole", (x.detach().float().requires_grad_(), *rounded, target))
    return {
        way: max(float((y.float() - z).norm() / z.norm()) for y, z in zip(step(way, tensors), exact, strict=True))
        for way in ways
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    found = parser(__doc__, events=8192, vocabulary=30_000, model_dim=256, bfloat16=0, compiled=0, repeats=3)
    options = found.parse_args(arguments)
    peaks, failed = peaks_of([way for way in WAYS if way != "compiled" or options.compiled], options)
    ways = list(peaks)
    tensors = made(options)
    differences = errors(ways, tensors)
    times = alternate(
        {way: partial(seconds, partial(step, way, tensors), options.device) for way in ways}, options.repeats
    )
    report(
        "event_head",
        {
            "seconds": {way: statistics.median(own) for way, own in times.items()},
            "peak_mib": peaks,
            "relative_error": differences,
            "failed": failed,
            "times_as_fast_as_ours": {way: ratio(times["ours"], own) for way, own in times.items()},
            **{name: getattr(options, name) for name in ("events", "vocabulary", "model_dim", "bfloat16", "repeats")},
        },
        dataset="random hidden states and targets",
        device=options.device,
    )


if __name__ == "__main__":
    main()
