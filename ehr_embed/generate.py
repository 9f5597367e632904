"""`python -m ehr_embed.generate`: futures of subjects, sampled from a run of task=next_event, as MEDS events."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch
from meds import DataSchema
from omegaconf import DictConfig
from tqdm import tqdm

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.files import atomic_path
from ehr_embed.data.batches import MICROSECONDS_PER_DAY, BatchDataset
from ehr_embed.data.event_set import EventSet
from ehr_embed.data.samples import Samples
from ehr_embed.data.store import encode_split
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.experiment.cli import CONF, run_main
from ehr_embed.inference.trained_run import device_named, open_run, samples_to_predict, trained_on
from ehr_embed.models.sampling import Sampling, Trajectories, check_generates, check_lengths, generate
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.protocol import SPLITS, Source

log = logging.getLogger(__name__)
TRAJECTORY_SCHEMA: dict[str, Any] = {
    "subject_id": pl.Int64,
    "time": pl.Datetime("us"),
    "code": pl.String,
    "numeric_value": pl.Float32,
    "prediction_time": pl.Datetime("us"),
}
"""MEDS' data schema and the time up to which the generator saw the record: GeneratedTrajectorySchema of
MEDS-trajectory-evaluation 0.0.6, which keeps the samples of one prompt in separate files."""


def generate_trajectories(cfg: DictConfig) -> list[Path]:
    """Sample futures as `cfg` (conf/generate.yaml) says, and write one file a sample.

    Raises:
        UserError: a run that cannot generate, an unknown split or stop code, a horizon of 0, a prompt that leaves no room.
    """
    if cfg.split not in SPLITS:
        raise unknown_name("split", cfg.split, SPLITS)
    trusted = tuple(cfg.trusted_packages)
    run = open_run(cfg.run, trusted=trusted)
    max_length = check_generates(run.model).body.max_length
    sampling = Sampling(
        n_samples=cfg.n_samples,
        horizon_days=cfg.horizon_days,
        max_new_events=cfg.max_new_events,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        stop_tokens=EventSet(codes=cfg.stop_codes).tokens(run.vocabulary),
    )
    prompt_length = max_length - cfg.max_new_events if cfg.prompt_length is None else cfg.prompt_length
    check_lengths(prompt_length, cfg.max_new_events, max_length)
    if cfg.batch_size < 1:
        raise UserError(f"batch_size={cfg.batch_size}: expected 1 or more prompts.")
    source: Source = trained_on(run, trusted=trusted) if cfg.data.root is None else MedsSource(root=cfg.data.root)
    events = encode_split(source, run.vocabulary, cfg.split)
    samples = samples_to_predict(events, cfg.labels, source.labels_dir, max_length=prompt_length)

    device = device_named(cfg.device)
    model, embedding = run.model.to(device), run.embedding.to(device)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    dataset, frames, began = BatchDataset(events, samples), [], time.perf_counter()
    for rows in tqdm(np.array_split(np.arange(len(samples)), -(-len(samples) // cfg.batch_size)), disable=None):
        trajectories = generate(
            model, embedding, dataset[rows].to(device), sampling, generator, use_cache=cfg.use_cache
        )
        frames.append(as_events(trajectories, samples.take(rows), run.vocabulary))
    events_frame = pl.concat(frames)
    seconds = time.perf_counter() - began
    log.info(
        "%d events in %d futures of %d prompts, %.0f events/s", len(events_frame), len(samples) * sampling.n_samples,
        len(samples), len(events_frame) / seconds,
    )  # fmt: skip
    paths = []
    folder = Path(cfg.output) / cfg.split
    for stale in folder.glob("[0-9]*.parquet"):  # a sampling with more samples would mix with this one
        stale.unlink()
    for sample in range(sampling.n_samples):
        path = folder / f"{sample}.parquet"
        with atomic_path(path) as temporary:
            # MEDS' strings are not Polars' large ones.
            table = DataSchema.align(events_frame.filter(sample=sample).drop("sample").to_arrow())
            pq.write_table(table, temporary)
        paths.append(path)
    print(f"{len(paths)} files in {paths[0].parent}")
    return paths


def as_events(trajectories: Trajectories, samples: Samples, vocabulary: Vocabulary) -> pl.DataFrame:
    """Generated events with the columns of `TRAJECTORY_SCHEMA`, and `sample`."""
    prompt = trajectories.prompt.cpu().numpy()
    decoded = vocabulary.decode(trajectories.token_ids.cpu().numpy(), trajectories.values.float().cpu().numpy())
    prediction_times = samples.prediction_times[prompt]
    after = np.round(trajectories.days.cpu().numpy() * MICROSECONDS_PER_DAY).astype(np.int64)
    columns = {
        "subject_id": samples.subject_ids[prompt],
        "time": prediction_times + after,
        "code": decoded["code"],
        "numeric_value": decoded["numeric_value"],
        "prediction_time": prediction_times,
        "sample": trajectories.sample.cpu().numpy(),
    }
    frame = pl.DataFrame(columns)
    return frame.with_columns(pl.col(name).cast(dtype) for name, dtype in TRAJECTORY_SCHEMA.items())


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="generate")
def main(cfg: DictConfig) -> None:
    """Sample futures and write them."""
    generate_trajectories(cfg)


if __name__ == "__main__":
    run_main(main, "generate")
