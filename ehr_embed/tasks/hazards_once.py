"""Named outcomes, asked for once per prediction time: samples, loss and metrics of `TimeToEvent`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path
from ehr_embed.core.lost_data import say_or_refuse
from ehr_embed.core.transfer import kept_on
from ehr_embed.data.batches import Batch, BatchDataset
from ehr_embed.data.event_set import EventSet
from ehr_embed.data.labels import LabelSet, read_times
from ehr_embed.data.outcomes import CENSORED, COMPETING, EVENT, EXCLUDED, FollowUp, TokenPlaces, drawn_times, follow_up
from ehr_embed.data.samples import Samples, build_samples
from ehr_embed.data.store import EventStore, SplitEvents
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.evaluation.metric import Metric
from ehr_embed.evaluation.metrics import summaries
from ehr_embed.evaluation.survival import SURVIVAL_METRICS, survival_metrics
from ehr_embed.evaluation.survival_plots import plot_risk_groups
from ehr_embed.models.hazards import (
    HazardSizes,
    bin_of,
    by_member,
    cumulative_incidence,
    exposure,
    hazard_nll,
    outcome_inputs,
    with_competing,
)
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.tasks.classification import split_labels
from ehr_embed.tasks.outcome_sets import token_log_rates, tokens_by_name
from ehr_embed.tasks.protocol import Outputs, StepResult, logits_of

log = logging.getLogger(__name__)
N_GRID = 16
"""Number of percentiles of the observed times at which the incidence is computed, beside the horizons."""
STATUS_NAMES = {CENSORED: "censored", EVENT: "event", COMPETING: "competing", EXCLUDED: "excluded"}


@dataclass(frozen=True, kw_only=True)
class TimeSettings:
    """The options of `TimeToEvent` that both ways of asking share; the names are those of its arguments."""

    times: str | None
    draws_per_record: int
    horizons_days: tuple[float, ...]
    excludes_prior: bool
    competing: tuple[str, ...]
    end: tuple[str, ...]
    n_bins: int
    width: int
    vectors: str
    seed: int


class AskOnce:
    """Asks for named outcomes at one prediction time per sample.

    Args:
        settings: options of the task.
        outcomes: the event set of each outcome.
    """

    needs_causal: bool | None = None
    metrics: Sequence[Metric] = SURVIVAL_METRICS

    def __init__(self, settings: TimeSettings, outcomes: Mapping[str, EventSet]) -> None:
        self.settings, self._sets, self.names = settings, dict(outcomes), list(outcomes)
        self.samples: dict[str, Samples] = {}
        self.follow_up: dict[str, FollowUp] = {}
        self._prior: dict[str, tuple[npt.NDArray[np.int64], int]] = {}

    @property
    def n_outputs(self) -> int:
        """Per outcome the incidence at each time of the grid, and the negative log likelihood."""
        return len(self.names) * (len(self.grid) + 1)

    def setup(self, store: EventStore, labels_dir: Path, max_length: int) -> None:
        """Read the prediction times, build the samples, and find when each outcome follows."""
        vocabulary, settings = store.vocabulary, self.settings
        tokens = tokens_by_name(self._sets, vocabulary)
        competing = list(EventSet(codes=settings.competing).tokens(vocabulary))
        end = EventSet(codes=settings.end).tokens(vocabulary)
        sets, competing_at, competes = with_competing(list(tokens.values()), competing)
        self._events = {split: store.split(split) for split in SPLITS}
        for split, (events, frame) in self._times(labels_dir).items():
            samples = build_samples(events, frame, np.zeros(len(frame), np.int64), max_length=max_length)
            found = follow_up(
                events,
                samples,
                sets,
                places=TokenPlaces(events, len(vocabulary)),
                competing=competing,
                end=end,
                excludes_prior=settings.excludes_prior,
            )
            self._keep(split, samples, found)
        for split in SPLITS:
            self._refuse_undefined(split)
        edges = self._fit_grid()
        log_rates = self._observed_log_rates(edges)
        self.sizes = HazardSizes(
            edges=edges,
            width=settings.width,
            vectors=settings.vectors,
            names=self.names,
            tokens=sets,
            log_rates=log_rates.tolist(),
            token_log_rates=token_log_rates(self._events["train"], len(vocabulary)).tolist(),
            bin_log_ratios=(log_rates - log_rates.mean(1, keepdims=True)).mean(0).tolist(),
            competing=competing,
            competing_at=competing_at,
            competes=competes,
        )
        self._edges = torch.tensor(edges)
        self._grid = torch.tensor(self.grid, dtype=torch.float32)
        self._log_rates = torch.tensor(self.sizes.log_rates)

    def _times(self, labels_dir: Path) -> dict[str, tuple[SplitEvents, pl.DataFrame]]:
        """Return the events and the prediction times of each split."""
        if self.settings.times is not None:
            frame = read_times(self.settings.times, labels_dir)
            return split_labels(LabelSet(f"task.times={self.settings.times}", frame, "boolean_value"), self._events)
        parts = {}
        for number, (split, events) in enumerate(self._events.items()):
            rng = np.random.default_rng([self.settings.seed, number])
            subjects, times = drawn_times(events, per_record=self.settings.draws_per_record, rng=rng)
            if not len(times):
                raise UserError(
                    f"split {split}: no record has two events at different times, so no prediction time can be drawn that "
                    "something follows. Type: task.times=NAME"
                )
            parts[split] = (
                events,
                pl.DataFrame({"subject_id": subjects, "prediction_time": times.astype("datetime64[us]")}),
            )
        return parts

    def _keep(self, split: str, samples: Samples, found: FollowUp) -> None:
        """Keep the samples that are asked for one outcome or more, and say how many are not."""
        self._prior[split] = found.has_prior.sum(0), len(samples)
        asked = (found.status != EXCLUDED)[:, : len(self.names)].any(1)
        say_or_refuse(
            int((~asked).sum()),
            len(asked),
            f"prediction times of {split} are followed by no observed time, or come after every outcome or a competing event, and "
            "are left out",
            remedy="Give earlier prediction times in task.times, or type: task.prior=recur to ask for the next occurrence.",
        )
        found = FollowUp(found.days[asked], found.status[asked], found.has_prior[asked])
        labels = np.concatenate([found.days, found.status], axis=1).astype(np.float32)
        kept = samples.take(np.flatnonzero(asked))
        self.samples[split] = Samples(**(vars(kept) | {"labels": labels}))
        self.follow_up[split] = found

    def _refuse_undefined(self, split: str) -> None:
        """Refuse a split in which an outcome has no event, or no sample is observed until the first horizon.

        Raises:
            UserError: every sample is censored or has the outcome before the prediction, or the horizons are longer than all
                follow-up.
        """
        found = self.follow_up[split]
        for column, name in enumerate(self.names):
            status = found.status[:, column]
            counts = {told: int((status == kind).sum()) for kind, told in STATUS_NAMES.items()}
            if not counts["event"]:
                told = ", ".join(f"{kind}: {n:,}" for kind, n in counts.items())
                n_prior, n = self._prior[split][0][column], self._prior[split][1]
                why = f"; at {n_prior:,} of {n:,} prediction times the outcome had already happened" if n_prior else ""
                raise UserError(
                    f"task.outcomes.{name}, split {split}: no sample has the outcome after its prediction time ({told}{why}), so "
                    "there is nothing to learn or to rank. Give earlier prediction times in task.times, or type: "
                    "task.prior=recur if the outcome can happen again, or leave the outcome out"
                )
            days = found.days[status != EXCLUDED, column]
            longest, first = float(days.max()), float(found.days[status == EVENT, column].min())
            if not any(first <= horizon < longest for horizon in self.settings.horizons_days):
                raise UserError(
                    f"task.horizons_days={list(self.settings.horizons_days)}, outcome {name}, split {split}: expected a horizon "
                    f"between the first event, after {first:.4g} days, and the longest follow-up, {longest:.4g} days; at any other "
                    "no risk can be judged. Horizons are in days, times in the data in microseconds: look at the unit of both. "
                    f"Type: task.horizons_days=[{(first + longest) / 2:.3g}]"
                )

    def _fit_grid(self) -> list[float]:
        """Choose the times at which the incidence is computed, and return the lower bounds of the time bins."""
        found = self.follow_up["train"]
        own = slice(None, len(self.names))
        observed = found.days[:, own][found.status[:, own] == EVENT]
        edges = np.unique(np.quantile(observed, np.arange(1, self.settings.n_bins) / self.settings.n_bins))
        grid = np.quantile(observed, np.arange(1, N_GRID + 1) / (N_GRID + 1))
        # float32, since the model's times are: a horizon must be found again in the grid.
        self.grid = np.unique(np.r_[grid, self.settings.horizons_days].astype(np.float32)).tolist()
        self.horizons = np.asarray(self.settings.horizons_days, np.float32).tolist()
        return [0.0, *edges[edges > 0].tolist()]

    def _observed_log_rates(self, edges: list[float]) -> npt.NDArray[np.float64]:
        """Return the log of the events per day of each outcome in each bin of train, (K, J).

        Half an event at the outcome's mean rate is added to each bin, so that no rate is infinite.
        """
        found, bounds = self.follow_up["train"], torch.tensor(edges, dtype=torch.float64)
        days = torch.from_numpy(found.days)
        spent = exposure(days.nan_to_num(), bounds).sum(0).numpy()  # (K, J)
        is_event = found.status == EVENT
        at = bin_of(days.nan_to_num(), bounds).numpy()
        counts = np.stack([(is_event & (at == j)).sum(0) for j in range(len(edges))], axis=1)
        mean = (counts.sum(1, keepdims=True) + 0.5) / np.maximum(spent.sum(1, keepdims=True), 1.0)
        return np.log((counts + 0.5) / (spent + 0.5 / mean))

    def dataset(self, split: str, rng: np.random.Generator | None = None) -> BatchDataset:
        """Return the dataset of a split."""
        return BatchDataset(self._events[split], self.samples[split])

    def step(self, model: nn.Module, embedding: EventEmbedding, batch: Batch) -> StepResult:
        """Return the sum of the negative log likelihoods of all outcomes asked for, their number, and the outputs."""
        K = len(self.sizes.tokens)
        asked = outcome_inputs(embedding.table, self.sizes.tokens, self._log_rates, ids=self.sizes.vectors == "learned")
        log_hazard = logits_of(model, embedding.inputs(batch) | asked)
        edges, grid = kept_on(log_hazard.device, self._edges), kept_on(log_hazard.device, self._grid)
        days, is_event = batch.labels[:, :K], batch.labels[:, K:] == EVENT
        members = by_member(log_hazard)
        nll_BK = hazard_nll(members, days.unsqueeze(1), is_event.unsqueeze(1), edges).mean(1)
        n_asked = (~days.isnan()).sum()
        risk_BKG = cumulative_incidence(
            members.detach(), grid, edges, competing_at=self.sizes.competing_at, competes=self.sizes.competes
        ).mean(1)
        own = slice(None, len(self.names))
        outputs = torch.cat([risk_BKG[:, own], nll_BK.detach()[:, own].unsqueeze(-1)], dim=-1)
        return StepResult(nll_BK.sum(), n_asked, outputs.flatten(1).double())

    def evaluate(self, split: str, outputs: Outputs, *, n_bootstrap: int) -> dict[str, Any]:
        """Return the metrics of each outcome, and their unweighted means if there are several."""
        per_outcome = {}
        for name, asked, incidence, nll, days, status in self._evaluated(split, outputs):
            per_outcome[name] = survival_metrics(
                days,
                status,
                incidence,
                nll,
                grid_days=self.grid,
                horizons_days=self.horizons,
                subject_ids=self.samples[split].subject_ids[asked],
                n_bootstrap=n_bootstrap,
            )
        if len(per_outcome) == 1:
            return next(iter(per_outcome.values()))
        names = [metric.name for metric in SURVIVAL_METRICS]
        means = {name: np.array([np.nanmean([own[name]["value"] for own in per_outcome.values()])]) for name in names}
        n_subjects = len(np.unique(self.samples[split].subject_ids))
        facts = {"n": len(self.samples[split]), "n_subjects": n_subjects, "per_outcome": per_outcome}
        return summaries(means, 0.95) | facts

    def _evaluated(self, split: str, outputs: Outputs) -> list[tuple[Any, ...]]:
        """Return per outcome its name, the samples that are asked for it, and their incidence (m, G), nll, days and status."""
        found, cells = self.follow_up[split], outputs.reshape(len(outputs), len(self.names), -1)
        parts: list[tuple[Any, ...]] = []
        for column, name in enumerate(self.names):
            asked = np.flatnonzero(found.status[:, column] != EXCLUDED)
            own = cells[asked, column]
            parts.append((name, asked, own[:, :-1], own[:, -1], found.days[asked, column], found.status[asked, column]))
        return parts

    def write_predictions(self, path: Path, split: str, outputs: Outputs) -> None:
        """Write one row per sample: subject_id, prediction_time, and per outcome NAME/days (null where it is not asked for),
        NAME/status, and NAME/risk_<days>d at each horizon."""
        samples, found = self.samples[split], self.follow_up[split]
        columns: dict[str, Any] = dict(samples.meds_keys)
        cells = outputs.reshape(len(outputs), len(self.names), -1)
        for column, name in enumerate(self.names):
            columns[f"{name}/days"] = pl.Series(found.days[:, column]).fill_nan(None)
            columns[f"{name}/status"] = [STATUS_NAMES[int(kind)] for kind in found.status[:, column]]
            for horizon in self.horizons:
                columns[f"{name}/risk_{horizon:g}d"] = cells[:, column, self.grid.index(horizon)].astype(np.float32)
        with atomic_path(path) as temporary:
            pl.DataFrame(columns).write_parquet(temporary)

    def plots(self) -> dict[str, Callable[[dict[str, Outputs], Path], None]]:
        """Return per outcome a function that plots risk groups of held_out."""

        def draw(name: str) -> Callable[[dict[str, Outputs], Path], None]:
            def drawn(outputs: dict[str, Outputs], path: Path) -> None:
                for own, _, incidence, _, days, status in self._evaluated("held_out", outputs["held_out"]):
                    if own == name:
                        plot_risk_groups(path, days, status, incidence, grid_days=self.grid, title=f"{name}, held out")

            return drawn

        return {f"risk_groups_{re.sub(r'[^A-Za-z0-9_-]+', '_', name)}": draw(name) for name in self.names}
