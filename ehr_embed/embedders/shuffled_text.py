"""Right vectors on the wrong tokens: what is left of a model when its texts mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ehr_embed.data.vocabulary import FIRST_TOKEN, Vocabulary
from ehr_embed.embedders.protocol import Embedder


class ShuffledTextEmbedder:
    """Another embedder's vectors, dealt out anew among the tokens of a vocabulary.

    A control (Hewitt and Liang 2019, arXiv:1909.03368): tokens are as well apart as before, since the vectors are the
    same, but none lies where its text would put it. Each vocabulary is dealt its own way, and texts that it does not
    have stay without a vector.

    Args:
        inner: the embedder whose vectors they are.
        seed: deals otherwise.
    """

    reads_text = False

    def __init__(self, *, inner: Embedder, seed: int = 0) -> None:
        self.inner, self.seed, self.batch_size = inner, seed, inner.batch_size

    @property
    def embedding_dim(self) -> int:
        return self.inner.embedding_dim

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {"class": "ShuffledTextEmbedder", "inner": self.inner.fingerprint, "seed": self.seed}

    def names(self, vocabulary: Vocabulary) -> list[str]:
        names = self.inner.names(vocabulary)
        return names[:FIRST_TOKEN] + deranged(names[FIRST_TOKEN:], self.seed)

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return self.inner.embed(texts)

    def close(self) -> None:
        self.inner.close()


def deranged(names: Sequence[str], seed: int) -> list[str]:
    """The same names in another order, none where it was; where one fills more than half of the places, some stay.

    >>> deranged(["a", "b"], 0)
    ['b', 'a']
    >>> before = ["a", "a", "b", "c", "d"]
    >>> after = deranged(before, 0)
    >>> sorted(after) == before, any(x == y for x, y in zip(before, after))
    (True, False)
    """
    if not names:
        return []
    # Equal names side by side, in random order: a step as long as the longest such row leaves every row.
    distinct, group_N, counts = np.unique(np.array(names, dtype=object), return_inverse=True, return_counts=True)
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(names)), rng.permutation(len(distinct))[group_N]))
    after = np.empty(len(names), dtype=object)
    after[order] = np.array(names, dtype=object)[np.roll(order, -int(counts.max()))]
    return list(after)
