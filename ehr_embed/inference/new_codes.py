"""Codes of a dataset that do not occur in a run's vocabulary: give each a token and a vector when it first occurs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property

import polars as pl
import torch
from torch import Tensor

from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.inference.trained_run import TrainedRun
from ehr_embed.sources.code_texts import read_lookups, resolve_texts
from ehr_embed.sources.protocol import Source

log = logging.getLogger(__name__)
MAX_KEPT = 100_000
"""Largest number of new texts whose vectors stay in memory; 150 MiB at a width of 384."""


class DatasetTexts:
    """Callable that returns the texts of codes, from the lookups or else from the dataset's metadata.

    Both are read at the first call, since a dataset without new codes does not need them.

    Args:
        source: source of the dataset.
        lookups: CSV files with columns code,term; a later file takes precedence over an earlier one.
    """

    def __init__(self, source: Source, lookups: Sequence[str]) -> None:
        self._source, self._paths = source, list(lookups)

    @cached_property
    def _read(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        return self._source.code_metadata(), read_lookups(self._paths)

    def __call__(self, codes: list[str]) -> dict[str, str]:
        """Return the text of each code."""
        found = resolve_texts(pl.Series("code", codes, dtype=pl.String), *self._read)
        return dict(found.select("code", "text").iter_rows())


class NewCodes:
    """Vocabulary and vectors of a run, extended by one token per new code.

    Args:
        run: the run.
        vectors_of: returns the vectors (n, E) of n texts.
        texts_of: returns the texts of codes; None = new codes are read as the unknown event.

    Attributes:
        vocabulary, embedding: the extended vocabulary and vectors. An extension creates new objects and keeps all token ids.
        token_of: token id of each new code.
    """

    def __init__(
        self,
        run: TrainedRun,
        vectors_of: Callable[[list[str]], Tensor],
        texts_of: Callable[[list[str]], dict[str, str]] | None,
    ) -> None:
        self.vocabulary: Vocabulary = run.vocabulary
        self.embedding: EventEmbedding = run.embedding
        self.token_of: dict[str, int] = {}
        self._vectors_of, self._texts_of = vectors_of, texts_of
        self._own = set(run.vocabulary.codes["code"])
        self._ignored: set[str] = set()

    def vocabulary_for(self, codes: pl.Series) -> Vocabulary:
        """Return the vocabulary, extended by a token for each code that is new."""
        distinct = set(codes.unique().drop_nulls())
        new = sorted(distinct - self._own - self._ignored - self.token_of.keys())
        if not new:
            return self.vocabulary
        if self._texts_of is None:
            log.info("%d codes were not in train: they are read as the unknown event", len(new))
            self._ignored.update(new)
        else:
            log.info("%d codes were not in train; their texts are read", len(new))
            self.add(self._texts_of(new))
        return self.vocabulary

    def add(self, text_of: dict[str, str]) -> None:
        """Add a token for each code that has none.

        Args:
            text_of: code -> text.
        """
        new = {code: text for code, text in text_of.items() if code not in self.token_of}
        if not new:
            return
        vectors, table = self._vectors_of(list(new.values())), self.embedding.table
        n = len(self.vocabulary)
        self.vocabulary = self.vocabulary.with_codes(pl.DataFrame({"code": list(new), "text": list(new.values())}))
        self.embedding = EventEmbedding(torch.cat([table, vectors.to(table.device)]))
        self.token_of |= {code: n + i for i, code in enumerate(new)}

    @property
    def is_full(self) -> bool:
        """Return whether more than `MAX_KEPT` tokens were added, so that the caller should start again from the run's own."""
        return len(self.token_of) > MAX_KEPT


class KeptVectors:
    """Cache of the vectors of texts: a text is embedded again only after `MAX_KEPT` newer ones.

    Args:
        embed: returns the vectors (n, E) of n texts.
    """

    def __init__(self, embed: Callable[[list[str]], Tensor]) -> None:
        self._embed = embed
        self._kept: dict[str, Tensor] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        """Return the vectors (n, E) of the texts, in their order."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._kept]
        if missing:
            self._kept |= dict(zip(missing, self._embed(missing), strict=True))
        found = torch.stack([self._kept[text] for text in texts])
        while len(self._kept) > MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        return found
