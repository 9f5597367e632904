"""Ask a run with a hazard head for outcomes: in words, by codes, or those that it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from ehr_embed.core.errors import UserError, check_range
from ehr_embed.core.transfer import sent
from ehr_embed.data.event_set import EventSet
from ehr_embed.data.outcomes import TokenPlaces, follow_up
from ehr_embed.data.samples import ragged_arange, sharing_rows
from ehr_embed.embedding.aligning import AlignmentSettings
from ehr_embed.embedding.nearest_events import (
    NearEvent,
    margin_for,
    near_enough,
    nearest_events,
    nothing_near,
    with_bins,
)
from ehr_embed.inference.predictor import Predictor
from ehr_embed.inference.records import Dataset
from ehr_embed.inference.trained_run import TrainedRun, open_run
from ehr_embed.models.hazards import AskedSets, HazardSizes, asks_everywhere, hazard_sizes

N_TIMES = 12
"""Times up to the horizon at which a risk curve is given."""
NEAREST_RATES = 3
"""Events whose mean log rate a literal question starts from."""


class FoundEvent(NamedTuple):
    """An event of the vocabulary that a question was resolved to.

    Attributes:
        code, text: of the event.
        cosine: likeness of its text to the question; NaN where the event was named by its code.
        n_train: its events in train.
    """

    code: str
    text: str
    cosine: float
    n_train: int


@dataclass(frozen=True)
class Question:
    """An outcome that is asked for.

    Attributes:
        name: the words, or a name.
        tokens: the events of the vocabulary that count as the outcome; for a literal question those nearest to the text.
        events: the same for reading.
        vector: (E,) the text's own vector, for a literal question; None = the mean of the events' vectors.
        log_rates: (J,) rate that the head starts from.
        left_out: events that `margin` alone leaves out, nearest first.
        wider: the margin that would let them in; None = none is left out.
    """

    name: str
    tokens: list[int]
    events: list[FoundEvent]
    vector: Tensor | None
    log_rates: Tensor
    left_out: Sequence[FoundEvent] = ()
    wider: float | None = None


@dataclass(frozen=True)
class Answers:
    """The risks of all subjects for all questions.

    Attributes:
        questions: the questions, with the events that each was resolved to.
        days: (G,) times after the prediction, of which the last is the horizon.
        times: one row per prediction: subject_id, prediction_time.
        incidence: (n, Q, G) probability that the outcome has happened by each time.
        has_prior: (n, Q) whether the record has the outcome's events already.
    """

    questions: list[Question]
    days: list[float]
    times: pl.DataFrame
    incidence: npt.NDArray[np.float64]
    has_prior: npt.NDArray[np.bool_]

    @property
    def frame(self) -> pl.DataFrame:
        """Return one row per prediction: subject_id, prediction_time, and per question NAME/risk (at the horizon), NAME/has_prior
        and NAME/survival, the list of the probabilities that the outcome has not happened by each of `days`."""
        columns: dict[str, Any] = {}
        for number, question in enumerate(self.questions):
            columns[f"{question.name}/risk"] = self.incidence[:, number, -1].astype(np.float32)
            columns[f"{question.name}/has_prior"] = self.has_prior[:, number]
            survival = (1 - self.incidence[:, number]).astype(np.float32)
            columns[f"{question.name}/survival"] = pl.Series(survival.tolist(), dtype=pl.List(pl.Float32))
        return self.times.with_columns(**{name: pl.Series(name, values) for name, values in columns.items()})


class Asker(Predictor):
    """A finished run of task=time_to_event that is ready to be asked; `ehr_embed.load` returns one for such a run.

    Args:
        run_dir: the run's folder.
        device: torch device on which the model runs.
        trusted_packages: further packages from which the run's `_target_`s may come.
        run: the run, if it is open already.

    Raises:
        UserError: the run has no hazard head.
    """

    def _check(self, run_dir: str | Path) -> None:
        if hazard_sizes(self.run.model) is None:
            raise UserError(
                f"run={run_dir} was not trained on times to events, so it cannot be asked for an outcome. Type: python train.py "
                "experiment=pretrain_hazards data.root=DIR run_dir=RUN_DIR, and ask that run"
            )

    @property
    def sizes(self) -> HazardSizes:
        """Return the facts of the run's hazard head."""
        sizes = hazard_sizes(self.run.model)
        assert sizes is not None
        return sizes

    def questions(
        self,
        asked: Sequence[str] | Mapping[str, Mapping[str, Any]] = (),
        *,
        literal: bool = False,
        n_events: int = 8,
        min_cosine: float = 0.5,
        margin: float = 0.1,
    ) -> list[Question]:
        """Resolve questions to events of the run's vocabulary.

        Args:
            asked: words, each of which is one outcome; or name -> codes, code_pattern or text_pattern; empty = the outcomes that
                the run was trained on.
            literal: whether the head gets the words' own vector in place of that of the nearest events.
            n_events: most events that words are resolved to.
            min_cosine: least cosine of an event's text to the words.
            margin: an event whose cosine is lower than the nearest event's by more than this is left out.

        Raises:
            UserError: no event is near enough, or there is nothing to ask.
        """
        check_range("n_events", n_events, 1)
        sizes = self.sizes
        if isinstance(asked, str):
            raise UserError(f"questions={asked}: expected a list, in brackets: [{asked}].")
        if sizes.vectors == "learned" and asked:
            raise UserError(
                f"this run has a learned vector for each of its outcomes, {', '.join(sizes.names)}, so it can be asked for no "
                "others. Leave the questions out, or train with task.outcome_vectors=text"
            )
        if not asked:
            if not sizes.names:
                raise UserError("no question: expected words, such as questions=[osteoarthritis], or codes=[CODE]")
            return [
                Question(name, tokens, self._events_of(tokens), None, torch.tensor(rates))
                for name, tokens, rates in zip(sizes.names, sizes.tokens, sizes.log_rates, strict=False)
            ]
        if isinstance(asked, Mapping):
            return [self._by_code(name, EventSet(**keys)) for name, keys in asked.items()]
        if empty := [words for words in asked if not str(words).strip()]:
            raise UserError(
                f"questions={list(asked)}: {len(empty)} of them are empty, and an empty question has no meaning to "
                "embed. Leave them out."
            )
        if repeated := sorted({words for words in asked if list(asked).count(words) > 1}):
            raise UserError(f"questions={list(asked)}: {repeated[0]} is asked twice. Leave one out")
        if not self.records.reads_vectors or not self.records.embedder.reads_text:
            raise UserError(
                "this run's embedder has vectors for its own vocabulary only, so it cannot read a question in words. Type: "
                "codes=[CODE,CODE]"
            )
        vectors = self.records.vectors(list(asked))
        return [
            self._in_words(words, vector, literal=literal, n_events=n_events, min_cosine=min_cosine, margin=margin)
            for words, vector in zip(asked, vectors, strict=True)
        ]

    def _in_words(
        self, words: str, vector: Tensor, *, literal: bool, n_events: int, min_cosine: float, margin: float
    ) -> Question:
        vocabulary, table = self.run.vocabulary, self.run.embedding.table
        counts = vocabulary.tokens["count"].to_numpy()
        nearest = nearest_events(vector, vocabulary, table, n_events=max(n_events, NEAREST_RATES))
        near = near_enough(nearest[:n_events], min_cosine=min_cosine, margin=margin)
        if literal:
            near = nearest[:NEAREST_RATES]
        elif not near:
            raise nothing_near(
                words,
                nearest,
                vocabulary,
                min_cosine=min_cosine,
                else_type="codes=[CODE], or literal=true to give the model the words themselves",
            )
        of_code = [with_bins([event.token], vocabulary) for event in near]

        def told(event: NearEvent) -> FoundEvent:
            n = int(counts[with_bins([event.token], vocabulary)].sum())
            return FoundEvent(str(vocabulary.token_codes[event.token]), vocabulary.texts[event.token], event.cosine, n)

        found = [told(event) for event in near]
        own = with_bins([event.token for event in near], vocabulary)
        if not literal:
            first = nearest[:n_events]
            missed = [told(event) for event in first if event.cosine >= min_cosine and event not in near]
            wider = margin_for(first, min_cosine=min_cosine, margin=margin)
            return Question(words, own, found, None, self.sizes.rates_of([own])[0], missed, wider)
        return Question(words, own, found, vector, self.sizes.rates_of(of_code).mean(0))

    def _by_code(self, name: str, events: EventSet) -> Question:
        tokens = list(events.tokens(self.run.vocabulary))
        if not tokens:
            raise UserError(
                f"question {name!r}: no event of the run's vocabulary is in {events}. vocabulary/vocab.csv in the run's folder "
                "lists the codes and texts."
            )
        return Question(name, tokens, self._events_of(tokens), None, self.sizes.rates_of([tokens])[0])

    def _events_of(self, tokens: list[int]) -> list[FoundEvent]:
        vocabulary = self.run.vocabulary
        counts = vocabulary.tokens["count"].to_numpy()
        found: dict[str, FoundEvent] = {}
        for token in tokens:
            code = str(vocabulary.token_codes[token])
            text = vocabulary.texts[int(vocabulary.plain_tokens[token])]
            n = found[code].n_train if code in found else 0
            found[code] = FoundEvent(code, text, float("nan"), n + int(counts[token]))
        return sorted(found.values(), key=lambda event: -event.n_train)

    def ask(
        self,
        questions: Sequence[str] | Mapping[str, Mapping[str, Any]] | Sequence[Question],
        root: str | Path | None = None,
        *,
        horizon_days: float = 365.0,
        labels: str | None = None,
        split: str | None = "held_out",
        lookups: Sequence[str] = (),
        alignment: AlignmentSettings | None = None,
        **how: Any,
    ) -> Answers:
        """Return the risk of each outcome for the subjects of a MEDS dataset.

        Args:
            questions: as in `questions`, or what it returned.
            root: root of the dataset; None = that on which the run was trained.
            horizon_days: days after the prediction; the curve has twelve times up to it.
            labels: label set (name or path) at whose prediction times to predict; None = at each subject's last event.
            split: split of the subjects; None = all.
            lookups: CSV files with texts of codes that the run never saw.
            alignment: whether and how codes that the run never saw are read as its own; None = where most events have such codes.
            how: options of `questions`.

        Raises:
            UserError: the horizon is not above 0, or as `questions` and `predict_proba`.
        """
        if not horizon_days > 0:
            raise UserError(
                f"horizon_days={horizon_days}: expected a number of days above 0: within 0 days nothing can happen."
            )
        resolved: list[Question] = (
            list(questions)  # type: ignore[arg-type]
            if not isinstance(questions, Mapping) and len(questions) and isinstance(questions[0], Question)
            else self.questions(questions, **how)  # type: ignore[arg-type]
        )
        if root is None:
            root = (self.run.config.get("data") or {}).get("root")
            if root is None:
                raise UserError(
                    "data.root is not set, and the run does not say where its own data lie. Type: data.root=DIR"
                )
        days = (horizon_days * np.arange(1, N_TIMES + 1) / N_TIMES).tolist()
        reading = self.opened(
            str(root), labels=labels, split=split, lookups=lookups, alignment=alignment or AlignmentSettings()
        )
        with reading as data:
            incidence = self.incidence(data, resolved, days)
        tokens = [self._in_dataset(question.tokens, data) for question in resolved]
        places = TokenPlaces(data.events, len(data.vocabulary))
        prior = follow_up(data.events, data.samples, tokens, places=places, excludes_prior=False).has_prior
        return Answers(resolved, days, pl.DataFrame(data.samples.meds_keys), incidence, prior)

    def _in_dataset(self, tokens: list[int], data: Dataset) -> list[int]:
        """Return the tokens of a dataset that stand for those of the run; an aligned dataset has tokens of its own."""
        if data.aligned is None:
            return tokens
        rows, gates = data.aligned.alignment.rows(self.run.vocabulary, data.vocabulary)
        return np.flatnonzero(np.isin(rows, tokens) & (gates > 0)).tolist()

    @torch.inference_mode()
    def incidence(
        self, data: Dataset, questions: list[Question], days: list[float], *, shares: bool = True
    ) -> npt.NDArray[np.float64]:
        """Return the cumulative incidence (n, Q, G), death competing where the run's data have deaths.

        Args:
            data: records and prediction times.
            questions: what `questions` returned.
            days: (G,) times after the prediction.
            shares: whether a causal model reads the record of a subject once for all of its prediction times; if False, each
                sample is read alone. Both give the same numbers, up to rounding.
        """
        rates = torch.stack([question.log_rates for question in questions])
        sets = AskedSets.of(self.sizes, [question.tokens for question in questions], rates)
        asked = sets.inputs(self.run.embedding.to(self.device).table)
        for number, question in enumerate(questions):
            if question.vector is not None:
                asked["outcome_vectors"][number] = question.vector.to(self.device)
                asked["outcome_sizes"][number] = 1
        grid = torch.tensor(days, device=self.device)
        result = np.empty((len(data.samples), len(questions), len(days)))
        for rows, inputs in self._asked_batches(data) if shares else self.batches(data):
            result[rows] = sets.incidence(self.run.model(inputs | asked), grid).double().cpu().numpy()
        return result

    def _asked_batches(self, data: Dataset) -> Iterator[tuple[npt.NDArray[np.int64], dict[str, Tensor]]]:
        """Yield batches as `batches` does, but read samples that begin alike once, where the model is causal."""
        if not asks_everywhere(self.run.model):
            yield from self.batches(data)
            return
        samples = data.samples
        rows, row_of = sharing_rows(samples)
        by_row, last = np.argsort(row_of, kind="stable"), samples.lengths - 1
        first = np.searchsorted(row_of[by_row], np.arange(len(rows) + 1))
        for own, inputs in self.batches(data._replace(samples=samples.take(rows))):
            counts, n_places = np.diff(first)[own], inputs["padding_mask"].shape[1]
            asked = by_row[ragged_arange(first[own], counts)]
            places = np.repeat(np.arange(len(own)), counts) * n_places + last[asked]
            order = np.argsort(places, kind="stable")
            yield asked[order], inputs | {"asked_at": sent(places[order], self.device)}


def load(run_dir: str | Path, *, device: str = "cpu", trusted_packages: Sequence[str] = ()) -> Predictor:
    """Open a finished run: an `Asker` if it has a hazard head, else a `Predictor`."""
    run: TrainedRun = open_run(run_dir, trusted=tuple(trusted_packages))
    kind = Predictor if hazard_sizes(run.model) is None else Asker
    return kind(run_dir, device=device, trusted_packages=trusted_packages, run=run)
