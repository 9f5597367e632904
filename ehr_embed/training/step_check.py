"""Ask the loss of a task of one's own once, before it trains, whether every sample weighs the same in whatever batch it comes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.data.batches import EventDataset
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.tasks.protocol import Task, run_step

N_TRIED, TOLERANCE = 8, 0.02
"""Number of samples of which one must have a loss, and the relative difference of two losses that rounding explains."""


def check_step(task: Task, model: Any, embedding: EventEmbedding, dataset: EventDataset) -> None:
    """Refuse a loss that is a mean over the batch, or that compares each output with the labels of all samples.

    A batch that holds one sample twice must have twice the loss of the sample. The mean over the batch has the same loss, so that
    samples of small batches would weigh more. Outputs (B, 1) beside labels (B,) are broadcast by torch to (B, B), without an error,
    and have four times the loss. Tasks of this package are not asked.

    Args:
        task: after `setup`.
        model: as the training loop calls it; it is left in the mode in which it was.
        embedding: on the model's device.
        dataset: the task's dataset of train.

    Raises:
        UserError: names the shapes of the outputs and of the labels.
    """
    if type(task).__module__.startswith("ehr_embed."):
        return
    was_training, device = model.training, embedding.table.device
    model.eval()
    # What the task draws by itself must not change what training draws.
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        warnings.simplefilter("ignore")  # torch's of the shapes, which the message below tells better
        for row in np.argsort(dataset.lengths, kind="stable")[:N_TRIED]:
            alone, twice = (run_step(task, model, embedding, dataset[np.full(n, row)].to(device)) for n in (1, 2))
            loss, loss_of_two = float(alone.loss_sum), float(twice.loss_sum)
            if not (loss and np.isfinite([loss, loss_of_two]).all()):
                continue
            labels = tuple(dataset[np.full(2, row)].labels.shape)
            _refuse(task, loss_of_two / loss, tuple(twice.outputs.shape), labels)
            break
    model.train(was_training)


def _refuse(task: Task, ratio: float, outputs: tuple[int, ...], labels: tuple[int, ...]) -> None:
    name, told = type(task).__name__, f"outputs of shape {outputs} and labels of shape {labels}"
    if outputs == (2, 1) and labels == (2,) and np.isclose(ratio, 4, rtol=TOLERANCE):
        raise UserError(
            f"{name}.step: a batch that holds one sample twice has {told}, and four times the loss of that sample: torch compares "
            "each output with the labels of all samples. Build the samples with labels of shape (n, 1), or compare "
            "outputs.squeeze(1) with the labels"
        )
    if np.isclose(ratio, 1, rtol=TOLERANCE):
        raise UserError(
            f"{name}.step: a batch that holds one sample twice ({told}) has the loss of that sample, so it is the mean over the "
            "batch, and samples of small batches would weigh more. Return StepResult(loss_sum, count, outputs) with the sum, as by "
            'reduction="sum"'
        )
