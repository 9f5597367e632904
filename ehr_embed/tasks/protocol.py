"""The interface of tasks: samples, loss, metrics and the monitored metric."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
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
from ehr_embed.data.labels import LabelSet
from ehr_embed.data.samples import Samples
from ehr_embed.data.store import EventStore
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.evaluation.metric import Metric
from ehr_embed.evaluation.metric_entries import values_of
from ehr_embed.models.event_vectors import named_inputs
from ehr_embed.models.protocol import declarations

log = logging.getLogger(__name__)
Outputs = npt.NDArray[np.float64]
"""Outputs per sample that a task evaluates, (n, n_outputs): probabilities, or sums over the sample's events."""
Curves = dict[str, tuple[npt.NDArray[Any], Outputs]]


@dataclass(frozen=True)
class StepResult:
    """The loss and outputs of a batch; the trainer divides sums by counts, so that all events or samples weigh equally.

    Attributes:
        loss_sum: scalar, the sum of the losses of the batch's events (for a task that predicts events) or samples; in
            training it carries the gradient.
        count: the number of losses in the sum. It may be a scalar tensor on the batch's device, so that the host does
            not wait for the device.
        outputs: (B, n_outputs), the outputs of each sample for evaluation; they carry no gradient.
    """

    loss_sum: Tensor
    count: float | Tensor
    outputs: Tensor


class Task(Protocol):
    """A prediction problem: it owns samples, targets, loss and metrics, and knows no model."""

    metrics: Sequence[Metric]
    """Metrics that `evaluate` returns, with their directions; a class attribute that a search reads without data."""

    monitor: str
    """Name of the metric on tuning that chooses the best checkpoint, one of `metrics`."""

    needs_causal: bool | None
    """True = only causal models can do the task, False = only bidirectional models can, None = both can."""

    is_trained: bool
    """True if the task trains the model; if False, a trained model is only evaluated."""

    @property
    def sizes(self) -> dict[str, Any]:
        """Return the size with which a model must be built, `num_classes` or `vocab_size`; known after `setup`.

        A task that asks for times also gives `hazards`, the plain values of `ehr_embed.models.hazards.HazardSizes`.
        """
        ...

    @property
    def class_names(self) -> list[str]:
        """Return the classes or labels in the order of a model's outputs; known after `setup`.

        The list is empty for a task that predicts events.
        """
        ...

    @property
    def n_outputs(self) -> int:
        """Return the number of outputs per sample; known after `setup`."""
        ...

    @property
    def samples(self) -> dict[str, Samples]:
        """Return the samples of each split as they are evaluated; known after `setup`."""
        ...

    @property
    def is_higher_better(self) -> bool:
        """Return the direction of the monitored metric, as declared in `metrics`."""
        ...

    def setup(self, store: EventStore, labels_dir: Path, max_length: int) -> None:
        """Read the labels, if any, and build the samples of all splits; only `set_up` calls this method."""
        ...

    def dataset(self, split: str, rng: np.random.Generator | None = None) -> EventDataset:
        """Return the dataset of a split; `rng` draws its random parts in training and is None in evaluation."""
        ...

    def step(self, model: nn.Module, embedding: EventEmbedding, batch: Batch) -> StepResult:
        """Return the sum of a batch's losses, their number, and the outputs of its samples."""
        ...

    def fit_thresholds(self, outputs: Outputs) -> None:
        """Choose decision thresholds by the outputs of tuning, (n, n_outputs) in sample order."""
        ...

    def evaluate(self, split: str, outputs: Outputs, *, n_bootstrap: int) -> dict[str, Any]:
        """Return all metrics of a split over all its samples, with intervals from `n_bootstrap` replicates."""
        ...

    def write_predictions(self, path: Path, split: str, outputs: Outputs) -> None:
        """Write one row per sample to a parquet file."""
        ...

    def curves(self, outputs: dict[str, Outputs]) -> Curves:
        """Return binary labels and probabilities per split for ROC, precision-recall and calibration plots, if any."""
        ...


def check_losses(task: object, losses: Tensor, expected: tuple[int, ...], each: str, example: str = "") -> None:
    """Refuse losses of another shape than one per sample (or what `each` names), as a task's own loss may return.

    Raises:
        UserError: names the task, both shapes and the remedy.
    """
    if losses.shape != expected:
        raise UserError(
            f"{type(task).__name__}.loss returned a tensor of shape {tuple(losses.shape)}, expected {tuple(expected)}, one loss "
            f"per {each}: the trainer takes the mean over a whole step. Leave the mean out{example}"
        )


@runtime_checkable
class WeighsSamples(Protocol):
    """A task whose samples have one class each, and whose loss is the mean of the samples' weighted losses."""

    label_smoothing: float
    """Share of the target probability that is spread over all classes."""

    def sample_weights(self, split: str) -> npt.NDArray[np.float64]:
        """Return the weight of each sample of a split in the loss, (n,); their mean over train is 1."""
        ...


