"""Records without times: vectors or texts of events that a caller holds in Python, as events one day apart without numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.data.store import MICROSECONDS_PER_DAY, STATIC_TIME, SplitEvents
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.inference.new_codes import KeptVectors, NewCodes
from ehr_embed.inference.trained_run import TrainedRun
from ehr_embed.models.protocol import FitsAtOnce

log = logging.getLogger(__name__)
TokenIds = list[npt.NDArray[np.int32]]


class TextTokens:
    """Token ids of texts: those of the run's vocabulary, and of new texts, whose vectors are kept from call to call.

    Args:
        run: the run.
        vectors_of: vectors of new texts.
    """

    def __init__(self, run: TrainedRun, vectors_of: KeptVectors) -> None:
        self._run, self._vectors_of = run, vectors_of
        self._new: NewCodes | None = None

    def __call__(
        self, records: Sequence[Sequence[str]], *, reads_text: Callable[[], bool]
    ) -> tuple[TokenIds, Vocabulary, EventEmbedding]:
        """Return the token ids of texts, and the run's vocabulary and vectors extended by the texts that are new.

        Args:
            records: texts of the events of each record.
            reads_text: tells whether the run reads texts that are not in its vocabulary.

        Raises:
            UserError: a text is empty, or is not in the vocabulary of a run that reads no others.
        """
        known = self._known
        wanted = dict.fromkeys(text for record in records for text in record if text not in known)
        if blank := [text for text in wanted if not text.strip()]:
            raise UserError(
                f"{len(blank)} texts are empty: an empty text has no meaning to embed. Leave the event out."
            )
        if wanted and not reads_text():
            raise UserError(
                f"{next(iter(wanted))!r} is not a text of this run's vocabulary, and its embedder (embedder=learned or a control) "
                "has no vector for any other. Use texts of RUN_DIR/vocabulary/vocab.csv."
            )
        model = self._run.model
        if wanted and isinstance(model, FitsAtOnce):
            log.warning(
                "%d of the texts, such as %r, are not in the run's vocabulary, and %s counts codes of its vocabulary: it does not "
                "see them, so that records of such texts alone all get the same prediction. RUN_DIR/vocabulary/vocab.csv lists the "
                "texts that it knows; a model that reads vectors, such as model=encoder, reads any",
                len(wanted), next(iter(wanted)), type(model).__name__,
            )  # fmt: skip
        if self._new is None or self._new.is_full:
            self._new = NewCodes(self._run, self._vectors_of, None)
        # A token needs a code, and a text has none, so it gets a name that no code has.
        self._new.add({f"TEXT//{text}": text for text in wanted})
        token_of = self._new.token_of
        token_ids = [
            np.array([known[text] if text in known else token_of[f"TEXT//{text}"] for text in record], np.int32)
            for record in records
        ]
        return token_ids, self._new.vocabulary, self._new.embedding

    @cached_property
    def _known(self) -> dict[str, int]:
        """Return text -> token for the texts of the run's vocabulary; the first token of a text that several tokens share."""
        return {text: token for token, text in reversed(list(enumerate(self._run.vocabulary.texts))) if text}


def has_texts(records: Sequence[Any]) -> bool:
    """Return whether records are texts, or lists of texts."""
    first = records[0]
    return isinstance(first, str) or (isinstance(first, list | tuple) and all(isinstance(x, str) for x in first))


def vector_tokens(records: Sequence[Any]) -> tuple[TokenIds, EventEmbedding]:
    """Return one token per vector, and the table of the vectors, whose row 0 is the zero vector of padding.

    Raises:
        UserError: vectors are not (N, E).
    """
    vectors = [torch.as_tensor(record, dtype=torch.float32) for record in records]
    if wrong := [tuple(record.shape) for record in vectors if record.ndim != 2]:
        raise UserError(
            f"expected the vectors of a record as (N, E), got {wrong[0]}. Texts are given as a list, or a list of lists."
        )
    table = torch.cat([torch.zeros(1, vectors[0].shape[1]), *vectors])
    ends = np.cumsum([len(record) for record in vectors])
    token_ids = [np.arange(end - len(v), end, dtype=np.int32) + 1 for end, v in zip(ends, vectors, strict=True)]
    return token_ids, EventEmbedding(table)


def daily_events(token_ids: TokenIds, *, has_values: bool) -> SplitEvents:
    """Return records without times as events one day apart.

    Args:
        token_ids: of the events of each record.
        has_values: whether the run's vocabulary carries numbers, which these events have none of.

    Raises:
        UserError: a record is empty.
    """
    lengths = np.array([len(tokens) for tokens in token_ids])
    if not lengths.all():
        raise UserError(f"record {int(lengths.argmin())} has no events, so there is nothing to predict from.")
    days = np.concatenate([np.arange(n) for n in lengths])
    return SplitEvents(
        token_ids=np.concatenate(token_ids),
        times=days * MICROSECONDS_PER_DAY,
        values=np.full(len(days), np.nan, np.float32) if has_values else None,
        subject_ids=np.arange(len(lengths)),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        birth_times=np.full(len(lengths), STATIC_TIME),
    )
