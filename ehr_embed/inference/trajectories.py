"""Sample futures of subjects from a run of task=next_event, and write them as MEDS events."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch
from meds import DataSchema

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path
from ehr_embed.core.progress import ProgressBar
from ehr_embed.data.batches import MICROSECONDS_PER_DAY, BatchDataset
from ehr_embed.data.samples import Samples
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.inference.trained_run import TrainedRun
from ehr_embed.models.sampling import Sampling, Trajectories, generate
from ehr_embed.training.precision import autocast_of_run

log = logging.getLogger(__name__)
TRAJECTORY_SCHEMA: dict[str, Any] = {
    "subject_id": pl.Int64,
    "time": pl.Datetime("us"),
    "code": pl.String,
    "numeric_value": pl.Float32,
    "prediction_time": pl.Datetime("us"),
}
"""Columns of the MEDS data schema, and the time up to which the model saw the record. This is GeneratedTrajectorySchema of
MEDS-trajectory-evaluation 0.0.6, which expects the futures of one prompt in separate files."""


def sample_futures(
    run: TrainedRun,
    prompts: BatchDataset,
    sampling: Sampling,
    *,
    device: torch.device,
    batch_size: int,
    seed: int,
    use_cache: bool,
) -> pl.DataFrame:
    """Sample futures of each prompt.

    Args:
        run: a run of task=next_event.
        prompts: records up to their prediction times.
        sampling: number of futures, their length, and how each event is drawn.
        device: device on which the model runs.
        batch_size: number of prompts per batch.
        seed: seed of the draws.
        use_cache: cache the keys and values of attention instead of computing them again for every event.

    Returns:
        One row per event, with the columns of `TRAJECTORY_SCHEMA` and `sample`, the number of the future.
    """
    samples, model, embedding = prompts.samples, run.model.to(device), run.embedding.to(device)
    generator, frames, began = torch.Generator(device).manual_seed(seed), [], time.perf_counter()
    for rows in ProgressBar(
        np.array_split(np.arange(len(samples)), -(-len(samples) // batch_size)), desc="futures", unit="batch"
    ):
        # The head computes in float32 whatever the body does.
        with autocast_of_run(run.config["trainer"]["precision"], run.precision, device):
            trajectories = generate(
                model, embedding, prompts[rows].to(device), sampling, generator, use_cache=use_cache
            )
        frames.append(as_events(trajectories, samples.take(rows), run.vocabulary))
    futures = pl.concat(frames)
    log.info(
        "%d events in %d futures of %d prompts, %.0f events/s", len(futures), len(samples) * sampling.n_samples,
        len(samples), len(futures) / (time.perf_counter() - began),
    )  # fmt: skip
    return futures


def write_futures(futures: pl.DataFrame, folder: Path, *, n_samples: int) -> list[Path]:
    """Write one file per future number, with one future of every prompt, and remove the files of an earlier sampling.

    Args:
        futures: table that `sample_futures` returned.
        folder: folder for the files 0.parquet, 1.parquet, ...
        n_samples: number of futures per prompt.

    Returns:
        The paths of the files.
    """
    for old in earlier_futures(folder):  # an earlier sampling may have written more files than this one will overwrite
        old.unlink()
    paths = [folder / f"{sample}.parquet" for sample in range(n_samples)]
    for sample, path in enumerate(paths):
        with atomic_path(path) as temporary:
            # Polars writes large_string columns; the MEDS schema asks for string.
            table = DataSchema.align(futures.filter(sample=sample).drop("sample").to_arrow())
            pq.write_table(table, temporary)
    return paths


def earlier_futures(folder: Path) -> list[Path]:
    """Return the files of an earlier sampling in a folder.

    Raises:
        UserError: a file is named like sampled futures but has other columns, such as a shard of a dataset.
    """
    found = [path for path in sorted(folder.glob("*.parquet")) if path.stem.isdecimal()]
    for path in found:
        try:
            is_ours = "prediction_time" in pl.scan_parquet(path, glob=False).collect_schema()
        except (OSError, pl.exceptions.PolarsError):
            is_ours = False
        if not is_ours:
            raise UserError(
                f"{path} is not a file of sampled futures (it has no column prediction_time), but sampled futures would "
                "replace it. "
                "Type: output=ANOTHER_FOLDER"
            )
    return found


def as_events(trajectories: Trajectories, samples: Samples, vocabulary: Vocabulary) -> pl.DataFrame:
    """Return generated events as a table with the columns of `TRAJECTORY_SCHEMA` and `sample`, one row per event."""
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
