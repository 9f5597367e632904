"""Provide random vectors that depend on no text: the start of an embedding learned from events alone, or a control."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ehr_embed.core.errors import check_range
from ehr_embed.data.vocabulary import Vocabulary


class RandomEmbedder:
    """Embedder that draws a vector for each token's name from a normal distribution.

    The norm of a vector is about one, like that of a text vector. A name has the same vector in every vocabulary.

    Args:
        embedding_dim: width E of the vectors.
        seed: seed of the vectors.
        batch_size: names per call of `embed`.
    """

    reads_text = False

    def __init__(self, *, embedding_dim: int = 256, seed: int = 0, batch_size: int = 4096) -> None:
        check_range("embedder.embedding_dim", embedding_dim, 1, 65_536)
        check_range("embedder.batch_size", batch_size, 1)
        check_range("embedder.seed", seed, 0)
        self.embedding_dim, self.seed, self.batch_size = embedding_dim, seed, batch_size

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"class": "RandomEmbedder", "embedding_dim": self.embedding_dim, "seed": self.seed}

    def names(self, vocabulary: Vocabulary) -> list[str]:
        return vocabulary.strings

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        vectors = np.empty((len(texts), self.embedding_dim), np.float32)
        for row, name in enumerate(texts):
            hashed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
            vectors[row] = np.random.default_rng([self.seed, hashed]).standard_normal(self.embedding_dim)
        return vectors / np.float32(np.sqrt(self.embedding_dim))

    def close(self) -> None:
        """Do nothing: there are no worker processes to end."""
