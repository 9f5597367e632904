"""Embed texts by feature hashing: deterministic vectors without weights, for tests and as the weakest text baseline."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ehr_embed.core.settings import Count, Width, checked
from ehr_embed.data.vocabulary import Vocabulary


class HashingEmbedder:
    """Embedder that sums signed hashes of words and character trigrams (Weinberger et al. 2009, arXiv:0902.2206).

    Vectors are scaled to a norm of one.

    Args:
        embedding_dim: width E of the vectors.
        batch_size: texts per call of `embed`.
    """

    reads_text = True

    @checked("embedder")
    def __init__(self, *, embedding_dim: Width = 64, batch_size: Count = 4096) -> None:
        self.embedding_dim, self.batch_size = embedding_dim, batch_size

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"class": "HashingEmbedder", "embedding_dim": self.embedding_dim}

    def names(self, vocabulary: Vocabulary) -> list[str]:
        return vocabulary.texts

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        vectors = np.zeros((len(texts), self.embedding_dim), np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                for feature in (word, *(word[i : i + 3] for i in range(len(word) - 2))):
                    hashed = int.from_bytes(hashlib.blake2b(feature.encode(), digest_size=8).digest(), "little")
                    vectors[row, (hashed >> 1) % self.embedding_dim] += 1.0 if hashed & 1 else -1.0
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.divide(vectors, norms, where=norms > 0, out=vectors)

    def close(self) -> None:
        """Do nothing: there are no worker processes to end."""
