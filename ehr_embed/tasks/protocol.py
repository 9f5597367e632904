"""What a task must offer: samples, loss, metrics, and what to monitor."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.data.batches import Batch, EventDataset
from ehr_embed.data.samples import Samples
from ehr_embed.data.store import EventStore
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.evaluation.metric import Metric
from ehr_embed.evaluation.metrics import values_of

log = logging.getLogger(__name__)
Outputs = npt.NDArray[np.float64]
"""What a task keeps of each sample for evaluation: probabilities, or sums over its events."""
Curves = dict[str, tuple[npt.NDArray[Any], Outputs]]


@dataclass(frozen=True)
class StepResult:
    """What a task makes of a batch; the trainer divides sums by counts, so that each event or sample weighs the same.

    Attributes:
        loss_sum: scalar, the sum of the losses of the batch's events (a task that predicts events) or samples; in training it
            carries the gradient.
        count: how many losses are summed in it. A number, or a scalar tensor on the batch's device where only the device
            knows it: to read it back would make the host wait.
        outputs: (B, n_outputs), what is kept of each sample for evaluation; carries no gradient.
    """

    loss_sum: Tensor
    count: float | Tensor
    outputs: Tensor


class Task(Protocol):
    """Owns samples, targets, loss and metrics; knows no model."""

    metrics: Sequence[Metric]
    """The metrics that `evaluate` gives, each with its direction; a class attribute, so that a search can ask without data."""

    monitor: str
    """Metric on tuning that chooses the best checkpoint, one of `metrics`."""

    needs_causal: bool | None
    """Whether the model must not see what comes after an event (True), must (False), or may be either (None)."""

    is_trained: bool
    """Whether there is anything to fit; else a trained model is only evaluated."""

    @property
    def sizes(self) -> dict[str, int]:
        """What a model must be built with to do the task, `num_classes` or `vocab_size`; known after `setup`."""
        ...

    @property
    def class_names(self) -> list[str]:
        """Classes or labels in the order of a model's outputs, empty where it predicts events; known after `setup`."""
        ...

    @property
    def n_outputs(self) -> int:
        """Numbers kept of each sample; known after `setup`."""
        ...

    @property
    def samples(self) -> dict[str, Samples]:
        """Samples of each split as they are evaluated; known after `setup`."""
        ...

    @property
    def is_higher_better(self) -> bool:
        """Direction of the monitored metric, as `metrics` declares it."""
        ...

    def setup(self, store: EventStore, labels_dir: Path, max_length: int) -> None:
        """Read the labels, if any, and build the samples of all splits; called by `set_up` alone, which checks them."""
        ...

    def dataset(self, split: str, rng: np.random.Generator | None = None) -> EventDataset:
        """Samples of a split; `rng` draws what is random about them in training, None for evaluation."""
        ...

    def step(self, model: nn.Module, embedding: EventEmbedding, batch: Batch) -> StepResult:
        """Return the sum of a batch's losses, what it is the sum of, and the batch's outputs."""
        ...

    def fit_thresholds(self, outputs: Outputs) -> None:
        """Choose decision thresholds from the outputs of tuning (n, n_outputs), in sample order."""
        ...

    def evaluate(self, split: str, outputs: Outputs, *, n_bootstrap: int) -> dict[str, Any]:
        """All metrics of a split over all its samples at once, with intervals from `n_bootstrap` replicates."""
        ...

    def write_predictions(self, path: Path, split: str, outputs: Outputs) -> None:
        """Write one row a sample to a parquet file."""
        ...

    def curves(self, outputs: dict[str, Outputs]) -> Curves:
        """Binary labels and probabilities of each split for ROC, precision-recall and calibration plots; may be empty."""
        ...


@runtime_checkable
class WeighsSamples(Protocol):
    """A task whose loss is the mean over samples of one class each, every sample's loss times its weight."""

    label_smoothing: float
    """Share of probability spread over all classes."""

    def sample_weights(self, split: str) -> npt.NDArray[np.float64]:
        """Return the weight of each sample of a split in the loss, (n,); their mean over train is 1."""
        ...


@runtime_checkable
class HasBaselines(Protocol):
    """A task whose metrics stand beside those of something that needs no model."""

    def baselines(self, split: str) -> dict[str, dict[str, float]]:
        """Return the metrics of each baseline on a split; called once per run, by the process that writes the results."""
        ...


def check_causality(task: Task, model: nn.Module) -> None:
    """Refuse a model that would see what it is to predict, or that cannot see what the task shows it.

    Raises:
        UserError: the model's `is_causal` is not what the task needs.
    """
    is_causal = getattr(model, "is_causal", None)
    if task.needs_causal is None or is_causal == task.needs_causal:
        return
    name, task_name = type(model).__name__, type(task).__name__
    if task.needs_causal:
        raise UserError(
            f"{task_name} predicts an event from those before it, and {name} (is_causal={is_causal}) also sees those after: it "
            "would read off the answer. Type: model=decoder, or task=masked_event for an encoder"
        )
    raise UserError(
        f"{task_name} predicts an event from both sides, and {name} (is_causal={is_causal}) sees one. "
        "Type: model=encoder, or task=next_event for a decoder"
    )


def tuning_values(task: Task, outputs: Outputs) -> dict[str, float]:
    """Each metric of tuning from its outputs (n, n_outputs), by which decision thresholds are chosen first."""
    task.fit_thresholds(outputs)
    return values_of(task.evaluate("tuning", outputs, n_bootstrap=0))


def check_class_weights(weights: str | Sequence[float] | None) -> None:
    """Refuse weights from which no mean can be taken.

    Raises:
        UserError: one is 0 or less.

    >>> check_class_weights([1, 4]), check_class_weights("balanced")
    (None, None)
    """
    if weights is not None and not isinstance(weights, str) and any(weight <= 0 for weight in weights):
        raise UserError(
            f"task.class_weights={list(weights)}: expected numbers above 0. A class of weight 0 would not be learned. "
            "Type: task.class_weights=balanced"
        )


def run_step(task: Task, model: nn.Module, embedding: EventEmbedding, batch: Batch) -> StepResult:
    """Return the task's step on a batch.

    Raises:
        UserError: the task returned something other than a `StepResult`, such as a mean loss.
    """
    result = task.step(model, embedding, batch)
    if isinstance(result, StepResult):
        return result
    name = type(task).__name__
    raise UserError(
        f"{name}.step returned a {type(result).__name__}, expected ehr_embed.api.StepResult(loss_sum, count, outputs): "
        "a mean over each batch would give events or samples of small batches more weight. Return the sum of the losses and how "
        "many they are, as docs/extending.md shows"
    )


@cache
def warn_of_rounded(model: str, dtype: torch.dtype) -> None:
    """Say once that a model's logits came in half precision."""
    log.warning(
        "%s gives its logits in %s, of three digits or fewer: different samples get equal probabilities, and ranks are lost. "
        "Let the model's last layer be an ehr_embed.api.LogitLinear in place of a torch.nn.Linear, or type: "
        "trainer.precision=32-true",
        model,
        str(dtype).removeprefix("torch."),
    )


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return a model's logits, with a warning where they were rounded to half precision."""
    logits: Tensor = model(inputs)
    if logits.dtype in (torch.bfloat16, torch.float16):
        warn_of_rounded(type(getattr(model, "module", model)).__name__, logits.dtype)
    return logits


def as_tensor(values: npt.ArrayLike) -> Tensor:
    """Float32 tensor of class weights and the like."""
    return torch.as_tensor(np.asarray(values, dtype=np.float32))
