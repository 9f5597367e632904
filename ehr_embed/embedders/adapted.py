"""Bring the vectors of synonyms together: a small adapter on any embedder, fitted to a table of synonyms by a contrastive loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import digest
from ehr_embed.core.settings import Count, DrawSeed, NotNegative, Positive, checked
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.embedders.protocol import Embedder
from ehr_embed.embedders.synonyms import SHIPPED, Synonyms


class AdaptedEmbedder:
    """Embedder that adds a learned change of low rank to another embedder's vectors: x + x U V, as long as x.

    U (E, R) and V (R, E) are fitted once per process, before the first text, so that each term of a table of synonyms is nearer
    to its synonyms than to those of other terms (InfoNCE in both directions; van den Oord et al. 2018, arXiv:1807.03748). V starts
    at zero, so that `steps=0` leaves the vectors as they are. The other embedder itself stays frozen.

    Args:
        inner: the embedder of the texts.
        synonyms: CSV file with the columns term and synonym; None = the table of the package.
        rank: R.
        steps: steps of Adam over the whole table.
        learning_rate: of Adam.
        temperature: by which cosines are divided in the loss.
        penalty: weight of the mean squared change of the vectors, which keeps texts without synonyms where they were.
        seed: of U.

    Raises:
        UserError: the other embedder reads no texts, or the table cannot be read.
    """

    @checked("embedder")
    def __init__(
        self,
        *,
        inner: Embedder,
        synonyms: str | None = None,
        rank: Count = 32,
        steps: NotNegative = 200,
        learning_rate: Positive = 3e-3,
        temperature: Positive = 0.05,
        penalty: NotNegative = 10.0,
        seed: DrawSeed = 0,
    ) -> None:
        if not inner.reads_text:
            raise UserError(
                f"embedder.inner: {type(inner).__name__} reads no texts, so synonyms have nothing in common that an adapter could "
                "bring out. Type: embedder@embedder.inner=minilm_l6"
            )
        self.inner, self.batch_size = inner, inner.batch_size
        self.reads_text = True
        self._synonyms = Synonyms.read(SHIPPED if synonyms is None else Path(synonyms).expanduser())
        self._settings: dict[str, Any] = {
            "rank": rank,
            "steps": int(steps),
            "learning_rate": learning_rate,
            "temperature": temperature,
            "penalty": penalty,
            "seed": seed,
        }
        self._factors: tuple[Tensor, Tensor] | None = None

    @property
    def embedding_dim(self) -> int:
        return self.inner.embedding_dim

    @property
    def fingerprint(self) -> dict[str, Any]:
        table = digest({term: list(others) for term, others in self._synonyms.of.items()})
        return {"class": "AdaptedEmbedder", "inner": self.inner.fingerprint, "synonyms": table, **self._settings}

    def names(self, vocabulary: Vocabulary) -> list[str]:
        return self.inner.names(vocabulary)

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        if self._factors is None:
            with torch.inference_mode(False):  # a caller may predict in inference mode, in which nothing can be fitted
                self._factors = self._fitted()
        x_NE = torch.from_numpy(self.inner.embed(texts)).float()
        return adapted(x_NE, *self._factors).numpy()

    def close(self) -> None:
        self.inner.close()

    def _fitted(self) -> tuple[Tensor, Tensor]:
        """Return U (E, R) and V (R, E)."""
        pairs = [(term, other) for term, others in self._synonyms.of.items() for other in others if term < other]
        distinct = sorted({text for pair in pairs for text in pair})
        parts = [self.inner.embed(distinct[n : n + self.batch_size]) for n in range(0, len(distinct), self.batch_size)]
        x_NE = torch.from_numpy(np.concatenate(parts)).float()
        row = {text: number for number, text in enumerate(distinct)}
        one_P, other_P = (torch.tensor([row[pair[side]] for pair in pairs]) for side in (0, 1))
        # A term with several synonyms is a right answer for each of them, and so no wrong one.
        same_NN = torch.zeros(len(distinct), len(distinct), dtype=torch.bool)
        same_NN[one_P, other_P] = same_NN[other_P, one_P] = True
        return fitted(x_NE, torch.cat([one_P, other_P]), torch.cat([other_P, one_P]), same_NN, **self._settings)


def adapted(x_NE: Tensor, u_ER: Tensor, v_RE: Tensor) -> Tensor:
    """Return x + x U V, each vector as long as it was.

    >>> x = torch.tensor([[3.0, 4.0]])
    >>> adapted(x, torch.eye(2), torch.zeros(2, 2)).tolist()
    [[3.0, 4.0]]
    """
    return F.normalize(x_NE + x_NE @ u_ER @ v_RE, dim=1) * x_NE.norm(dim=1, keepdim=True)


def fitted(
    x_NE: Tensor,
    one_P: Tensor,
    other_P: Tensor,
    same_NN: Tensor,
    *,
    rank: int,
    steps: int,
    learning_rate: float,
    temperature: float,
    penalty: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return U and V for texts with vectors `x_NE`, of which each of `one_P` means the same as that of `other_P`; `same_NN` says of
    all pairs whether they do."""
    generator = torch.Generator().manual_seed(seed)
    width = x_NE.shape[1]
    u_ER = (torch.randn(width, rank, generator=generator) / width**0.5).requires_grad_()
    v_RE = torch.zeros(rank, width).requires_grad_()
    optimizer = torch.optim.Adam([u_ER, v_RE], lr=learning_rate)
    unit_NE = F.normalize(x_NE, dim=1)
    own = torch.eye(len(x_NE), dtype=torch.bool)
    with torch.enable_grad():
        for _ in range(steps):
            y_NE = adapted(unit_NE, u_ER, v_RE)
            logits_PN = (y_NE[one_P] @ y_NE.T / temperature).masked_fill(own[one_P], -torch.inf)
            right_P = logits_PN.gather(1, other_P[:, None])
            # Other synonyms of the term are no competitors of this one.
            rivals_PN = logits_PN.masked_fill(same_NN[one_P], -torch.inf)
            loss = (torch.cat([right_P, rivals_PN], dim=1).logsumexp(1) - right_P[:, 0]).mean()
            loss = loss + penalty * (y_NE - unit_NE).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return u_ER.detach(), v_RE.detach()
