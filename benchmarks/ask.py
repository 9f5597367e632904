"""Seconds to answer a question by the hazard head in one forward pass, against sampled futures of a next-event decoder.

    python benchmarks/ask.py HAZARD_RUN NEXT_EVENT_RUN DATA NAME --question osteoarthritis
    python benchmarks/ask.py HAZARD_RUN NEXT_EVENT_RUN DATA NAME --question osteoarthritis --n_samples 20 --subjects 200 --repeats 3

Both runs are trained on the dataset DATA, since how long a future gets depends on what the decoder has learned. They answer for the
same held-out prediction times of the label set NAME, whose labels are not read. A question reads the record of a subject once for
all of its prediction times, and `alone` is the same question with each sample read by itself, as the futures read their prompts.
The ways alternate in one run; prints one JSON line with the median of the ratios, of wall time and of CPU time, which says more
on a busy machine. Reading the data and finding the question's events are not part of any of the times.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ehr_embed.data.batches import BatchDataset
from ehr_embed.data.samples import Samples
from ehr_embed.inference.asker import Asker
from ehr_embed.inference.predictor import Predictor
from ehr_embed.inference.records import Dataset
from ehr_embed.inference.trained_run import samples_to_predict
from ehr_embed.inference.trajectories import sample_futures
from ehr_embed.models.sampling import Sampling

MAX_NEW_EVENTS = 64


class Seconds(NamedTuple):
    """Seconds that a call took: by the clock on the wall, and of CPU time of all threads."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, call: Callable[[], None]) -> Seconds:
        """Measure a call."""
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        return cls(time.perf_counter() - wall, time.process_time() - cpu)


def first(samples: Samples, n: int) -> Samples:
    """Return the first n samples."""
    return samples.take(np.arange(min(n, len(samples))))


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("hazard_run", "next_event_run", "data", "labels"):
        parser.add_argument(name)
    parser.add_argument("--question", required=True)
    for name, default in (("n_samples", 20), ("subjects", 200), ("repeats", 3), ("horizon_days", 365)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)

    asker = Asker(options.hazard_run)
    questions = asker.questions([options.question])
    data = asker.read(options.data, labels=options.labels, split="held_out", lookups=())
    asked = Dataset(data.vocabulary, data.embedding, data.events, first(data.samples, options.subjects))
    days = (options.horizon_days * np.arange(1, 13) / 12).tolist()

    sampler = Predictor(options.next_event_run, needs_classes=False)
    own = sampler.read(options.data, labels=options.labels, split="held_out", lookups=())
    n_prompt = sampler.run.config["model"]["max_length"] - MAX_NEW_EVENTS
    labels_dir = Path(options.data) / "labels"
    prompts = first(samples_to_predict(own.events, options.labels, labels_dir, max_length=n_prompt), options.subjects)
    sampling = Sampling(n_samples=options.n_samples, horizon_days=options.horizon_days, max_new_events=MAX_NEW_EVENTS)

    def question() -> None:
        asker.incidence(asked, questions, days)

    def alone() -> None:
        asker.incidence(asked, questions, days, shares=False)

    def futures() -> None:
        sample_futures(
            sampler.run, BatchDataset(own.events, prompts), sampling, device=torch.device("cpu"), batch_size=64, seed=0,
            use_cache=True,
        )  # fmt: skip

    question()  # warm-up
    alone()
    measured = [tuple(Seconds.of(way) for way in (question, alone, futures)) for _ in range(options.repeats)]
    found: dict[str, object] = {"benchmark": "ask"}
    for clock in Seconds._fields:
        asks, alones, samples = ([getattr(part, clock) for part in parts] for parts in zip(*measured, strict=True))
        ratios = [b / a for a, b in zip(asks, samples, strict=True)]
        found |= {
            f"{clock}_ms_per_prediction_asked": round(1000 * statistics.median(asks) / len(prompts), 3),
            f"{clock}_ms_per_prediction_alone": round(1000 * statistics.median(alones) / len(prompts), 3),
            f"{clock}_ms_per_prediction_futures": round(1000 * statistics.median(samples) / len(prompts), 3),
            f"{clock}_ratio": round(statistics.median(ratios), 1),
            f"{clock}_ratio_alone": round(statistics.median(b / a for a, b in zip(alones, samples, strict=True)), 1),
            f"{clock}_ratios": [round(ratio, 1) for ratio in ratios],
        }
    print(
        json.dumps(
            found
            | {
                "predictions": len(prompts),
                "subjects": len(np.unique(asked.samples.subject_ids)),
                "events_per_prompt": round(float(prompts.lengths.mean()), 1),
                **{name: getattr(options, name) for name in ("question", "n_samples", "repeats", "horizon_days")},
                "processor": platform.processor() or "cpu",
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
