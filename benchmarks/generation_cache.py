"""Events generated a second with the key-value cache, against running the whole sequence again for each event.

    python benchmarks/generation_cache.py
    python benchmarks/generation_cache.py --prompt 384 --new 128 --batch 32 --repeats 5

An untrained decoder of the default size on random records: speed does not depend on what the weights are. Both ways
alternate in one run and draw the same events; prints one JSON line with the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

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
    for name, default in (("prompt", 384), ("new", 128), ("batch", 16), ("vocabulary", 5000), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = Decoder(embedding_dim=384, vocab_size=options.vocabulary).eval().to(options.device)
    embedding = EventEmbedding(torch.randn(options.vocabulary, 384)).to(options.device)
    prompts = random_prompts(options.batch, options.prompt, options.vocabulary).to(torch.device(options.device))
    sampling = Sampling(max_new_events=options.new, horizon_days=1e9)

    def seconds(use_cache: bool) -> tuple[float, list[int]]:
        generator = torch.Generator(options.device).manual_seed(0)
        began = time.perf_counter()
        tokens = generate(model, embedding, prompts, sampling, generator, use_cache=use_cache).token_ids.tolist()
        return time.perf_counter() - began, tokens

    seconds(True)  # warm-up
    pairs = [(seconds(True), seconds(False)) for _ in range(options.repeats)]
    n_events = options.batch * options.new
    print(
        json.dumps(
            {
                "benchmark": "generation_cache",
                "events_per_s_cached": round(n_events / statistics.median(cached[0] for cached, _ in pairs), 1),
                "events_per_s_full_pass": round(n_events / statistics.median(full[0] for _, full in pairs), 1),
                "ratio": round(statistics.median(full[0] / cached[0] for cached, full in pairs), 2),
                "same_events": all(cached[1] == full[1] for cached, full in pairs),
                **{name: getattr(options, name) for name in ("prompt", "new", "batch", "vocabulary", "repeats")},
                "model": "decoder, 6 layers of 256, float32",
                "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
