"""Read a dataset whose codes a run never saw as its model reads them: with codes of the run in place of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch.nn.functional as F
from torch import Tensor

from ehr_embed.data.store import encode_shards
from ehr_embed.data.vocabulary import Vocabulary, fit_vocabulary
from ehr_embed.embedding.aligning import ALIGNED_FROM, AUTO, AlignmentSettings, aligned_table
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.embedding.match_table import Alignment, share_of_new
from ehr_embed.inference.trained_run import TrainedRun
from ehr_embed.models.protocol import AlignsCodes
from ehr_embed.run_folder.origin import configured_twins
from ehr_embed.sources.meds import MedsSource

log = logging.getLogger(__name__)
MIN_SUBJECTS = 20
"""Subjects that `auto` needs: numbers are ranked among theirs, and the ranks of fewer say nothing."""


@dataclass(frozen=True, eq=False)
class AlignedData:
    """The vocabulary, vectors and matches with which a run reads a dataset whose codes are aligned with its own.

    Attributes:
        vocabulary: fitted on the dataset's subjects, without labels: scales, value bins and counts are their own.
        embedding: vectors of its tokens.
        alignment: which codes of the run stand for which of the dataset.
        keeps: (V,) whether the events of each token are kept.
    """

    vocabulary: Vocabulary
    embedding: EventEmbedding
    alignment: Alignment
    keeps: npt.NDArray[np.bool_]


class AsTrain:
    """A source of which the subjects of one split, or all, count as train: what is fitted on it is fitted on them."""

    writes = False

    def __init__(self, inner: MedsSource, split: str | None) -> None:
        self.inner, self.split, self.name = inner, split, inner.name
        self.labels_dir, self.shards = inner.labels_dir, inner.shards

    def read(self, shard: Path) -> pl.DataFrame:
        """Return the events of the subjects."""
        events = self.inner.read(shard)
        events = events if self.split is None else events.filter(split=self.split)
        return events.with_columns(split=pl.lit("train", pl.String))

    def code_metadata(self) -> pl.DataFrame:
        """Return the dataset's metadata of codes."""
        return self.inner.code_metadata()

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprints of the dataset's files."""
        return self.inner.fingerprint()


def read_aligned(
    run: TrainedRun,
    source: MedsSource,
    settings: AlignmentSettings,
    *,
    split: str | None,
    lookups: Sequence[str],
    embed: Callable[[list[str]], Tensor] | None,
) -> AlignedData | None:
    """Return what the run needs to read the dataset; None where the settings want its codes as they are.

    Numbers are scaled and ranked among those of the subjects that are predicted for, which needs no labels, but at least
    `MIN_SUBJECTS` subjects. The dataset is read three times: to decide by its first shard, to count and scale its codes, and to
    count its tokens.

    Args:
        run: the run.
        source: source of the dataset.
        settings: whether and how to align.
        split: split of the subjects; None = all.
        lookups: CSV files with columns code,term, a later one takes precedence.
        embed: returns the vectors (n, E) of n texts, as the run's embedder makes them; None = the run reads no texts.

    Raises:
        UserError: nothing matches, or the alignment cannot be made.
    """
    if settings.is_off:
        return None
    if run.matches is not None and not run.is_pooled:
        log.info("the run reads its own codes as another's, so codes that it never saw are read by their texts alone")
        return None
    if settings.aligned_to == AUTO and not may_be_new(run.vocabulary, source, split):
        return None
    own = run.vocabulary.settings
    fitted = fit_vocabulary(
        AsTrain(source, split), type(own)(**{**own.__dict__, "lookups": tuple(lookups), "describe_unseen": False})
    )
    counts, n_subjects = np.zeros(len(fitted), np.int64), 0
    for events in encode_shards(source, lambda _: fitted, split):
        counts += np.bincount(events.token_ids, minlength=len(counts))
        n_subjects += len(events.subject_ids)
    vocabulary = fitted.with_counts(counts)
    if settings.aligned_to == AUTO and n_subjects < MIN_SUBJECTS:
        log.info(
            "%d subjects are too few to rank numbers among theirs, so codes that the run never saw are read by their texts "
            "(data.aligned_to=RUN aligns them all the same)",
            n_subjects,
        )
        return None
    if not settings.is_wanted(share_of_new(run.vocabulary, vocabulary)):
        return None
    alignment = settings.alignment(run.vocabulary, vocabulary, has_twins=configured_twins(run.config))
    if run.matches is not None:
        alignment = alignment.through(run.matches)
    # A model that aligns codes itself reads the vectors of its own codes only.
    reads_own = embed is not None and not isinstance(run.model, AlignsCodes)
    texts = F.pad(embed(vocabulary.texts[1:]), (0, 0, 1, 0)) if embed is not None and reads_own else None
    table = aligned_table(alignment, run.vocabulary, vocabulary, run.embedding.table, texts)
    return AlignedData(vocabulary, EventEmbedding(table), alignment, alignment.keeps(vocabulary))


def may_be_new(run: Vocabulary, source: MedsSource, split: str | None) -> bool:
    """Return whether most events of the first shard that has any have codes that the run never saw."""
    known = run.codes["code"].implode()
    for shard in source.shards:
        events = source.read(shard)
        codes = (events if split is None else events.filter(split=split))["code"]
        if len(codes):
            return int((~codes.is_in(known)).sum()) > ALIGNED_FROM * len(codes)
    return False
