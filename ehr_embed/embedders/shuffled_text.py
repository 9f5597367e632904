"""Permute the vectors of an embedder among the tokens: a control for what a model owes to the texts' meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ehr_embed.core.settings import DrawSeed
from ehr_embed.data.vocabulary import FIRST_TOKEN, Vocabulary
from ehr_embed.embedders.protocol import Embedder


class ShuffledTextEmbedder:
    """Embedder that permutes another embedder's vectors among the tokens of a vocabulary.

    This is a control (Hewitt and Liang 2019, arXiv:1909.03368): the set of vectors is unchanged, so tokens are as far
    apart as before, but no token has the vector of its own text. Each vocabulary has its own permutation, so a text
    outside the vocabulary has no vector.

    Args:
        inner: the embedder that computes the vectors.
        seed: seed of the permutation.
    """

    reads_text = False

    def __init__(self, *, inner: Embedder, seed: DrawSeed = 0) -> None:
        self.inner, self.seed, self.batch_size = inner, seed, inner.batch_size

    @property
    def embedding_dim(self) -> int:
        return self.inner.embedding_dim

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"class": "ShuffledTextEmbedder", "inner": self.inner.fingerprint, "seed": self.seed}

    @property
    def vectors_of(self) -> Embedder:
        """Return the inner embedder: only the names are permuted, so its cached vectors serve every seed."""
        return self.inner

    def names(self, vocabulary: Vocabulary) -> list[str]:
        names = self.inner.names(vocabulary)
        return names[:FIRST_TOKEN] + deranged(names[FIRST_TOKEN:], self.seed)

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return self.inner.embed(texts)

    def close(self) -> None:
        self.inner.close()


def deranged(names: Sequence[str], seed: int) -> list[str]:
    """Return the names in another order, in which no position has its old name.

    If one name has more than half of the positions, some of these keep it.

    >>> deranged(["a", "b"], 0)
    ['b', 'a']
    >>> before = ["a", "a", "b", "c", "d"]
    >>> after = deranged(before, 0)
    >>> sorted(after) == before, any(x == y for x, y in zip(before, after))
    (True, False)
    """
    if not names:
        return []
    # Equal names are put next to each other, groups in random order. A cyclic shift by the size of the largest group
    # then moves every name out of its group.
    distinct, group_N, counts = np.unique(np.array(names, dtype=object), return_inverse=True, return_counts=True)
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(names)), rng.permutation(len(distinct))[group_N]))
    after = np.empty(len(names), dtype=object)
    after[order] = np.array(names, dtype=object)[np.roll(order, -int(counts.max()))]
    return list(after)
