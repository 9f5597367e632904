"""Classification whose prediction times and classes are computed from the records, in place of a label set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import polars as pl

from ehr_embed.core.errors import UserError
from ehr_embed.data.labels import LabelSet
from ehr_embed.data.store import EventStore, SplitEvents
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.tasks.classification import Classification

COLUMNS = ("subject_id", "prediction_time", "value")


class ClassesFromRecords(Classification, ABC):
    """A task that extends this class gives `labels_of`; all the rest, the samples included, is that of `Classification`."""

    @abstractmethod
    def labels_of(self, events: SplitEvents, vocabulary: Vocabulary) -> pl.DataFrame:
        """Return one row per sample of a split.

        Args:
            events: the split's records; what lies after a prediction time may be read here, and is not shown to the model.
            vocabulary: gives the codes and texts of `events.token_ids`; `EventSet.tokens` finds those of a set of events, of which
                one code may have several, one per value bin.

        Returns:
            Columns subject_id, prediction_time (datetime, or microseconds since 1970-01-01) and value (bool, int or str).
        """

    def label_sets(self, labels_dir: Path) -> list[LabelSet]:
        """Return none, since no label set is read.

        Raises:
            UserError: `task.labels` names one.
        """
        if self.labels is not None:
            raise UserError(
                f"task.labels={self.labels}: {type(self).__name__} computes its labels from the records. Type: "
                "task.labels=null, or task=classification for a label set"
            )
        return []

    def label_set(self, store: EventStore, labels_dir: Path) -> LabelSet:
        """Return the labels of all splits.

        Raises:
            UserError: `labels_of` returned other columns, other types of values, repeated or missing rows, or rows of
                subjects of other splits.
        """
        name = type(self).__name__
        frames = []
        for split in SPLITS:
            events = store.split(split)
            frames.append(self._checked(self.labels_of(events, store.vocabulary), events, split))
        kinds = {frame.schema["value"] for frame in frames if len(frame)}
        if len(kinds) != 1:
            raise UserError(
                f"{name}.labels_of returned values of {' and '.join(map(str, kinds)) or 'no type, since no split has a row'}: "
                "expected bool, int or str, the same for each split. Return at least one row per split"
            )
        (kind,) = kinds
        column = {pl.Boolean: "boolean_value", pl.String: "categorical_value"}.get(kind.base_type(), "integer_value")
        as_text = [frame.with_columns(pl.col("value").cast(pl.String)) for frame in frames if len(frame)]
        return LabelSet(name, pl.concat(as_text).sort(COLUMNS[:2]), column)

    def _checked(self, frame: pl.DataFrame, events: SplitEvents, split: str) -> pl.DataFrame:
        """Return the rows of a split in the types of a label set, or refuse them."""
        where = f"{type(self).__name__}.labels_of, split {split}"
        if sorted(frame.columns) != sorted(COLUMNS):
            raise UserError(f"{where}: expected the columns {', '.join(COLUMNS)}, got {', '.join(frame.columns)}.")
        kind = frame.schema["value"]
        if len(frame) and not (kind in (pl.Boolean, pl.String) or kind.is_integer()):
            raise UserError(
                f"{where}: the values are {kind}, expected bool, int or str: numbers with fractions are no classes. Return, for "
                "example, whether a number is above a limit"
            )
        rows = frame.select(
            pl.col("subject_id").cast(pl.Int64), pl.col("prediction_time").cast(pl.Datetime("us")), "value"
        )
        if sum(rows.null_count().row(0)) or rows.select(COLUMNS[:2]).is_duplicated().any():
            raise UserError(
                f"{where}: a row has no value in some column, or two rows have the same subject and time. Return one whole row per "
                "subject and prediction time"
            )
        is_other = ~np.isin(rows["subject_id"].to_numpy(), events.subject_ids)
        if is_other.any():
            raise UserError(
                f"{where}: {is_other.sum()} of {len(rows)} rows are of subjects that are not in this split, such as subject "
                f"{rows['subject_id'][int(is_other.argmax())]}. Return rows of the subjects in events.subject_ids only"
            )
        return rows
