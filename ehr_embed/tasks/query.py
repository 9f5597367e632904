"""Zero-shot risk by a hazard head: one forward pass answers for a set of events that need not have been an outcome in training."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import Count, Share, Text, checked
from ehr_embed.data.batches import Batch
from ehr_embed.data.event_set import EventSet
from ehr_embed.data.store import EventStore
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.embedding.nearest_events import near_enough, nearest_events, nothing_near, with_bins
from ehr_embed.models.hazards import HAZARDS, AskedSets, HazardSizes
from ehr_embed.models.sampling import HorizonDays
from ehr_embed.tasks.classification import Classification, check_boolean
from ehr_embed.tasks.protocol import StepResult, logits_of

log = logging.getLogger(__name__)


class Query(Classification):
    """Estimates the risk of a boolean label with a run of task=time_to_event, without training.

    The label must mean that an event of a set occurs within a horizon after the prediction time. Death competes if the run's data
    have deaths.

    Args:
        words: the outcome in words; the events whose texts are nearest to them are the event set.
        n_events: most events that words are resolved to.
        min_cosine: least cosine of an event's text to the words.
        margin: an event whose cosine is lower than the nearest event's by more than this is left out.
        codes, code_pattern, text_pattern: the event set in place of words; see `EventSet`.
        definition: YAML file that holds these three keys instead.
        horizon_days: the horizon of the label, in days.
        options: options of `Classification`, such as `labels` and `monitor`.
    """

    is_trained = False
    needs_causal: bool | None = None

    @checked("task")
    def __init__(
        self,
        *,
        words: Text | None = None,
        n_events: Count = 8,
        min_cosine: Share = 0.5,
        margin: Share = 0.1,
        codes: Sequence[str] = (),
        code_pattern: str | None = None,
        text_pattern: str | None = None,
        definition: str | None = None,
        horizon_days: HorizonDays = 365.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.words, self._n_events, self._min_cosine, self._margin = words, n_events, min_cosine, margin
        by_code = {"codes": codes, "code_pattern": code_pattern, "text_pattern": text_pattern, "definition": definition}
        self._event_set: EventSet | None = None
        if words is None:
            self._event_set = EventSet.given("query", **by_code, else_type=", or task.words=WORDS")  # type: ignore[arg-type]
        elif both := [name for name, value in by_code.items() if value]:
            raise UserError(
                f"task.words={words} and task.{both[0]} are both given: an outcome is asked for in words or by codes. Leave one out"
            )
        self._tokens: list[int] = []
        self.horizon_days = horizon_days
        self._hazards: HazardSizes | None = None

    def take_sizes(self, sizes: Mapping[str, Any], where: Path) -> None:
        """Take the time bins and rates of the run that the weights come from; called before the model is built.

        Raises:
            UserError: that run has no hazard head, or learned vectors of its own outcomes.
        """
        if HAZARDS not in sizes or sizes[HAZARDS]["vectors"] != "text":
            raise UserError(
                f"{where} has no hazard head that knows an outcome by its texts, so it cannot be asked. Type: python train.py "
                "experiment=pretrain_hazards data.root=DIR run_dir=RUN_DIR, and init_from=RUN_DIR"
            )
        self._hazards = HazardSizes(**sizes[HAZARDS])

    @property
    def sizes(self) -> dict[str, Any]:
        assert self._hazards is not None
        return {"num_classes": self._hazards.num_classes, HAZARDS: self._hazards.plain()}

    def setup(self, store: EventStore, labels_dir: Path, max_length: int) -> None:
        super().setup(store, labels_dir, max_length)
        check_boolean(self, "query")
        self._vocabulary = store.vocabulary
        if self._event_set is None:
            return
        self._tokens = list(self._event_set.tokens(store.vocabulary))
        if not self._tokens:
            raise UserError(
                f"no token of the vocabulary is in {self._event_set}, so nothing is asked for. vocabulary/vocab.csv in the run's "
                "folder lists the codes and texts."
            )

    def take_words(self, vector: Tensor, table: Tensor) -> None:
        """Resolve the words to the nearest events of the vocabulary, and log these.

        Args:
            vector: (E,) of the words.
            table: (V, E) vectors of the vocabulary.

        Raises:
            UserError: no event is near enough.
        """
        assert self.words is not None
        vocabulary = self._vocabulary
        nearest = nearest_events(vector, vocabulary, table, n_events=self._n_events)
        near = near_enough(nearest, min_cosine=self._min_cosine, margin=self._margin)
        if not near:
            raise nothing_near(
                self.words,
                nearest,
                vocabulary,
                min_cosine=self._min_cosine,
                where="task.",
                else_type="or task.codes=[CODE] in place of words",
            )
        told = "; ".join(f"{vocabulary.texts[event.token]} (cosine {event.cosine:.3f})" for event in near)
        log.info("task.words=%s asks for: %s", self.words, told)
        self._tokens = with_bins([event.token for event in near], vocabulary)

    def step(self, model: nn.Module, embedding: EventEmbedding, batch: Batch) -> StepResult:
        """Return the cross-entropy of the risks, their number, and the class probabilities."""
        assert self._hazards is not None
        device = batch.token_ids.device
        asked = AskedSets.of(self._hazards, [self._tokens], self._hazards.rates_of([self._tokens]))
        log_hazard = logits_of(model, embedding.inputs(batch) | asked.inputs(embedding.table))
        risk_B = asked.incidence(log_hazard, torch.tensor([self.horizon_days], device=device))[:, 0, 0].double()
        risk_B = risk_B.clamp(1e-7, 1 - 1e-7)
        loss_B = -torch.where(batch.labels == 1, risk_B, 1 - risk_B).log()
        return StepResult(loss_B.sum(), len(loss_B), torch.stack([1 - risk_B, risk_B], dim=-1))
