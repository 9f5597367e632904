"""What a model must offer, and what it may offer beside that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.models.feature_table import FeatureTable


class Model(Protocol):
    """A module built with `embedding_dim`, `has_values` and `num_classes` or `vocab_size`, beside its own options."""

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        """Return logits (B, num_classes) of what `EventEmbedding.inputs` gives, or (B, M, num_classes) of M members: a task
        takes the mean of the members' losses and the mean of their probabilities."""
        ...


@runtime_checkable
class ReadsVocabulary(Protocol):
    """A model that needs the tokens' codes or texts, not only their vectors."""

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Take the vocabulary whose `token_ids` (B, T) the coming inputs hold; called before the weights are loaded, and
        again where a dataset brings new codes."""
        ...


@runtime_checkable
class AdaptsToVectors(Protocol):
    """A model that fits part of itself to the event vectors before it is trained."""

    def adapt_to_vectors(self, vectors: Tensor) -> None:
        """Take the vectors (V, E) of the tokens that occur in train; called before the weights are loaded."""
        ...


@runtime_checkable
class AdaptsToRecords(Protocol):
    """A model that fits part of itself, such as quantiles, to train's records before it is trained."""

    def adapt_to_records(self, train: Iterable[dict[str, Tensor]]) -> None:
        """Take train's inputs at their prediction times, each batch once; called before the first epoch, in every process with all
        of train."""
        ...


@dataclass(frozen=True)
class FeatureSet:
    """A split as a table.

    Attributes:
        features: (n, F), NaN = missing; `features.dense(rows)` gives some rows as float32.
        labels: (n,) int64, classes.
        weights: (n,) float64, of each sample in the loss.
    """

    features: FeatureTable
    labels: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]


@runtime_checkable
class FitsAtOnce(Protocol):
    """A model that is fitted to a table of features in one go, instead of batch by batch along gradients."""

    def n_fitted(self) -> int:
        """Numbers that were fitted."""
        ...

    def choose_features(self, train: Iterable[dict[str, Tensor]]) -> None:
        """Decide from train's inputs, each seen once, what the features are."""
        ...

    def featurise(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, F) float32, the chosen features of a batch."""
        ...

    def fit(
        self,
        train: FeatureSet,
        tuning: FeatureSet,
        *,
        score: Callable[[npt.NDArray[np.float64]], float],
        is_higher_better: bool,
        seed: int,
    ) -> None:
        """Fit to train; `score` of tuning's probabilities (n, C) may choose how much is fitted, and nothing else."""
        ...


def body_of(model: nn.Module) -> nn.Module:
    """What pretraining hands on and `trainer.freeze=body` keeps as it is.

    Raises:
        UserError: the model has no such part.
    """
    body = getattr(model, "body", None)
    if not isinstance(body, nn.Module):
        raise UserError(
            f"{type(model).__name__} has no body to freeze or to hand on. Type: model=encoder or model=decoder"
        )
    return body


def adapt(model: nn.Module, table: Tensor, vocabulary: Vocabulary) -> None:
    """Show a new model the vectors (V, E) of the tokens that train has, where it wants to see them."""
    if isinstance(model, AdaptsToVectors):
        model.adapt_to_vectors(table[torch.from_numpy(vocabulary.tokens["count"].to_numpy() > 0)])


def check_vectors(model: nn.Module, trainable: str) -> None:
    """Refuse token vectors that are to be learned beside a model that does not read them (`reads_vectors = False`).

    Raises:
        UserError: `trainable` is not `frozen`.
    """
    if not getattr(model, "reads_vectors", True) and trainable != "frozen":
        raise UserError(
            f"embedder.trainable={trainable}: {type(model).__name__} reads texts and no token vectors, so these would never be "
            "learned. Type: embedder.trainable=frozen"
        )
