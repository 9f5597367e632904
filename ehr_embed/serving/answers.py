"""Answer for records with a finished run. This module knows no network; one thread at a time may call it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ehr_embed.core.errors import UserError
from ehr_embed.inference.explainer import Explainer, event_table
from ehr_embed.inference.new_codes import NewCodes
from ehr_embed.inference.predictor import Predictor
from ehr_embed.inference.records import Dataset
from ehr_embed.models.ensemble import Ensemble
from ehr_embed.serving.records import Record, RecordsSource

log = logging.getLogger(__name__)
MAX_NEW_CODES = 10_000
"""Largest number of new codes whose vectors are kept beside the run's own; 15 MiB at a width of 384."""
Answer = dict[str, Any]


class Answers:
    """Predictions and attributions of a run, as plain values.

    Args:
        predictor: the run.
        lookups: CSV files with columns code,term, as in `Predictor.predict_proba`.
        n_steps, max_steps, tolerance: of the attributions, as in `Explainer`.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        lookups: Sequence[str] = (),
        n_steps: int = 16,
        max_steps: int = 512,
        tolerance: float = 0.01,
    ) -> None:
        self.predictor, self._lookups = predictor, tuple(lookups)
        self._steps = {"n_steps": n_steps, "max_steps": max_steps, "tolerance": tolerance}
        self._known = set(predictor.run.vocabulary.codes["code"])
        self._new, self._text_of = predictor.records.new_codes(), dict[str, str]()
        self._explainers: dict[str, Explainer] = {}

    @property
    def is_ensemble(self) -> bool:
        """Return whether the run is one of several models, whose range is answered too."""
        return isinstance(self.predictor.run.model, Ensemble)

    def warm_up(self) -> None:
        """Predict for a record with a code of the run and a new code, whose text the embedder reads, so that the first request does
        not wait for parts that are loaded at first use."""
        known = next(iter(self._known), "A")
        for code in (known, "a code that no run has seen"):
            record = Record(None, 0, [code], np.zeros(1, np.int64), np.full(1, np.nan, np.float32), {}, 1)
            try:
                self.predict([record])
            except UserError as error:
                log.warning("codes that the run never saw cannot be read here: %s", error)

    def predict(self, records: Sequence[Record]) -> list[Answer]:
        """Return one answer per record, in order.

        Records that give one code different texts are read one group after the other, so that no record is read with another's.
        """
        answers: list[Answer | None] = [None] * len(records)
        for group in _groups(records, self._known):
            data = self._read([records[number] for number in group])
            found = self.predictor.predict_samples(data, with_members=True)
            for row, number in enumerate(group):
                answer = self._about(records[number], data, row)
                answer |= self._named(found.probabilities[row])
                if found.members is not None:
                    own = found.members[:, row]
                    answer["interval"] = {
                        name: [float(own[:, i].min()), float(own[:, i].max())]
                        for i, name in enumerate(self.predictor.class_names)
                    }
                    answer["members"] = [self._named(member) for member in own]
                answers[number] = answer
        return [answer for answer in answers if answer is not None]

    def attribute(self, record: Record, target: str | None) -> Answer:
        """Return what each event that the model read has contributed to the log-odds of a class, before calibration.

        Raises:
            UserError: the run has no such class, or its model's predictions cannot be attributed to events.
        """
        explainer = self._explainer(target)
        data = self._read([record])
        found = explainer.attribute(data, 0)
        table = event_table(data, 0, found)
        return {
            "target": explainer.target,
            "log_odds": found.score,
            "log_odds_of_average_events": _finite(found.baseline_score),
            "gap": _finite(found.gap),
            "events": [
                {
                    "time": None if row["time"] is None else row["time"].isoformat(),
                    "code": row["code"],
                    "text": row["text"],
                    "numeric_value": _finite(row["numeric_value"]),
                    "attribution": row["attribution"],
                }
                for row in table.iter_rows(named=True)
            ],
        }

    def _explainer(self, target: str | None) -> Explainer:
        name = target or self.predictor.class_names[-1]
        if name not in self._explainers:
            self._explainers[name] = Explainer(self.predictor, target=target, **self._steps)  # type: ignore[arg-type]
        return self._explainers[name]

    def _read(self, records: list[Record]) -> Dataset:
        """Read records that agree in the texts of their codes."""
        text_of: dict[str, str] = {}
        for record in records:
            text_of |= record.descriptions
        source = RecordsSource(records, text_of)
        unseen = sorted({code for record in records for code in record.codes} - self._known)
        new = self._extended(unseen, source) if unseen else self._new
        return self.predictor.records.read_records(source, source.prediction_times, new)

    def _extended(self, unseen: list[str], source: RecordsSource) -> NewCodes:
        """Return the vocabulary with tokens for codes that the run never saw, those of earlier requests where the texts agree."""
        texts = self.predictor.records.texts_of(unseen, source.code_metadata(), self._lookups)
        if texts is None:  # they are read as the unknown event
            return self._new
        others = any(self._text_of.get(code, text) != text for code, text in texts.items())
        if others or len(self._text_of) + len(texts) > MAX_NEW_CODES:
            self._new, self._text_of = self.predictor.records.new_codes(), {}
        try:
            self._new.add(texts)
        except Exception:
            self._new, self._text_of = self.predictor.records.new_codes(), {}
            raise
        self._text_of |= texts
        return self._new

    def _about(self, record: Record, data: Dataset, row: int) -> Answer:
        n_new, reads_text = sum(code not in self._known for code in record.codes), self.predictor.records.reads_text
        return {
            "subject_id": record.subject_id,
            "prediction_time": record.when,
            "events": {
                "given": record.n_given,
                "after_prediction_time": record.n_given - len(record.codes),
                "by_text": n_new if reads_text else 0,
                "unknown": 0 if reads_text else n_new,
                "read": int(data.samples.lengths[row]),
            },
        }

    def _named(self, values: Any) -> dict[str, dict[str, float]]:
        """Return a sample's outputs by kind, `probabilities` and `numbers`, and by name."""
        found: dict[str, dict[str, float]] = {}
        for name, column, value in zip(self.predictor.class_names, self.predictor.columns, values, strict=True):
            kind = "probabilities" if column.startswith("probability_") else "numbers"
            found.setdefault(kind, {})[name] = float(value)
        return found


def _finite(number: float | None) -> float | None:
    """Return a number, None in place of NaN, for which JSON has no word."""
    return None if number is None or not math.isfinite(number) else number


def _groups(records: Sequence[Record], known: set[str]) -> Iterator[list[int]]:
    """Yield the numbers of records that agree in the texts of the codes that the run never saw.

    >>> def record(text):
    ...     return Record(None, 0, ["X"], np.zeros(1, np.int64), np.zeros(1, np.float32), {"X": text} if text else {}, 1)
    >>> list(_groups([record("cough"), record("fever"), record("cough"), record("")], set()))
    [[0, 2], [1], [3]]
    """
    groups: list[tuple[dict[str, str], list[int]]] = []
    for number, record in enumerate(records):
        texts = {code: record.descriptions.get(code, "") for code in record.codes if code not in known}
        for together, numbers in groups:
            if all(together.get(code, text) == text for code, text in texts.items()):
                together |= texts
                numbers.append(number)
                break
        else:
            groups.append((texts, [number]))
    yield from (numbers for _, numbers in groups)