@runtime_checkable
class GivesProbabilities(Protocol):
    """A task whose outputs are the probabilities of its classes or labels, one column each."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities (B, C) float64 of a model's logits (B, C), or (B, M, C) of M members."""
        ...


@runtime_checkable
class PredictsNumber(Protocol):
    """A task with one number per sample, whose model has one output (`models/label_outputs.py` says in which unit)."""

    predicts_number: bool
    """True."""


@runtime_checkable
class HasUnlabelled(Protocol):
    """A task that may use the labels of a part of train's samples only."""

    def records(self) -> EventDataset:
        """Return train's records at their prediction times, with those whose labels are not used; their labels mean nothing."""
        ...


@runtime_checkable
class ReadsLabels(Protocol):
    """A task with label sets, which are looked at before the event store is built."""

    def label_sets(self, labels_dir: Path) -> list[LabelSet]:
        """Return the task's label sets, whose values are the classes, or refuse them; `setup` reads the same."""
        ...


@runtime_checkable
class ChecksFirst(Protocol):
    """A task that can tell, before anything is computed, that it cannot train."""

    def check(self) -> None:
        """Refuse now what would be refused after the data are prepared; a finished run is opened without this.

        Raises:
            UserError: the task cannot train as it is configured or installed.
        """
        ...


@runtime_checkable
class TakesSizes(Protocol):
    """A task that asks a trained model as that run built it, so that `sizes` are those of the run."""

    def take_sizes(self, sizes: Mapping[str, Any], where: Path) -> None:
        """Take the sizes of the checkpoint that the weights come from; called after `setup`, before the model is built.

        Raises:
            UserError: that model cannot be asked.
        """
        ...


@runtime_checkable
class ReadsWords(Protocol):
    """A task that may be given its outcome in words, which the run's embedder embeds."""

    words: str | None
    """The words; None = the outcome is given otherwise, and `take_words` is not called."""

    def take_words(self, vector: Tensor, table: Tensor) -> None:
        """Take the vector (E,) of the words and those of the vocabulary (V, E); called after `setup`.

        Raises:
            UserError: no event of the vocabulary is near to the words.
        """
        ...


@runtime_checkable
class HasBaselines(Protocol):
    """A task that has baselines without a model, whose metrics are reported beside the model's."""

    def baselines(self, split: str) -> dict[str, dict[str, float]]:
        """Return the metrics of each baseline on a split; called once per run, by the process that writes the results."""
        ...


@runtime_checkable
class DrawsPlots(Protocol):
    """A task that has plots of its own beside those of `curves`."""

    def plots(self, outputs: dict[str, Outputs]) -> dict[str, Callable[[Path], None]]:
        """Return by name a function that writes the plot, given the outputs (n, n_outputs) of each evaluated split."""
        ...


def check_causality(task: Task, model: nn.Module) -> None:
    """Refuse a model that would see its targets, or that would not see the events on both sides of them.

    Raises:
        UserError: the model's `is_causal` differs from the task's `needs_causal`.
    """
    is_causal = declarations(model).is_causal
    if task.needs_causal is None or is_causal == task.needs_causal:
        return
    name, task_name = type(model).__name__, type(task).__name__
    if task.needs_causal:
        raise UserError(
            f"{task_name} predicts an event from those before it, and {name} (is_causal={is_causal}) also sees those after: it "
            "would see the answer. Type: model=decoder, or task=masked_event for an encoder"
        )
    raise UserError(
        f"{task_name} predicts an event from the events on both sides, and {name} (is_causal={is_causal}) reads those on one side. "
        "Type: model=encoder, or task=next_event for a decoder"
    )


def tuning_values(task: Task, outputs: Outputs) -> dict[str, float]:
    """Choose decision thresholds by the outputs of tuning (n, n_outputs), and return the metrics of tuning."""
    task.fit_thresholds(outputs)
    return values_of(task.evaluate("tuning", outputs, n_bootstrap=0))


def check_class_weights(weights: str | Sequence[float] | None) -> None:
    """Refuse class weights that are not positive.

    Raises:
        UserError: a weight is 0 or less.

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
    with named_inputs(type(getattr(model, "module", model)).__name__):
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
    """Warn once per model class and number format that the logits are in half precision."""
    log.warning(
        "%s gives its logits in %s, of three digits or fewer: different samples get equal probabilities, and ranks are lost. "
        "Let the model's last layer be an ehr_embed.api.LogitLinear in place of a torch.nn.Linear, or type: "
        "trainer.precision=32-true",
        model,
        str(dtype).removeprefix("torch."),
    )


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return a model's logits, and warn if they are rounded to half precision."""
    logits: Tensor = model(inputs)
    if logits.dtype in (torch.bfloat16, torch.float16):
        warn_of_rounded(type(getattr(model, "module", model)).__name__, logits.dtype)
    return logits


def as_tensor(values: npt.ArrayLike) -> Tensor:
    """Return numbers, such as class weights, as a float32 tensor."""
    return torch.as_tensor(np.asarray(values, dtype=np.float32))
