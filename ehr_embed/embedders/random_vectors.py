"""Provide random vectors that depend on no text: the start of an embedding learned from events alone, or a control."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ehr_embed.core.settings import Count, DrawSeed, Width, checked
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

    @checked("embedder")
    def __init__(self, *, embedding_dim: Width = 256, seed: DrawSeed = 0, batch_size: Count = 4096) -> None:
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
