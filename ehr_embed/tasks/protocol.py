"""What a task must offer: samples, loss, metrics, and what to monitor."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ehr_embed.errors import unknown_name
from ehr_embed.samples import Samples
from ehr_embed.store import EventStore

Probabilities = npt.NDArray[np.float64]
Curves = dict[str, tuple[npt.NDArray[Any], Probabilities]]


class Task(Protocol):
    """Owns samples, targets, loss and metrics; knows no model."""

    monitor: str
    """Metric on tuning that chooses the best checkpoint."""

    @property
    def num_classes(self) -> int:
        """Logits a sample; known after `setup`."""
        ...

    @property
    def samples(self) -> dict[str, Samples]:
        """Samples of each split; known after `setup`."""
        ...

    @property
    def is_higher_better(self) -> bool:
        """Direction of the monitored metric."""
        ...

    def setup(self, store: EventStore, labels_dir: Path, max_length: int) -> None:
        """Read the labels and build the samples of all splits."""
        ...

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a batch: logits (B, C) -> scalar."""
        ...

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, C) logits -> (B, ...) probabilities, as `evaluate` takes them."""
        ...

    def fit_thresholds(self, probabilities: Probabilities) -> None:
        """Choose decision thresholds from tuning probabilities (n, ...), in sample order."""
        ...

    def evaluate(self, split: str, probabilities: Probabilities, *, n_bootstrap: int) -> dict[str, Any]:
        """All metrics of a split over all its samples at once, with intervals from `n_bootstrap` replicates."""
        ...

    def write_predictions(self, path: Path, split: str, probabilities: Probabilities) -> None:
        """Write one row a sample to a parquet file."""
        ...

    def curves(self, probabilities: dict[str, Probabilities]) -> Curves:
        """Binary labels and probabilities of each split for ROC, precision-recall and calibration plots; may be empty."""
        ...


LOWER_IS_BETTER = ("loss", "brier", "ece")


def monitored(monitor: str, metrics: tuple[str, ...]) -> bool:
    """Whether higher values of the monitored metric are better.

    Raises:
        UserError: not a metric of the task.

    >>> monitored("auroc", ("auroc", "brier")), monitored("brier", ("auroc", "brier"))
    (True, False)
    """
    if monitor not in metrics:
        raise unknown_name("task.monitor", monitor, metrics)
    return monitor not in LOWER_IS_BETTER


def as_tensor(values: npt.ArrayLike) -> Tensor:
    """Float32 tensor of class weights and the like."""
    return torch.as_tensor(np.asarray(values, dtype=np.float32))
