"""Read tokens in other words while a model trains, so that it relies on what texts say and not on which texts say it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import OneOf, Share, check_setting
from ehr_embed.data.vocabulary import FIRST_TOKEN
from ehr_embed.embedders.synonyms import Synonyms, tidy

log = logging.getLogger(__name__)
SYNONYMS, WORDS, NEIGHBOURS = "synonyms", "words", "neighbours"
KINDS = (SYNONYMS, WORDS, NEIGHBOURS)
Kind = Annotated[str, OneOf(*KINDS)]
MAX_WORDS = 4
"""Words of a text that are left out, each in a variant of its own, at most."""
N_NEIGHBOURS = 3
LEAST_COSINE = 0.6
"""Cosine below which two texts have nothing to do with each other, as in `alignment.yaml`."""


class TextVariants(nn.Module):
    """Vectors of other words for tokens, by which some of them are read at random.

    Args:
        vectors: (M, E) of all variants, those of a token one after the other.
        starts: (V + 1,) int64, where those of each token start.
        share: probability with which a token of a batch that has variants is read by one of them.
    """

    vectors: Tensor
    starts: Tensor

    def __init__(self, vectors: Tensor, starts: Tensor, share: Share) -> None:
        super().__init__()
        check_setting("data.text_variants", share, Share)
        self.share = share
        self.register_buffer("vectors", vectors.float(), persistent=False)
        self.register_buffer("starts", starts, persistent=False)

    def forward(self, tokens_R: Tensor, own_RE: Tensor) -> Tensor:
        """Return the texts' vectors `own_RE` of tokens, some of them replaced by a variant's, drawn anew at each call.

        >>> variants = TextVariants(torch.tensor([[5.0], [6.0]]), torch.tensor([0, 0, 2]), 1.0)
        >>> found = variants(torch.tensor([0, 1]), torch.tensor([[1.0], [2.0]]))
        >>> float(found[0]), float(found[1]) in (5.0, 6.0)
        (1.0, True)
        """
        first_R = self.starts[tokens_R]
        n_R = self.starts[tokens_R + 1] - first_R
        draw_R, place_R = torch.rand(2, len(tokens_R), device=own_RE.device)
        is_varied_R = (draw_R < self.share) & (n_R > 0)
        at_R = (first_R + (place_R * n_R).long().clamp(max=(n_R - 1).clamp(min=0))).clamp(max=len(self.vectors) - 1)
        return torch.where(is_varied_R[:, None], self.vectors[at_R], own_RE)


def text_variants(
    texts: Sequence[str],
    table: Tensor,
    *,
    share: float,
    kinds: Sequence[str],
    synonyms: Synonyms,
    embed: Callable[[list[str]], npt.NDArray[np.float32]],
    plain_tokens: npt.NDArray[np.int64] | None = None,
) -> TextVariants:
    """Return the variants of each token's text: in the words of synonyms, without one of its words, and the nearest other texts.

    A token with a value bin keeps the words of its bin, and the other bins of its code are no neighbours of it: they mean the
    opposite.

    Args:
        texts: of the tokens (V,).
        table: (V, E) their vectors.
        share: see `TextVariants`.
        kinds: which of `KINDS`.
        synonyms: the table of synonyms.
        embed: returns the vectors (n, E) of n texts.
        plain_tokens: (V,) the token of each token's code without value bin; None = no token has a bin.

    Raises:
        UserError: no kind, an unknown one, or no token has a variant, so that nothing would ever vary.
    """
    if isinstance(kinds, str) or not kinds:
        raise UserError(
            f"data.variant_kinds={kinds}: expected a list of {', '.join(KINDS)}. Type: data.variant_kinds=[synonyms]"
        )
    for kind in kinds:
        check_setting("data.variant_kinds", kind, Kind)
    plain = list(range(len(texts))) if plain_tokens is None else plain_tokens.tolist()
    words = [
        _reworded(text, kinds, synonyms, bin_of=texts[plain[token]]) if token >= FIRST_TOKEN else []
        for token, text in enumerate(texts)
    ]
    distinct = list(dict.fromkeys(text for found in words for text in found))
    embedded = torch.from_numpy(embed(distinct)).float() if distinct else table.new_zeros(0, table.shape[1])
    row_of = {text: row for row, text in enumerate(distinct)}
    near = _neighbours(table, torch.tensor(plain)) if NEIGHBOURS in kinds else [[] for _ in texts]
    rows = [[*(row_of[text] for text in found), *(len(distinct) + token for token in others)]
            for found, others in zip(words, near, strict=True)]  # fmt: skip
    counts = torch.tensor([0, *map(len, rows)])
    n_varied = int((counts > 0).sum())
    if not n_varied:
        raise UserError(
            f"data.text_variants={share}: no text has a variant of {', '.join(kinds)}, so nothing would vary. Type: "
            "data.variant_kinds=[synonyms,words,neighbours], or data.text_variants=0"
        )
    log.info(
        "%d of %d tokens have variants in other words, %.1f each", n_varied, len(texts), int(counts.sum()) / n_varied
    )
    places = torch.tensor([row for found in rows for row in found])
    return TextVariants(torch.cat([embedded, table.float().cpu()])[places], counts.cumsum(0), share)


def _reworded(text: str, kinds: Sequence[str], synonyms: Synonyms, *, bin_of: str = "") -> list[str]:
    """Return the distinct variants of a text in other or fewer words; what a value bin adds to the text `bin_of` of its code stays.

    >>> _reworded("Closed fracture of hip", ["synonyms", "words"], Synonyms.of_pairs([("fracture of", "broken")]))
    ['closed broken hip', 'fracture of hip', 'closed of hip', 'closed fracture hip', 'closed fracture of']
    >>> _reworded("Serum iron: low (1st of 5)", ["words"], Synonyms.of_pairs([]), bin_of="Serum iron")
    ['iron: low (1st of 5)', 'serum: low (1st of 5)']
    """
    if bin_of and text != bin_of and text.startswith(bin_of):
        return [other + text[len(bin_of) :] for other in _reworded(bin_of, kinds, synonyms)]
    own = tidy(text)
    found = synonyms.restated(own) if SYNONYMS in kinds else []
    split = own.split()
    if WORDS in kinds and len(split) > 1:
        found += [" ".join(split[:n] + split[n + 1 :]) for n in range(min(len(split), MAX_WORDS))]
    return [other for other in dict.fromkeys(found) if other not in ("", own)]


def _neighbours(table: Tensor, plain_V: Tensor) -> list[list[int]]:
    """Return the tokens with the nearest texts of each token, at most `N_NEIGHBOURS`, of a cosine of `LEAST_COSINE` or more; none
    is of the same code, `plain_V`."""
    unit = F.normalize(table.float().cpu(), dim=1)
    found: list[list[int]] = [[] for _ in range(min(FIRST_TOKEN, len(unit)))]
    for start in range(FIRST_TOKEN, len(unit), 4096):
        cosine = unit[start : start + 4096] @ unit[FIRST_TOKEN:].T
        is_same = plain_V[start : start + len(cosine), None] == plain_V[FIRST_TOKEN:]
        cosine = cosine.masked_fill(is_same, -1.0)
        best = cosine.topk(min(N_NEIGHBOURS, cosine.shape[1]), dim=1)
        for values, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            found.append(
                [place + FIRST_TOKEN for value, place in zip(values, places, strict=True) if value >= LEAST_COSINE]
            )
    return found
