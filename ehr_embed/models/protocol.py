"""The interface of models: the methods that every model must have, and those that it may have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.models.feature_table import FeatureTable


class Model(Protocol):
    """A module built with `embedding_dim`, `has_values`, `num_classes` or `vocab_size`, and options of its own.

    Class attributes say what the module's type does not show; `Declarations` lists them with their defaults.
    A module that is pretrained for other models, or frozen by `trainer.freeze=body`, has the part that is handed on in its
    attribute `body`, and the part that is not, such as the head, elsewhere.
    """

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        """Return logits (B, num_classes) of what `EventEmbedding.inputs` gives, or (B, M, num_classes) of M members: a task
        takes the mean of the members' losses and the mean of their probabilities.

        Training, `check=true`, predictions and explanations give the vectors as `rows` (R, E) and `row_ids` (B, T); whoever calls a
        model by hand may give `embeddings` (B, T, E). `event_vectors` and `EventInput` take both. `LEFT_OUT` of
        models/event_vectors.py lists the inputs that are not always there.
        """
        ...


@dataclass(frozen=True)
class Declarations:
    """The facts about a model that its class may declare, each as a class attribute of the same name.

    Attributes:
        is_causal: True = an event sees only itself and earlier events, so that the model can predict the next one; False = an event
            sees the events on both sides, so that the model can predict a masked one; None = neither is certain, and the model does
            no task that predicts events.
        reads_vectors: whether the event vectors reach the model; False for a model that reads codes or texts alone.
        learns_vectors: whether a gradient reaches the event vectors; False for a model that copies them before training.
        meaning_keys: options of the constructor that change what the weights mean and none of their shapes. A model with another
            value of such an option takes no weights from a checkpoint. The default names the options of `Body`.
        token_weights: beginnings of the names of weights that hold a row per token of the vocabulary; with another vocabulary they
            are refused, even of the same size. The default names those of `EventHead`.
        reads_values: whether the weights of `body` depend on how the data give numbers (`data.values`) beyond their shapes.
        learns_all: whether each parameter has a gradient in each step of this package's tasks, so that several processes need not
            look for those without one; asked only of models of this package.
    """

    is_causal: bool | None = None
    reads_vectors: bool = True
    learns_vectors: bool = True
    meaning_keys: tuple[str, ...] = ("n_heads", "positions")
    token_weights: tuple[str, ...] = ("head.tokens.",)
    reads_values: bool = False
    learns_all: bool = True


def declarations(model: nn.Module | type) -> Declarations:
    """Return what a model, or its class, declares; this is the only place that reads these attributes and knows their defaults.

    Where a property declares something only after the model is built, its class has the default.

    Raises:
        UserError: an attribute has another type.

    >>> class Forward(nn.Module):
    ...     is_causal = True
    >>> declarations(Forward()).is_causal, declarations(Forward()).meaning_keys
    (True, ('n_heads', 'positions'))
    """
    kind = model if isinstance(model, type) else type(model)
    found = {field.name: getattr(model, field.name) for field in fields(Declarations) if hasattr(model, field.name)}
    declared = {name: value for name, value in found.items() if not isinstance(value, property)}
    for name, value in declared.items():
        if name in ("meaning_keys", "token_weights"):
            is_right = isinstance(value, tuple) and all(isinstance(key, str) for key in value)
            expected = "a tuple of names"
        else:
            is_right = isinstance(value, bool) or (value is None and name == "is_causal")
            expected = "True or False"
        if not is_right:
            raise UserError(
                f"{kind.__name__}.{name}={value!r}: expected {expected}, see Declarations in ehr_embed/models/protocol.py. "
                "What a model declares decides which tasks and weights it is given."
            )
    return Declarations(**declared)


@runtime_checkable
class ReadsVocabulary(Protocol):
    """A model that needs the tokens' codes or texts, not only their vectors."""

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the vocabulary of the `token_ids` (B, T) in coming inputs.

        The method is called before the weights are loaded, and again when a dataset brings new codes.
        """
        ...


@runtime_checkable
class AdaptsToVectors(Protocol):
    """A model that fits part of itself to the event vectors before it is trained."""

    def adapt_to_vectors(self, vectors: Tensor) -> None:
        """Fit to the vectors (V, E) of the tokens that occur in train; called before the weights are loaded."""
        ...


@runtime_checkable
class AdaptsToRecords(Protocol):
    """A model that fits part of itself, such as quantiles, to train's records before it is trained."""

    def adapt_to_records(self, train: Iterable[dict[str, Tensor]]) -> None:
        """Take train's inputs at their prediction times, each batch once; called before the first epoch, in every process with all
        of train."""
        ...


@runtime_checkable
class AlignsCodes(AdaptsToRecords, Protocol):
    """A model that reads another dataset's codes as those of its training, with their numbers ranked among themselves.

    Models without this method see the vectors of the codes that stand for those of the dataset, and nothing else changes.
    """

    def align(self, matches: Mapping[str, tuple[str, float]] | None) -> None:
        """Read each code of the present vocabulary as the known code that `matches` names, as far as its gate in (0, 1] says, and
        leave all others out; None = read codes as they are.

        The method is called after `set_vocabulary`, and `adapt_to_records` after it, with the dataset's records.

        Raises:
            UserError: the model keeps nothing by which numbers could be compared.
        """
        ...


