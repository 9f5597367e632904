"""Model FLOPs utilisation and peak memory of training, each side of benchmarks/training.py in a process of its own.

    python -m benchmarks.utilisation
    python -m benchmarks.utilisation --device cuda --subjects 20000 --batch-size 0 --batch-tokens 0 --epochs 2

    python -m benchmarks.utilisation --device cuda --model-dim 640 --layers 10 --context 2048 --median-events 1500 \\
        --batch-tokens 65536 --subjects 2000 --original 0 --pretrain 1 --codes 30000

The second lets the memory of the GPU choose the batch, and tells of the second epoch. The last is a decoder of 50 million
parameters that predicts the next of 30,000 tokens, in packed rows, without the original. FLOPs are those of the events alone,
without padding (ehr_embed/training/throughput.py); the peak is looked up (GPU) or measured (CPU).
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import parser, report
from benchmarks.training import SIZES, Sides, dataset_of
from ehr_embed.training.memory import peak_memory_mib
from ehr_embed.training.throughput import peak_flops


def train(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Facts of one epoch of a side."""
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(Path(folder), options, with_files=side == "original")
        device = torch.device(options.device)
        before = peak_memory_mib(device)
        events_per_s = getattr(sides, side)()
        facts = {"events_per_s": events_per_s, "peak_memory_mib": peak_memory_mib(device), "of_it_before_mib": before}
        if side == "ours":
            facts |= {
                name: sides.facts.get(name)
                for name in ("tokens_per_s", "padding_share", "mfu", "precision", "batch_tokens")
            }
            facts["peak_tflops"] = (peak_flops(device, sides.facts["precision"]) or float("nan")) / 1e12
        return facts | {"n_events": sides.n_events[side]}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    found = parser(__doc__, subjects=1000, original=1, **SIZES)
    options = found.parse_args(arguments)
    results: dict[str, Any] = {}
    for side in ("ours", "original") if options.original else ("ours",):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            results[side] = pool.submit(train, side, options).result()
    report(
        "utilisation",
        results | {name: getattr(options, name) for name in SIZES},
        dataset=dataset_of(options),
        device=options.device,
    )


if __name__ == "__main__":
    main()
