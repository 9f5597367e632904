"""What an embedder must offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Embedder(Protocol):
    """A fixed map from texts to vectors; `embedder.trainable` says whether training moves them afterwards."""

    batch_size: int

    reads_text: bool
    """Whether a vector says something of its text; else `embed` is given the tokens' names, which are distinct."""

    @property
    def embedding_dim(self) -> int:
        """Width E of the vectors, read from the model."""
        ...

    @property
    def fingerprint(self) -> dict[str, Any]:
        """JSON-able; everything that determines the vectors."""
        ...

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors of the texts, (n, E) float32."""
        ...

    def close(self) -> None:
        """Release worker processes, if any."""
        ...
