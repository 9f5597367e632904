"""Events and a fitted vocabulary of any source."""

from __future__ import annotations

import polars as pl

from ehr_embed.data.vocabulary import Vocabulary, VocabularySettings, fit_vocabulary
from ehr_embed.sources.protocol import Source


def events_of(source: Source) -> pl.DataFrame:
    return pl.concat([source.read(shard) for shard in source.shards])


def fitted(source: Source, **settings) -> Vocabulary:
    return fit_vocabulary(source, VocabularySettings(min_count=1, **settings))
