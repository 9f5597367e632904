"""Define the protocol of an embedder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ehr_embed.data.vocabulary import Vocabulary

FRAMEWORK_KEYS = {"trainable": "frozen"}
"""Keys of an embedder's YAML that are no arguments of its class, with the values that stand for them where the YAML has none.

`trainable` says what training does with the vectors, whichever embedder gave them: `frozen` (they stay as they are), `residual` (a
learned offset is added to each token's vector) or `full` (the vectors themselves are learned)."""
SPEED_KEYS = ("batch_size", "device")
"""Arguments that change how fast vectors are made and not the vectors, in every embedder that has them."""


class Embedder(Protocol):
    """Fixed map from texts to vectors, built with the keys of its YAML without `FRAMEWORK_KEYS`."""

    batch_size: int
    """Texts per call of `embed`."""

    reads_text: bool
    """True if vectors depend on the texts' meaning, so that a text outside the vocabulary has a useful vector too."""

    @property
    def embedding_dim(self) -> int:
        """Return the width E of the vectors, as the model says."""
        ...

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Return a JSON-able description of everything that determines the vectors."""
        ...

    def names(self, vocabulary: Vocabulary) -> list[str]:
        """Return the input of `embed` per token, (V,): its text, or its distinct name if no texts are read."""
        ...

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return the vectors of the texts, (n, E) float32."""
        ...

    def close(self) -> None:
        """End the worker processes, if there are any."""
        ...


@runtime_checkable
class GivesAnothersVectors(Protocol):
    """An embedder whose `embed` returns another embedder's vectors, so that both share one cache of texts."""

    @property
    def vectors_of(self) -> Embedder:
        """Return the embedder whose vectors `embed` returns, unchanged."""
        ...


def trainable_of(config: Mapping[Any, Any]) -> str:
    """Return how the token vectors of an embedder's config are trained.

    >>> trainable_of({"_target_": "a.B", "trainable": "full"}), trainable_of({"_target_": "a.B"})
    ('full', 'frozen')
    """
    return str(config.get("trainable", FRAMEWORK_KEYS["trainable"]))
