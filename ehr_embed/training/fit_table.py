"""Fits a model that is fitted to a table of features; `Trainer.fit` calls this module in place of the gradient loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import link_file
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.feature_table import CELL_BYTES, FeatureTable
from ehr_embed.models.hazards import MakesHazards
from ehr_embed.models.label_outputs import label_outputs_of
from ehr_embed.models.protocol import FeatureSet, FitsAtOnce, PoolsCodes, body_of
from ehr_embed.run_folder.checkpoints import write_latest
from ehr_embed.run_folder.layout import BEST, LATEST
from ehr_embed.tasks.protocol import PredictsNumber, WeighsSamples, tuning_values
from ehr_embed.tasks.set_up import dataset_of, records_of
from ehr_embed.training.memory import available_memory
from ehr_embed.training.set_up import inputs_of_all
from ehr_embed.training.state import Progress, rng_state
from ehr_embed.training.throughput import rates
from ehr_embed.training.trainer import Trainer

PROBED = 512
"""Number of samples from which the size of the tables is estimated."""
FIT_CELL_BYTES = 3 * CELL_BYTES
"""Bytes per stored cell while a model is fitted: those of the table and of the copies that fitting makes of it."""
GIB = 2**30


def fit_at_once(trainer: Trainer, model: nn.Module, embedding: EventEmbedding) -> dict[str, Any]:
    """Fit a `FitsAtOnce` model to the task's train samples, write its checkpoints, and log one epoch.

    Train is read once to choose the features and once to compute them, and tuning once to compute them.

    Returns:
        The facts of the run that `Trainer.fit` returns; n_parameters is the model's `n_fitted`, and events_per_s is the
        number of train's events divided by `seconds`.

    Raises:
        UserError: the settings ask for something that needs gradient steps: a frozen body, learned token vectors,
            several labels per sample, smoothed labels, or several processes.
    """
    assert isinstance(model, FitsAtOnce)
    task = trainer.task
    _refuse_gradients(trainer, model, embedding)
    began = time.perf_counter()
    embedding.to(trainer.fabric.device)
    model.to(trainer.fabric.device)
    model.choose_features(inputs_of(trainer, embedding, "train"))
    if isinstance(model, PoolsCodes):  # numbers of pooled datasets are ranked among their own
        model.adapt_to_records(inputs_of_all(records_of(task), embedding, settings=trainer.settings))
    _check_size(trainer, model, embedding)
    train, tuning = (feature_set(trainer, model, embedding, split) for split in ("train", "tuning"))

    scale = label_outputs_of(model)

    def score(outputs: npt.NDArray[np.float64]) -> float:
        found = (
            outputs if scale is None else scale.decode(torch.from_numpy(outputs).to(scale.mean.device)).cpu().numpy()
        )
        return float(tuning_values(task, found)[task.monitor])

    model.fit(train, tuning, score=score, is_higher_better=task.is_higher_better, seed=trainer.seed)
    seconds = time.perf_counter() - began
    n_events, n_padded = _events(trainer)

    losses = {}
    for split in ("train", "tuning"):
        losses[split], outputs = trainer.evaluate(model, embedding, split)
    tuning_metrics = tuning_values(task, outputs)
    row = {"epoch": 1, "step": 1, "train/loss": losses["train"], "train/events_per_s": n_events / seconds}
    row |= {"tuning/loss": losses["tuning"]}
    row |= {f"tuning/{name}": metric for name, metric in tuning_metrics.items()}
    keep_fitted(trainer, model, tuning_metrics[task.monitor])
    trainer.log(row, 1)
    return {
        "n_parameters": model.n_fitted(),
        "precision": "64-true",
        "n": len(train.labels),
        "epochs": 1,
        "best_epoch": 1,
        "seconds": seconds,
        **rates(n_events, n_padded, 0, seconds, None, None),
        "history": [row],
    }


def keep_fitted(trainer: Trainer, model: nn.Module, value: float) -> None:
    """Write the checkpoints of a model that no epochs have changed; `value` is its monitored metric."""
    progress = Progress(epoch=1, step=1, best_value=value, best_epoch=1)
    # Readers of a checkpoint expect the states of an optimizer and a schedule, and there are none here.
    write_latest(
        trainer.run_dir,
        model.state_dict(),
        dict(vars(progress)),
        trainer.about | {"optimizer_state_dict": {}, "scheduler_state_dict": {}},
        rng_state(),
    )
    link_file(trainer.run_dir / LATEST, trainer.run_dir / BEST)


def _refuse_gradients(trainer: Trainer, model: nn.Module, embedding: EventEmbedding) -> None:
    name, task = type(model).__name__, trainer.task
    if trainer.settings.freeze is not None:
        body_of(model)
    if any(parameter.requires_grad for parameter in embedding.parameters()):
        raise UserError(
            f"embedder.trainable={embedding.trainable}: {name} reads the codes of events and not their vectors, so the "
            "vectors would not be learned. Type: embedder.trainable=frozen, or embedder=hashing for a table that costs "
            "nothing"
        )
    if isinstance(model, MakesHazards) or isinstance(task, PredictsNumber):
        pass  # fitted to times, which the task gave to `set_hazards`, or to one number
    elif not isinstance(task, WeighsSamples):
        raise UserError(
            f"{name} is fitted to one class per sample, and the samples of {type(task).__name__} have no single class. "
            "Type: task=classification, once for each label set"
        )
    elif task.label_smoothing:
        raise UserError(
            f"task.label_smoothing={task.label_smoothing}: {name} is fitted to labels that are not smoothed. Type: "
            "task.label_smoothing=0"
        )
    trainer.processes.refuse_several(f"{name} is fitted")


def inputs_of(trainer: Trainer, embedding: EventEmbedding, split: str) -> Iterator[dict[str, Tensor]]:
    """Yield what a model is given of a split, batch by batch."""
    for batch in trainer.loader(split):
        yield embedding.inputs(batch.to(trainer.fabric.device))


@torch.inference_mode()
def feature_set(trainer: Trainer, model: FitsAtOnce, embedding: EventEmbedding, split: str) -> FeatureSet:
    """Return the features, labels and weights of a split in sample order."""
    task = trainer.task
    labels: npt.NDArray[Any] = task.samples[split].labels
    if (scale := label_outputs_of(model)) is not None:
        labels = scale.standard(torch.from_numpy(labels).to(scale.mean.device)).double().cpu().numpy()
    blocks = (
        (batch.sample.cpu().numpy(), model.featurise(embedding.inputs(batch.to(trainer.fabric.device))).cpu().numpy())
        for batch in trainer.loader(split)
    )
    weights = task.sample_weights(split) if isinstance(task, WeighsSamples) else np.ones(len(labels))
    if trainer.batches.weigh is not None:
        weights = weights * trainer.batches.weigh(task.samples[split].subject_ids)
    return FeatureSet(FeatureTable.from_blocks(blocks, len(labels)), labels, weights)


@torch.inference_mode()
def _check_size(trainer: Trainer, model: FitsAtOnce, embedding: EventEmbedding) -> None:
    """Refuse tables that would not fit in memory, by an estimate from some samples of train.

    Raises:
        UserError: the tables are too large; the message gives their size and the settings that make them smaller.
    """
    dataset = dataset_of(trainer.task, "train")
    drawn = np.random.default_rng(trainer.seed).permutation(len(dataset))[:PROBED]
    inputs = embedding.inputs(dataset[drawn].to(trainer.fabric.device))
    dense = model.featurise(inputs).cpu().numpy()
    n = len(dataset) + len(trainer.task.samples["tuning"])
    cells = FeatureTable.from_blocks([(np.arange(len(drawn)), dense)], len(drawn)).cells.nnz / len(drawn)
    needed, available = n * cells * FIT_CELL_BYTES, available_memory()
    if available is None or needed <= available:
        return
    codes = getattr(getattr(model, "features", None), "codes", [])
    n_codes = int(len(codes) * 0.8 * available / needed)
    smaller = f"model.max_codes={n_codes}, or " if n_codes else ""
    raise UserError(
        f"{type(model).__name__} needs about {needed / GIB:.1f} GiB for {n:,} samples with {cells:,.0f} filled features of "
        f"{dense.shape[1]:,} each, and {available / GIB:.1f} GiB of memory are free. Type: {smaller}model.times=false, or give it "
        "a label set with fewer samples"
    )


def _events(trainer: Trainer) -> tuple[int, int]:
    """Return the number of events of train, without and with padding."""
    sampler = trainer.loader("train").sampler
    lengths = dataset_of(trainer.task, "train").lengths
    return int(lengths.sum()), sum(len(rows) * int(sampler.padded[rows].max()) for rows in sampler.batches())
