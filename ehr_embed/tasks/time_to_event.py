"""Time to event: when does each of several outcomes follow the prediction time? Records end, so times are right-censored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import MinLen
from meds import death_code
from pydantic import Field
from torch import nn

from ehr_embed.core.settings import Count, DrawSeed, OneOf, Told, checked
from ehr_embed.data.batches import Batch, EventDataset
from ehr_embed.data.samples import Samples
from ehr_embed.data.store import EventStore
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.evaluation.metric import Metric, metric_named
from ehr_embed.evaluation.survival import SURVIVAL_METRICS
from ehr_embed.evaluation.survival_library import check_survival_library
from ehr_embed.models.hazards import HAZARDS, HazardSizes, OutcomeVectors
from ehr_embed.tasks.hazards_everywhere import EVERYWHERE_METRICS, AskEverywhere
from ehr_embed.tasks.hazards_once import AskOnce, TimeSettings
from ehr_embed.tasks.outcome_sets import AUTO, named_sets
from ehr_embed.tasks.protocol import Curves, Outputs, StepResult

Prior = Annotated[str, OneOf("exclude", "recur")]
HorizonsDays = Annotated[
    Sequence[Annotated[float, Field(gt=0)]],
    MinLen(1),
    Told("one or more numbers of days above 0", example="[365]", remedy="Within 0 days nothing can happen."),
]


class TimeToEvent:
    """Predicts when outcomes follow a prediction time, by hazards that are constant within time bins.

    An outcome is a set of events. With `outcomes=auto` every frequent code, its neighbours by text, and random unions of
    codes are outcomes, and a causal model is asked at each event of a record: the way to pretrain a model that can later be
    asked for an outcome in words.

    Args:
        outcomes: name -> `codes`, `code_pattern`, `text_pattern`, or the path of a definition file; a YAML file with such
            names; or `auto`.
        times: label set (name or path) or parquet file that gives the prediction times; None = they are drawn from the
            times of the records' own events.
        draws_per_record: drawn prediction times per record, where `times` is None.
        horizons_days: times after the prediction at which risks are judged and written.
        prior: `exclude` (a sample whose outcome lies before the prediction time is not asked for it) or `recur` (the next
            occurrence counts).
        competing: codes of events after which no outcome can happen, such as death.
        end_of_follow_up: codes of events that end the observation of a subject.
        n_bins: number of time bins; their bounds are percentiles of the observed times of train.
        width: width of an outcome's vector.
        outcome_vectors: `text` or, for the control, `learned`.
        auto: options of `AutoOutcomes`, for `outcomes=auto`.
        draw_seed: seed of the drawn prediction times.
        monitor: metric on tuning that chooses the best checkpoint.
    """

    is_trained = True
    metrics: Sequence[Metric] = (*SURVIVAL_METRICS, *EVERYWHERE_METRICS)

    @checked("task")
    def __init__(
        self,
        *,
        outcomes: str | Mapping[str, Any] | None = None,
        times: str | None = None,
        draws_per_record: Count = 1,
        horizons_days: HorizonsDays = (365.0,),
        prior: Prior = "exclude",
        competing: Sequence[str] = (death_code,),
        end_of_follow_up: Sequence[str] = (),
        n_bins: Annotated[int, Field(ge=1, le=64)] = 8,
        width: Annotated[int, Field(ge=1, le=1024)] = 32,
        outcome_vectors: OutcomeVectors = "text",
        auto: Mapping[str, Any] | None = None,
        draw_seed: DrawSeed = 0,
        monitor: str = "loss",
    ) -> None:
        settings = TimeSettings(
            times=times,
            draws_per_record=draws_per_record,
            horizons_days=tuple(sorted(set(map(float, horizons_days)))),
            excludes_prior=prior == "exclude",
            competing=tuple(competing),
            end=tuple(end_of_follow_up),
            n_bins=n_bins,
            width=width,
            vectors=outcome_vectors,
            seed=draw_seed,
        )
        self._way: AskOnce | AskEverywhere
        if outcomes == AUTO:
            self._way = AskEverywhere(settings, **(auto or {}))
        else:
            self._way = AskOnce(settings, named_sets({} if outcomes is None else outcomes))
        self.monitor = monitor
        self.is_higher_better = metric_named(monitor, self._way.metrics).is_higher_better

    @property
    def needs_causal(self) -> bool | None:
        return self._way.needs_causal

    @property
    def hazards(self) -> HazardSizes:
        """Return the facts with which a hazard head is built; known after `setup`."""
        return self._way.sizes

    @property
    def sizes(self) -> dict[str, Any]:
        return {"num_classes": self.hazards.num_classes, HAZARDS: self.hazards.plain()}

    @property
    def class_names(self) -> list[str]:
        return []

    @property
    def n_outputs(self) -> int:
        return self._way.n_outputs

    @property
    def samples(self) -> dict[str, Samples]:
        return self._way.samples

    def check(self) -> None:
        """Refuse named outcomes where the library that evaluates them is missing."""
        if isinstance(self._way, AskOnce):
            check_survival_library()

    def setup(self, store: EventStore, labels_dir: Path, max_length: int) -> None:
        self._way.setup(store, labels_dir, max_length)

    def dataset(self, split: str, rng: np.random.Generator | None = None) -> EventDataset:
        return self._way.dataset(split, rng)

    def step(self, model: nn.Module, embedding: EventEmbedding, batch: Batch) -> StepResult:
        """Return the sum of the negative log likelihoods of the batch's times, their number, and the samples' outputs."""
        return self._way.step(model, embedding, batch)

    def fit_thresholds(self, outputs: Outputs) -> None:
        """Do nothing: this task has no decision thresholds."""

    def evaluate(self, split: str, outputs: Outputs, *, n_bootstrap: int) -> dict[str, Any]:
        return self._way.evaluate(split, outputs, n_bootstrap=n_bootstrap)

    def write_predictions(self, path: Path, split: str, outputs: Outputs) -> None:
        self._way.write_predictions(path, split, outputs)

    def curves(self, outputs: dict[str, Outputs]) -> Curves:
        return {}

    def plots(self, outputs: dict[str, Outputs]) -> dict[str, Callable[[Path], None]]:
        """Return the task's own plots by name, each a function that writes a PNG file."""
        return {name: partial(draw, outputs) for name, draw in self._way.plots().items()}