@runtime_checkable
class AlignsTwins(AlignsCodes, Protocol):
    """A model of which several codes can get the events of one code of another dataset."""

    takes_twins: bool

    def align(self, matches: Mapping[str, tuple[str, float]] | None, twins: Mapping[str, str] | None = None) -> None:
        """Read codes as `AlignsCodes.align` does. A known code in `twins` gets the events of the code that `twins` names for it."""
        ...


def align_codes(
    model: AlignsCodes, matches: Mapping[str, tuple[str, float]] | None, twins: Mapping[str, str] | None
) -> None:
    """Call `model.align`, with the twins if the model takes any."""
    if isinstance(model, AlignsTwins):
        model.align(matches, twins)
    else:
        model.align(matches)


@runtime_checkable
class PoolsCodes(AlignsCodes, Protocol):
    """A model that reads the codes of several datasets as each other's while it is trained."""

    def pool(self, matches: Mapping[str, tuple[str, float]], dataset_of: Mapping[str, int] | None = None) -> None:
        """Read each code of the present vocabulary as the code that `matches` names, as far as its gate says; those that are named
        become the known codes, and numbers are ranked among those of their own dataset.

        The method is called after `set_vocabulary` and before vectors, records or weights are given. `align` may then follow, with
        a further dataset's codes.

        Args:
            matches: code -> code as which it is read, and gate in (0, 1].
            dataset_of: number of each code's dataset, -1 = all; needed only where the model is fitted.
        """
        ...


@dataclass(frozen=True)
class FeatureSet:
    """The samples of a split as a table of features with labels.

    Attributes:
        features: (n, F), NaN = missing; `features.dense(rows)` gives some rows as float32.
        labels: (n,) int64, the class of each sample, or float64, its number in standard deviations of train.
        weights: (n,) float64, the weight of each sample in the loss.
    """

    features: FeatureTable
    labels: npt.NDArray[Any]
    weights: npt.NDArray[np.float64]


@runtime_checkable
class FitsAtOnce(Protocol):
    """A model that is fitted to a table of features at once, instead of by gradient steps on batches."""

    def n_fitted(self) -> int:
        """Return the number of fitted numbers, such as coefficients; known after `fit`."""
        ...

    def choose_features(self, train: Iterable[dict[str, Tensor]]) -> None:
        """Choose the features by the inputs of train; `train` yields each batch once."""
        ...

    def featurise(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the chosen features of a batch, (B, F) float32."""
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
        """Fit to train; use tuning only to choose how much is fitted, by the `score` of its probabilities (n, C), or of
        its numbers (n, 1)."""
        ...


def body_of(model: nn.Module) -> nn.Module:
    """Return the body of a model, which `init_from` takes from a pretrained run and `trainer.freeze=body` freezes.

    Raises:
        UserError: the model has no body.
    """
    if (body := body_or_none(model)) is None:
        raise UserError(
            f"{type(model).__name__} has no body that could be frozen or could start another model. Type: model=encoder "
            "or model=decoder"
        )
    return body


def body_or_none(model: nn.Module) -> nn.Module | None:
    """Return the body of a model, None where it has none."""
    body = getattr(model, "body", None)
    return body if isinstance(body, nn.Module) else None


def adapt(model: nn.Module, table: Tensor, vocabulary: Vocabulary) -> None:
    """Fit an `AdaptsToVectors` model to the vectors of train's tokens; `table` (V, E) holds those of all tokens."""
    if isinstance(model, AdaptsToVectors):
        model.adapt_to_vectors(table[torch.from_numpy(vocabulary.tokens["count"].to_numpy() > 0)])


def passes_gradients(model: nn.Module) -> bool:
    """Return whether a gradient of the prediction reaches the event vectors."""
    declared = declarations(model)
    return declared.reads_vectors and declared.learns_vectors and not isinstance(model, FitsAtOnce)


def check_vectors(model: nn.Module, trainable: str) -> None:
    """Refuse learned token vectors with a model that does not read them (`reads_vectors = False`), or that copies those of the
    known codes before training (`learns_vectors = False`).

    Raises:
        UserError: `trainable` is not `frozen` and the model would not learn token vectors.
    """
    if trainable == "frozen":
        return
    declared = declarations(model)
    if not declared.learns_vectors:
        raise UserError(
            f"embedder.trainable={trainable}: {type(model).__name__} copies the vectors of the known codes before training, so "
            "the embedder's own would never be learned. Type: embedder.trainable=frozen"
        )
    if not declared.reads_vectors:
        raise UserError(
            f"embedder.trainable={trainable}: {type(model).__name__} reads texts and no token vectors, so these would never be "
            "learned. Type: embedder.trainable=frozen"
        )


def check_variants(model: nn.Module, share: float) -> None:
    """Refuse variants of texts (`data.text_variants`) with a model that would never read them: one that reads codes or texts, or
    that copies the vectors of the known codes before training.

    Raises:
        UserError: it would not.
    """
    declared = declarations(model)
    if isinstance(model, FitsAtOnce) or not (declared.learns_vectors and declared.reads_vectors):
        raise UserError(
            f"data.text_variants={share}: {type(model).__name__} does not look up vectors of tokens while it trains, so no "
            "other words would ever reach it. Type: data.text_variants=0 (model=code_tab has model.text_noise)"
        )
