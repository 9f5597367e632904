"""Blends finished runs to an ensemble: takes their weights, and chooses on tuning how much each member counts."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import check_setting
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.ensemble import Ensemble, Weights, choose_weights, equal_weights
from ehr_embed.models.protocol import FitsAtOnce
from ehr_embed.run_folder.checkpoints import read_checkpoint
from ehr_embed.run_folder.finish import read_metrics
from ehr_embed.tasks.protocol import Task, WeighsSamples, tuning_values
from ehr_embed.tasks.set_up import dataset_of
from ehr_embed.training.fit_table import keep_fitted
from ehr_embed.training.throughput import rates
from ehr_embed.training.trainer import Trainer

log = logging.getLogger(__name__)
SAME = {
    "identity": "the vocabulary or the embedder",
    "class_names": "the classes",
    "samples_digest": "the samples or labels of a split",
    "precision": "the precision",
}
"""Entries of a checkpoint that an ensemble and all its members share, and their names in messages."""
LEAST_P = 1e-12
"""A probability of 0 would let one member decide alone, whatever the others say."""


def blend(
    trainer: Trainer, model: Ensemble, embedding: EventEmbedding, runs: Sequence[Path], *, how: str
) -> dict[str, Any]:
    """Give the members of `model` the weights of finished runs, one each, choose their shares by `how`, and write the checkpoints.

    Tuning alone is predicted here. Runs that differ in their seed alone share a weight.

    Args:
        trainer: of the ensemble's own run.
        model: with one member per run.
        embedding: the table that all members read.
        runs: folders of the members' runs.
        how: `tuning` (`choose_weights`) or `equal` (per group of runs that differ in their seed alone).

    Returns:
        The facts of the run that `Trainer.fit` returns; `seconds` are those of the members too. The shares are `model.weights`.

    Raises:
        UserError: a run was trained on other data than this one, in another precision or with token vectors of its own; a task
            without one class per sample; several processes; or an unknown `how`.
    """
    task = trainer.task
    check_setting("ensemble.weights", how, Weights)
    refuse_task(task)
    assert isinstance(task, WeighsSamples)
    trainer.processes.refuse_several(
        "runs are blended",
        "Train the members as runs of their own, then type: trainer.devices=1 ensemble.runs=[RUN_DIR,...]",
    )
    began = time.perf_counter()
    groups, seconds = [], 0.0
    for member, run, checkpoint in zip(model.members, runs, _checkpoints(trainer, runs), strict=True):
        member.load_state_dict(checkpoint["model_state_dict"])
        groups.append(_recipe(checkpoint["config"]))
        seconds += float(read_metrics(run)["train"].get("seconds", 0.0))
    numbers = {recipe: number for number, recipe in enumerate(dict.fromkeys(groups))}
    found = [trainer.predict(member, embedding, "tuning") for member in model.members]
    log_p = [np.log(np.clip(p, LEAST_P, None)) for p in found]
    of = [numbers[recipe] for recipe in groups]
    if how == "tuning":
        weights, differ = choose_weights(log_p, np.asarray(task.samples["tuning"].labels, np.int64), of)
        log.info(
            "weights of the members: %s", "chosen on tuning" if differ else "equal per recipe, tuning tells no other"
        )
    else:
        weights = equal_weights(of)
    model.weights.copy_(model.weights.new_tensor(weights))
    tuning_loss, outputs = trainer.evaluate(model, embedding, "tuning")
    metrics = tuning_values(task, outputs)
    keep_fitted(trainer, model, metrics[task.monitor])
    seconds += time.perf_counter() - began
    n_events = int(dataset_of(task, "train").lengths.sum())
    return {
        "n_parameters": _n_parameters(model),
        "precision": trainer.precision,
        "n": len(dataset_of(task, "train")),
        "epochs": 1,
        "best_epoch": 1,
        "seconds": seconds,
        **rates(n_events, n_events, 0, seconds, None, None),
        "history": [{"epoch": 1, "tuning/loss": tuning_loss} | {f"tuning/{name}": x for name, x in metrics.items()}],
    }


def refuse_task(task: Task) -> None:
    """Refuse a task whose samples do not have one class each.

    Raises:
        UserError: it is such a task.
    """
    if not isinstance(task, WeighsSamples):
        raise UserError(
            f"an ensemble blends probabilities of one class per sample, and {type(task).__name__} predicts something else. "
            "Type: task=classification"
        )


def _checkpoints(trainer: Trainer, runs: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield the best checkpoint of each run, once it is known to be of the same data as this one."""
    own = trainer.about
    for run in runs:
        path, checkpoint = read_checkpoint(run)
        for key, what in SAME.items():
            if checkpoint.get(key) != own[key]:
                raise UserError(
                    f"{path} cannot be a member of this ensemble: {what} were {_shown(checkpoint.get(key))} there, and are "
                    f"{_shown(own[key])} here. Members have to read the same events and predict for the same samples, or what one "
                    "was trained on would be another's held_out. Give all runs the same data, embedder and task."
                )
        if checkpoint.get("embedding_state_dict"):
            raise UserError(
                f"{path} learned token vectors of its own, and the members of an ensemble share one table. Train it with: "
                "embedder.trainable=frozen"
            )
        yield checkpoint


def _recipe(config: Mapping[str, Any]) -> str:
    """Return the part of a run that is equal in runs that differ in their seed alone."""
    return json.dumps([config.get("model"), config.get("trainer")], sort_keys=True, default=str)


def _n_parameters(model: Ensemble) -> int:
    fitted = [member.n_fitted() for member in model.members if isinstance(member, FitsAtOnce)]
    return sum(p.numel() for p in model.parameters()) + sum(fitted)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
