"""What an embedder must offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ehr_embed.data.vocabulary import Vocabulary


class Embedder(Protocol):
    """A fixed map from texts to vectors; `embedder.trainable` says whether training moves them afterwards."""

    batch_size: int

    reads_text: bool
    """Whether the vector of a text that no vocabulary has says something of it."""

    @property
    def embedding_dim(self) -> int:
        """Width E of the vectors, read from the model."""
        ...

    @property
    def fingerprint(self) -> dict[str, Any]:
        """JSON-able; everything that determines the vectors."""
        ...

    def names(self, vocabulary: Vocabulary) -> list[str]:
        """What `embed` is given for each token, (V,): the texts, or the distinct strings where no text is read."""
        ...

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors of the texts, (n, E) float32."""
        ...

    def close(self) -> None:
        """Release worker processes, if any."""
        ...
