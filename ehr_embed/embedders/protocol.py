"""What an embedder must offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Embedder(Protocol):
    """A frozen map from texts to vectors."""

    batch_size: int

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
