"""Events generated per second, and seconds per patient for several futures, with the key-value cache.

    python -m benchmarks.generation_cache
    python -m benchmarks.generation_cache --samples 20 --batch 8 --full 0
    python -m benchmarks.generation_cache --samples 20 --batch 8 --full 0 --bfloat16 1

An untrained decoder of the default size on random records: speed does not depend on what the weights are. With `--full 1`, running
the whole sequence again for each event alternates with the cache in one run and draws the same events. Prints one JSON line with
the medians, and with that of the pairs' ratios. CPU seconds are those of the process, which other programs change little.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from contextlib import nullcontext

import torch

from ehr_embed.data.batches import Batch
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.decoder import Decoder
from ehr_embed.models.sampling import Sampling, generate


def random_prompts(batch: int, length: int, vocab_size: int) -> Batch:
    """Full-length records of random tokens, an event a day."""
    shape = (batch, length)
    return Batch(
        token_ids=torch.randint(2, vocab_size, shape, dtype=torch.int32),
        days=torch.arange(length - 1, -1, -1.0).expand(shape),
        gap_days=torch.ones(shape),
        elapsed_days=torch.arange(float(length)).expand(shape),
        age_days=torch.full(shape, float("nan")),
        values=None,
        is_event=torch.ones(shape, dtype=torch.bool),
        is_static=torch.zeros(shape, dtype=torch.bool),
        is_next=torch.ones(shape, dtype=torch.bool),
        segments=None,
        event_index=None,
        places=torch.arange(batch * length),
        sequence_starts=torch.arange(batch + 1, dtype=torch.int32) * length,
        labels=torch.zeros(batch, dtype=torch.int64),
        sample=torch.arange(batch),
        n_events=batch * length,
        n_pairs=batch * length**2,
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {
        "prompt": 384,
        "new": 128,
        "batch": 16,
        "vocabulary": 5000,
        "samples": 1,
        "repeats": 3,
        "full": 1,
        "bfloat16": 0,
    }
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = Decoder(embedding_dim=384, vocab_size=options.vocabulary).eval().to(options.device)
    embedding = EventEmbedding(torch.randn(options.vocabulary, 384)).to(options.device)
    prompts = random_prompts(options.batch, options.prompt, options.vocabulary).to(torch.device(options.device))
    sampling = Sampling(max_new_events=options.new, horizon_days=1e9, n_samples=options.samples)

    def seconds(use_cache: bool) -> tuple[float, float, list[int]]:
        generator = torch.Generator(options.device).manual_seed(0)
        began, cpu_began = time.perf_counter(), time.process_time()
        with torch.autocast(options.device, torch.bfloat16) if options.bfloat16 else nullcontext():
            tokens = generate(model, embedding, prompts, sampling, generator, use_cache=use_cache).token_ids.tolist()
        return time.perf_counter() - began, time.process_time() - cpu_began, tokens

    seconds(True)  # warm-up
    pairs = [(seconds(True), seconds(False) if options.full else None) for _ in range(options.repeats)]
    n_events = options.batch * options.new * options.samples
    wall = statistics.median(cached[0] for cached, _ in pairs)
    cpu = statistics.median(cached[1] for cached, _ in pairs)
    both = [(cached, full) for cached, full in pairs if full is not None]
    against = {
        "events_per_s_full_pass": round(n_events / statistics.median(full[0] for _, full in both), 1),
        "ratio": round(statistics.median(full[0] / cached[0] for cached, full in both), 2),
        "same_events": all(cached[2] == full[2] for cached, full in both),
    } if both else {}  # fmt: skip
    print(
        json.dumps(
            {
                "benchmark": "generation_cache",
                "events_per_s_cached": round(n_events / wall, 1),
                "events_per_cpu_s_cached": round(n_events / cpu, 1),
                "seconds_per_patient": round(wall / options.batch, 3),
                **against,
                **{name: getattr(options, name) for name in numbers},
                "model": "decoder, 6 layers of 256",
                "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
