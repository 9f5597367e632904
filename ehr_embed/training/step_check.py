"""Ask the loss of a task of one's own once, before it trains, whether every sample weighs the same in whatever batch it comes."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.data.batches import EventDataset
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.tasks.protocol import Task, run_step

log = logging.getLogger(__name__)
N_TRIED, N_NEEDED, TOLERANCE = 8, 3, 0.02
"""Number of samples that are tried, how many of them must have a loss, and the relative difference of two losses that rounding
explains."""


def check_step(task: Task, model: Any, embedding: EventEmbedding, dataset: EventDataset) -> None:
    """Refuse a loss that is a mean over the batch, or that compares each output with the labels of all samples.

    A batch that holds one sample four times must have twice the loss of a batch that holds it twice. The mean over the batch has
    the same loss, so that samples of small batches would weigh more. Outputs (B, 1) beside labels (B,) are broadcast by torch to
    (B, B), without an error, and have four times the loss. A loss is refused only if all samples that are tried agree. Tasks of
    this package are not asked, and neither is a loss that differs from call to call, as with random masks, or fails on such
    batches.

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
    # The task may draw random numbers here, and training must draw the same numbers as without this check.
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        warnings.simplefilter("ignore")  # torch's of the shapes, which the message below tells better
        try:
            _try(task, model, embedding, dataset, device)
        except UserError:
            raise
        except Exception as error:  # such batches are no batches of training, which would meet a fault of the step too
            log.debug("%s.step was not checked: %s", type(task).__name__, error)
        finally:
            model.train(was_training)


def _try(task: Task, model: Any, embedding: EventEmbedding, dataset: EventDataset, device: torch.device) -> None:
    ratios, shapes = [], set()
    for row in np.argsort(dataset.lengths, kind="stable")[:N_TRIED]:
        batches = [dataset[np.full(n, row)].to(device) for n in (2, 2, 4)]
        results = [run_step(task, model, embedding, batch) for batch in batches]
        loss, again, of_four = (float(result.loss_sum) for result in results)
        if not (loss and np.isfinite([loss, again, of_four]).all()):
            continue
        if not np.isclose(loss, again, rtol=1e-4):
            return
        ratios.append(of_four / loss)
        shapes.add((tuple(results[0].outputs.shape), tuple(batches[0].labels.shape)))
    if len(ratios) >= N_NEEDED and len(shapes) == 1:
        _refuse(task, ratios, *shapes.pop())


def _refuse(task: Task, ratios: list[float], outputs: tuple[int, ...], labels: tuple[int, ...]) -> None:
    name, told = type(task).__name__, f"outputs of shape {outputs} and labels of shape {labels}"
    if outputs == (2, 1) and labels == (2,) and np.isclose(ratios, 4, rtol=TOLERANCE).all():
        raise UserError(
            f"{name}.step: a batch that holds one sample twice has {told}, and one that holds it four times has four times its "
            "loss: torch compares each output with the labels of all samples. Build the samples with labels of shape (n, 1), or "
            "compare outputs.squeeze(1) with the labels"
        )
    if np.isclose(ratios, 1, rtol=TOLERANCE).all():
        raise UserError(
            f"{name}.step: a batch that holds one sample twice ({told}) has the loss of one that holds it four times, so it is the "
            "mean over the batch, and samples of small batches would weigh more. Return StepResult(loss_sum, count, outputs) with "
            'the sum, as by reduction="sum"'
        )
