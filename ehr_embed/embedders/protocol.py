"""Define the protocol of an embedder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ehr_embed.data.vocabulary import Vocabulary


class Embedder(Protocol):
    """Fixed map from texts to vectors; `embedder.trainable` decides whether training changes the vectors afterwards."""

    batch_size: int
    """Texts per call of `embed`."""

    reads_text: bool
    """Whether vectors depend on the texts' meaning, so that a text outside the vocabulary has a useful vector too."""

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
