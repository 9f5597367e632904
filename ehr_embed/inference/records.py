"""Read the records that a caller gives a finished run: event vectors, event texts or a MEDS dataset."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from ehr_embed.config.instantiate import check_stored, instantiate_embedder
from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.files import digest, file_sha256
from ehr_embed.data.boundary import UnseenRecords
from ehr_embed.data.labels import read_labels
from ehr_embed.data.samples import Samples, build_samples
from ehr_embed.data.selected import without_others
from ehr_embed.data.store import SplitEvents, encode_shards, joined
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.embedders.protocol import Embedder
from ehr_embed.embedding.aligning import AlignmentSettings
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.embedding.table import as_stored
from ehr_embed.embedding.vector_cache import embed_texts
from ehr_embed.inference.aligned_data import AlignedData, may_be_new, read_aligned
from ehr_embed.inference.loose_records import TextTokens, daily_events, has_texts, vector_tokens
from ehr_embed.inference.new_codes import DatasetTexts, KeptVectors, NewCodes
from ehr_embed.inference.trained_run import (
    TrainedRun,
    nothing_to_predict,
    samples_to_predict,
    say_static_only,
    times_to_predict,
)
from ehr_embed.models.protocol import ReadsVocabulary, declarations
from ehr_embed.run_folder.layout import LOOKUPS, VOCABULARY
from ehr_embed.sources.code_texts import read_lookups, resolve_texts
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.protocol import SPLITS, Source

log = logging.getLogger(__name__)
Vectors = npt.NDArray[Any] | Tensor
CHUNK_EVENTS = 2_000_000
"""Number of events that are held in memory at a time, in addition to the shard that is being read."""
ROW = "__row"


class Dataset(NamedTuple):
    """A MEDS dataset, encoded with a run's vocabulary.

    Attributes:
        vocabulary, embedding: vocabulary and vectors of the run, extended by the dataset's new codes.
        events: events of the chosen subjects.
        samples: one sample per prediction time, with the events visible at that time and labels of zero.
        aligned: how the run's codes stand for the dataset's, whose tokens vocabulary and vectors then have; None = its codes are
            read as they are.
    """

    vocabulary: Vocabulary
    embedding: EventEmbedding
    events: SplitEvents
    samples: Samples
    aligned: AlignedData | None = None


class RecordReader:
    """Reads records with a run's vocabulary, and gives codes and texts that the run never saw tokens and vectors of their own.

    Args:
        run: the run.
        run_dir: the run's folder, in which the texts of codes may lie that it was trained with.
        trusted_packages: further packages from which the run's embedder may come.

    Attributes:
        vectors: returns the vectors (n, E) of n texts.
    """

    def __init__(self, run: TrainedRun, run_dir: str | Path, *, trusted_packages: Sequence[str] = ()) -> None:
        self._run, self._trusted = run, tuple(trusted_packages)
        lookups = Path(run_dir).expanduser() / VOCABULARY / LOOKUPS
        self._lookups = [str(lookups)] if lookups.is_file() else []
        self._lookup_tables: dict[tuple[str, ...], pl.DataFrame] = {}
        self.vectors = KeptVectors(self._embedded)
        self._tokens_of = TextTokens(run, self.vectors)
        self._dataset: tuple[dict[str, Any], NewCodes] | None = None

    def of_values(self, records: Vectors | Sequence[Any]) -> Dataset:
        """Return vectors or texts as records of events one day apart, without numbers.

        Args:
            records: vectors (N, E) of one record or (n, N, E) of several, or a list of (N, E); or the texts of one record (a list)
                or of several (a list of lists).

        Raises:
            UserError: there is no record, or a record is empty; the model reads codes or texts instead of vectors; or a text cannot
                be embedded.
        """
        if not len(records):
            raise UserError("no record to predict for: expected vectors, texts or the root of a MEDS dataset.")
        if isinstance(records, list | tuple) and has_texts(records):
            texts = [records] if isinstance(records[0], str) else records
            token_ids, vocabulary, embedding = self._tokens_of(texts, reads_text=lambda: self.reads_text)
        elif isinstance(self._run.model, ReadsVocabulary):
            raise UserError(
                f"{type(self._run.model).__name__} reads the codes or texts of events, which vectors do not contain. Give "
                "texts, or the root of a MEDS dataset."
            )
        else:
            is_one = isinstance(records, np.ndarray | Tensor) and records.ndim == 2
            token_ids, embedding = vector_tokens([records] if is_one else list(records))
            vocabulary = self._run.vocabulary
        events = daily_events(token_ids, has_values=self._run.vocabulary.settings.has_values)
        samples = samples_to_predict(events, None, Path(), max_length=self._run.config["model"]["max_length"])
        return Dataset(vocabulary, embedding, events, samples)

    def read(
        self,
        root: str,
        *,
        labels: str | None,
        split: str | None,
        lookups: Sequence[str],
        aligned: AlignedData | None = None,
    ) -> Dataset:
        """Read a whole MEDS dataset; the arguments are those of `chunks`. Without `aligned`, codes that the run never saw are read
        by their own texts."""
        source = _source(root, split)
        is_new = aligned is None and (self._run.matches is None or self._run.is_pooled)
        if is_new and may_be_new(self._run.vocabulary, source, split):
            log.warning(
                "most events of %s have codes that the run never saw, which are read by their texts alone, without their numbers "
                "(docs/hospitals.md says how the run's own codes can stand for them)", root,
            )  # fmt: skip
        reads = self._new_codes(source, lookups) if aligned is None else aligned
        events = joined(list(self._chunks(source, reads, split)))
        samples = samples_to_predict(
            events, labels, source.labels_dir, max_length=self._run.config["model"]["max_length"]
        )
        return Dataset(reads.vocabulary, reads.embedding, events, samples, aligned)

    def aligned(
        self, root: str, *, split: str | None, lookups: Sequence[str], alignment: AlignmentSettings
    ) -> AlignedData | None:
        """Return the vocabulary and vectors with which a MEDS dataset is read in the run's codes; None where its codes are read as
        they are. The arguments are those of `predict_proba`."""
        return read_aligned(
            self._run,
            _source(root, split),
            alignment,
            split=split,
            lookups=[*self._lookups, *lookups],
            embed=partial(self._checked, cache_dir=alignment.cache_dir) if self.reads_text else None,
        )

    def chunks(
        self,
        root: str,
        *,
        labels: str | None,
        split: str | None,
        lookups: Sequence[str],
        is_per_subject: bool = False,
        aligned: AlignedData | None = None,
    ) -> Iterator[tuple[Dataset, pl.DataFrame]]:
        """Read a MEDS dataset in chunks of shards; the arguments are those of `predict_proba`.

        Args:
            is_per_subject: whether only the last prediction time of each subject is wanted.
            aligned: how the dataset is read if its codes are aligned with the run's.

        Yields:
            A chunk with its samples, and one row per sample: subject_id and prediction_time; with `labels` also the label in the
            column that MEDS has for it, where there are labels, and the row of the label set in `ROW`.

        Raises:
            UserError: no subject has a prediction time, or the dataset cannot be read.
        """
        source = _source(root, split)
        reads = self._new_codes(source, lookups) if aligned is None else aligned
        asked = None
        if labels is not None:
            asked = (
                read_labels(labels, source.labels_dir, needs_values=False)
                .in_meds()
                .with_columns(pl.int_range(pl.len()).alias(ROW))
            )
            if is_per_subject:
                asked = asked.unique("subject_id", keep="last", maintain_order=True)  # which is sorted by time
        unseen, n_subjects, n_samples = UnseenRecords(), 0, 0
        for events in self._chunks(source, reads, split):
            times = times_to_predict(events, asked)
            n_subjects += len(events.subject_ids)
            n_samples += len(times)
            if not len(times):
                continue
            none = np.zeros(len(times), np.int64)
            samples = build_samples(events, times, none, max_length=self._run.config["model"]["max_length"])
            unseen.add(events, samples)
            yield Dataset(reads.vocabulary, reads.embedding, events, samples), times
        if not n_samples:
            raise nothing_to_predict()
        unseen.say(f"labels {labels}")
        if asked is None:
            say_static_only(n_subjects - n_samples, n_subjects)
        elif n_samples < len(asked):
            log.info("%d of the %d rows of labels %s are of the subjects asked for", n_samples, len(asked), labels)

    def _new_codes(self, source: MedsSource, lookups: Sequence[str]) -> NewCodes:
        """Return the new codes of a dataset: those that an earlier call found if the dataset has not changed."""
        sums = [file_sha256(path) for path in lookups if Path(path).is_file()]
        about = {"root": str(source.root), "source": source.fingerprint(), "lookups": sums}
        if self._dataset is None or self._dataset[0] != about or self._dataset[1].is_full:
            texts = DatasetTexts(source, [*self._lookups, *lookups]) if self.reads_text else None
            self._dataset = about, NewCodes(self._run, self.vectors, texts)
        return self._dataset[1]

    def new_codes(self) -> NewCodes:
        """Return the run's vocabulary and vectors, to be extended by codes whose texts the caller knows."""
        return NewCodes(self._run, self.vectors, None)

    def texts_of(self, codes: list[str], metadata: pl.DataFrame, lookups: Sequence[str] = ()) -> dict[str, str] | None:
        """Return the texts of codes that the run never saw, as `predict_proba` finds them; None if the run reads no texts.

        Args:
            codes: distinct codes.
            metadata: code, description and parent_codes, as of a source.
            lookups: CSV files with columns code,term, which take precedence over the run's own ones and the metadata.
        """
        if not self.reads_text:
            return None
        paths = (*self._lookups, *lookups)
        if paths not in self._lookup_tables:
            self._lookup_tables[paths] = read_lookups(paths)
        found = resolve_texts(pl.Series("code", codes, dtype=pl.String), metadata, self._lookup_tables[paths])
        return dict(found.select("code", "text").iter_rows())

    def read_records(self, source: Source, times: pl.DataFrame, new: NewCodes) -> Dataset:
        """Read the records of any source, at prediction times that are known to show an event each.

        Args:
            source: source of the events; its splits are not read.
            times: subject_id and prediction_time of each sample.
            new: vocabulary with the codes of the source that the run never saw.
        """
        events = joined(list(self._chunks(source, new, None)))
        none = np.zeros(len(times), np.int64)
        samples = build_samples(events, times, none, max_length=self._run.config["model"]["max_length"])
        return Dataset(new.vocabulary, new.embedding, events, samples)

    def _chunks(self, source: Source, reads: NewCodes | AlignedData, split: str | None) -> Iterator[SplitEvents]:
        """Yield the events of whole shards, joined until they have `CHUNK_EVENTS`: small shards would make small batches. From
        an aligned dataset only the events whose codes have a match are read."""
        parts: list[SplitEvents] = []
        vocabulary_for = reads.vocabulary_for if isinstance(reads, NewCodes) else (lambda _: reads.vocabulary)
        for events in encode_shards(source, vocabulary_for, split):
            if isinstance(reads, AlignedData):
                events = without_others(events, reads.keeps)
            elif self._run.matches is not None:  # the run itself was trained on such events only
                codes = reads.vocabulary.token_codes
                events = without_others(events, np.array([code in self._run.matches for code in codes]))
            parts.append(events)
            if sum(len(part.token_ids) for part in parts) >= CHUNK_EVENTS:
                del events
                yield joined(parts)
        if parts:
            yield joined(parts)

    def _embedded(self, texts: list[str]) -> Tensor:
        """Return the vectors of texts, rounded as in a table on disk, so that a text always gets the same vector."""
        return self._rounded(lambda: self.embedder.embed(texts), len(texts))

    def _checked(self, texts: list[str], *, cache_dir: Path | None) -> Tensor:
        """Return the same vectors of the texts of a whole dataset, which are refused as those of a training are, with a cache and
        without; those that the cache holds are not computed again."""
        return self._rounded(lambda: embed_texts(self.embedder, texts, cache_dir=cache_dir), len(texts))

    def _rounded(self, embed: Callable[[], npt.NDArray[np.float32]], n_texts: int) -> Tensor:
        if not self.reads_vectors:
            return torch.zeros(n_texts, self._run.embedding.table.shape[1])
        embedder = self.embedder
        try:
            found = embed()
            return as_stored(torch.from_numpy(found)).float()
        finally:
            embedder.close()

    @property
    def reads_vectors(self) -> bool:
        """Return whether the model reads the vectors of events."""
        return declarations(self._run.model).reads_vectors

    @property
    def reads_text(self) -> bool:
        """Return whether the run can read texts that are not in its vocabulary."""
        return not self.reads_vectors or self.embedder.reads_text

    @cached_property
    def embedder(self) -> Embedder:
        """Return the run's embedder; the first text that is embedded loads its model, which then stays loaded."""
        embedder: Embedder = instantiate_embedder(
            check_stored(self._run.config, "embedder", self._trusted), trusted=self._trusted
        )
        if self._run.embedder_digest not in (None, found := digest(embedder.fingerprint)):
            log.warning(
                "the embedder that the run names differs from the one it was trained with (digest %s, now %s), so new texts get "
                "vectors that the model has not learned to read. Restore its files, such as embedder.synonyms, or train again",
                self._run.embedder_digest,
                found,
            )
        return embedder


def _source(root: str, split: str | None) -> MedsSource:
    """Open a MEDS dataset, whose splits are needed only if the subjects of one are asked for."""
    if split is not None and split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    return MedsSource(root=root, needs_splits=split is not None)
