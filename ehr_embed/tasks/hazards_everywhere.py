"""Pretraining by time to event: at each event of a record, when does each of many sets of events follow? No labels are needed.

The sets are every frequent code, a code with its neighbours by text, and random unions of codes, so that a model can later be
asked for any set. Steinberg et al. 2023 (MOTOR, arXiv:2301.03150) pretrain on times to single codes, each with a vector of its own.

Suffixes: B rows, T places of a row, N places that are asked, K outcomes, C codes that are asked for, V tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from meds import birth_code
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path
from ehr_embed.core.settings import Count, Share, check_settings
from ehr_embed.core.transfer import kept_on, reads_freely, sent
from ehr_embed.data.batches import Batch, BatchDataset
from ehr_embed.data.event_set import EventSet
from ehr_embed.data.samples import Samples, window_samples
from ehr_embed.data.store import STATIC_TIME, EventStore
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.evaluation.bootstrap import Floats, SubjectBootstrap
from ehr_embed.evaluation.metric import Metric
from ehr_embed.evaluation.metrics import summaries
from ehr_embed.models.hazards import (
    HazardSizes,
    bin_of,
    check_asks_everywhere,
    exposure,
    hazard_nll,
    outcome_inputs,
)
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.tasks.hazards_once import TimeSettings
from ehr_embed.tasks.protocol import Outputs, StepResult

log = logging.getLogger(__name__)
EVERYWHERE_METRICS = (Metric("gain", is_higher_better=True),)
OUTPUTS = ("nll", "nll_of_rates", "n_events", "n_asked")
PROBED_EVENTS = 400_000
"""Events of train by which the time bins and the codes' rates are fitted."""
ROWS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class AutoOutcomes:
    """The settings by which sets of events become outcomes where `task.outcomes=auto`.

    Attributes:
        per_batch: sets that are drawn for each training batch.
        places: places of a training batch that are asked, drawn from all. Neighbours say nearly the same, and the loss costs
            (places x sets x bins): asking fewer places for more sets teaches more in the same time.
        min_events: a code with fewer timed events in train is in no set.
        neighbours: share of the sets that are a code with 1 to 7 of its nearest neighbours by text.
        unions: share of the sets that are 2 to 8 random codes; all other sets are single codes.
        rarity: power of a set's rate by which its losses are divided: 0 = a day of any set weighs equally, so that frequent
            codes are learned first; 1 = an event of any set weighs equally.
        never: `codes`, `code_pattern` or `text_pattern` of events that are in no set, to judge later how well the model answers
            for outcomes that it was never trained on.
    """

    per_batch: Count = 64
    places: Count = 4096
    min_events: Count = 20
    neighbours: Share = 0.2
    unions: Share = 0.2
    rarity: Share = 0.0
    never: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "task.auto", only_rules=True)
        if self.neighbours + self.unions > 1:
            raise UserError(
                f"task.auto.neighbours={self.neighbours}, task.auto.unions={self.unions}: expected shares whose sum is at most 1."
            )


MOST_CODES = 8


class Targets(NamedTuple):
    """The outcomes that follow the N asked places of a batch.

    Attributes:
        asked_at: (B, T) bool, the last event of each time that something observed follows.
        places: (N,) int64, number b * T + t of each asked place, ascending. On a GPU in training some may not be asked for
            anything, since counting those that are would make the host wait.
        days: (N, K) to the outcome or to the end of observation, NaN where the outcome is not asked for.
        is_event: (N, K) bool.
    """

    asked_at: Tensor
    places: Tensor
    days: Tensor
    is_event: Tensor


def targets(
    batch: Batch, member_KV: Tensor, stops_V: Tensor, *, excludes_prior: bool, most_places: int | None = None
) -> Targets:
    """Return when each set of tokens follows each time of each row.

    A row is observed until its last event or its first event that stops the observation, such as death; an outcome at that very
    time counts. All events of one time are visible together, so only the last of them is asked. Times are differences of float32
    days, exact to minutes within a life.

    Args:
        batch: rows of one sequence each.
        member_KV: (K, V) bool, the tokens of each set.
        stops_V: (V,) bool, tokens that stop the observation.
        excludes_prior: whether a set that has occurred is not asked for again.
        most_places: number of places to draw if there are more; None = all are asked.
    """
    token_BT, elapsed_BT = batch.token_ids.long(), batch.elapsed_days
    is_timed_BT = batch.is_event & ~batch.is_static
    hits_BTK = member_KV.T[token_BT]
    is_stop_BT = stops_V[token_BT] & is_timed_BT
    last_B = elapsed_BT.masked_fill(~is_timed_BT, 0).amax(1)
    end_BT = torch.minimum(_next(is_stop_BT.unsqueeze(-1), elapsed_BT).squeeze(-1), last_B[:, None])
    follows_BT = F.pad(is_timed_BT[:, 1:] & (batch.gap_days[:, 1:] > 0), (0, 1))
    is_stopped_BT = is_stop_BT.long().cumsum(1) > 0
    asked_BT = is_timed_BT & follows_BT & ~is_stopped_BT
    places = None
    if most_places is not None:
        lot_BT = torch.rand(asked_BT.shape, device=asked_BT.device).masked_fill(~asked_BT, 2.0)
        drawn = lot_BT.flatten().topk(min(most_places, lot_BT.numel()), largest=False).indices
        asked_BT = asked_BT & torch.zeros_like(asked_BT).flatten().index_fill(0, drawn, True).view_as(asked_BT)
        places = None if reads_freely(drawn.device) else drawn.sort().values
    is_known = places is None
    if places is None:
        places = asked_BT.flatten().nonzero().squeeze(1)
    when_NK = _next(hits_BTK & is_timed_BT.unsqueeze(-1), elapsed_BT).flatten(0, 1)[places]
    now_N1, end_N1 = elapsed_BT.flatten()[places].unsqueeze(-1), end_BT.flatten()[places].unsqueeze(-1)
    days_NK = torch.minimum(when_NK, end_N1) - now_N1
    if not is_known:
        days_NK = days_NK.masked_fill(~asked_BT.flatten()[places].unsqueeze(-1), torch.nan)
    if excludes_prior:
        has_prior_NK = (hits_BTK.int().cumsum(1) > 0).flatten(0, 1)[places]
        days_NK = days_NK.masked_fill(has_prior_NK, torch.nan)
    return Targets(asked_BT, places, days_NK, (when_NK <= end_N1) & ~days_NK.isnan())


def _next(hits_BTK: Tensor, elapsed_BT: Tensor) -> Tensor:
    """Return the days, since the row's first event, of the first hit after each place, (B, T, K); infinite where none follows."""
    times_BTK = torch.where(hits_BTK, elapsed_BT.unsqueeze(-1), torch.inf)
    soonest_BTK = times_BTK.flip(1).cummin(1).values.flip(1)
    return F.pad(soonest_BTK[:, 1:], (0, 0, 0, 1), value=torch.inf)


class AskEverywhere:
    """Asks a causal model at every event of a record for many sets of events.

    Args:
        settings: options of the task.
        auto: options of `AutoOutcomes`.
    """

    needs_causal: bool | None = True
    metrics: Sequence[Metric] = (Metric("loss", is_higher_better=False), *EVERYWHERE_METRICS)
    n_outputs = len(OUTPUTS)

    def __init__(self, settings: TimeSettings, **auto: Any) -> None:
        self.settings, self.auto = settings, AutoOutcomes(**auto)
        self._never = EventSet(**(self.auto.never or {}))
        self.samples: dict[str, Samples] = {}
        self._neighbours: Tensor | None = None

    def setup(self, store: EventStore, labels_dir: Path, max_length: int) -> None:
        """Choose the codes that are asked for, and fit time bins and rates to train."""
        if max_length < 3:
            raise UserError(
                f"model.max_length={max_length}: expected 3 or more events, so that one can be predicted from the others."
            )
        vocabulary, settings = store.vocabulary, self.settings
        self._max_length, V = max_length, len(vocabulary)
        self._events = {split: store.split(split) for split in SPLITS}
        self.samples = {
            split: window_samples(events, max_length=max_length, which="all" if split == "train" else "last")
            for split, events in self._events.items()
        }
        competing = list(EventSet(codes=settings.competing).tokens(vocabulary))
        stops = [*competing, *EventSet(codes=settings.end).tokens(vocabulary)]
        self._stops_V = torch.zeros(V, dtype=torch.bool)
        self._stops_V[stops] = True
        self._codes = self._asked_codes(vocabulary)
        self._code_sets = [self._codes[name] for name in self._codes]
        self._member_CV = _members(self._code_sets, V)
        edges, rates, ratios = self._fit()
        token_rates = np.full(V, -np.inf)
        counts = np.maximum(vocabulary.tokens["count"].to_numpy().astype(np.float64), 0.5)
        for tokens, rate in zip(self._code_sets, rates, strict=True):
            token_rates[tokens] = rate + np.log(counts[tokens] / counts[tokens].sum())
        # A token that no set holds has the rate of the rarest one that does.
        token_rates[~np.isfinite(token_rates)] = token_rates[np.isfinite(token_rates)].min()
        self.sizes = HazardSizes(
            edges=edges,
            width=settings.width,
            vectors=settings.vectors,
            names=[],
            tokens=[],
            log_rates=[],
            token_log_rates=token_rates.tolist(),
            bin_log_ratios=ratios,
            competing=competing,
            competing_at=None,
            competes=[],
        )
        self._edges, self._usual_log_rate = torch.tensor(edges), float(np.mean(rates))
        self._evaluated_sets: list[list[int]] | None = None

    def _asked_codes(self, vocabulary: Vocabulary) -> dict[str, list[int]]:
        """Return the tokens of each code that is frequent enough and not left out.

        Raises:
            UserError: there are fewer than two.
        """
        train = self._events["train"]
        timed = np.asarray(train.token_ids)[np.asarray(train.times) != STATIC_TIME]
        counts = np.bincount(timed, minlength=len(vocabulary))
        never = set(self._never.tokens(vocabulary)) if self.auto.never else set()
        if self.auto.never and not never:
            raise UserError(
                f"task.auto.never={dict(self.auto.never)}: no event of the vocabulary is in this set. Check vocab.csv."
            )
        never |= set(np.flatnonzero(self._stops_V.numpy()).tolist())
        tokens_of: dict[str, list[int]] = {}
        for token, code in enumerate(vocabulary.token_codes):
            if code is not None and token not in never and code.partition("//")[0] != birth_code:
                tokens_of.setdefault(code, []).append(token)
        found = {code: own for code, own in tokens_of.items() if counts[own].sum() >= self.auto.min_events}
        if len(found) < 2:
            raise UserError(
                f"task.outcomes=auto: {len(found)} codes have task.auto.min_events={self.auto.min_events} or more events in train, "
                "expected 2 or more. Type: a smaller task.auto.min_events"
            )
        log.info("%d codes of train are asked for, %d tokens are left out", len(found), len(never))
        return found

    def _fit(self) -> tuple[list[float], list[float], list[float]]:
        """Return the lower bounds of the time bins, the log rate of each code, and the log ratio of each bin's rate to the mean.

        Records of train are drawn until they have `PROBED_EVENTS` events.

        Raises:
            UserError: no code follows any event.
        """
        samples = self.samples["train"]
        order = np.random.default_rng(self.settings.seed).permutation(len(samples))
        order = order[: max(1, int(np.searchsorted(np.cumsum(samples.lengths[order]), PROBED_EVENTS)))]
        order = order[np.argsort(samples.lengths[order], kind="stable")]
        dataset = BatchDataset(self._events["train"], samples)
        C = len(self._code_sets)
        n_events, n_days, observed = torch.zeros(C), torch.zeros(C), []
        found = []
        for rows in np.array_split(order, -(-len(order) // ROWS_AT_ONCE)):
            own = targets(dataset[rows], self._member_CV, self._stops_V, excludes_prior=self.settings.excludes_prior)
            n_events += own.is_event.sum(0)
            n_days += own.days.nansum(0)
            times = own.days[own.is_event]
            observed.append(times[torch.randperm(len(times), generator=torch.Generator().manual_seed(0))[:5000]])
            found.append((own.days[::16], own.is_event[::16]))
        gaps = torch.cat(observed).double().numpy()
        if not len(gaps):
            raise UserError(
                "task.outcomes=auto: no frequent code follows any event of train, so there is nothing to learn. Look at the times "
                "of the data, or type: task.prior=recur"
            )
        inner = np.quantile(gaps, np.arange(1, self.settings.n_bins) / self.settings.n_bins)
        # Most gaps last years. Without a bound at the horizon, the hazard of the first year would be that of the first bin.
        inner = np.unique(np.r_[inner, self.settings.horizons_days])
        edges = [0.0, *inner[(inner > 0) & (inner < gaps.max())].tolist()]
        bounds = torch.tensor(edges)
        spent, counts = torch.zeros(len(edges)), torch.zeros(len(edges))
        for days, is_event in found:
            for part, event in zip(days.split(1024), is_event.split(1024), strict=True):
                spent += (exposure(part.nan_to_num(), bounds)).sum((0, 1))
                counts += torch.bincount(bin_of(part[event], bounds), minlength=len(edges))
        mean = counts.sum() / spent.sum()
        ratios = ((counts + 1) / (spent + 1 / mean) / mean).log()
        rates = ((n_events + 0.5) / n_days.clamp(min=1.0)).log()
        return edges, rates.tolist(), ratios.tolist()

    def dataset(self, split: str, rng: np.random.Generator | None = None) -> BatchDataset:
        """Return the dataset of a split; in training, records are cut at random places."""
        events = self._events[split]
        if rng is None:
            return BatchDataset(events, self.samples[split])
        return BatchDataset(events, window_samples(events, max_length=self._max_length, which="all", rng=rng))

    def step(self, model: nn.Module, embedding: EventEmbedding, batch: Batch) -> StepResult:
        """Return the sum of the negative log likelihoods over places and sets, their number, and per row the sums of `OUTPUTS`."""
        check_asks_everywhere(getattr(model, "module", model))
        table, device = embedding.table, batch.token_ids.device
        sets = self._drawn_sets(table) if model.training else self._fixed_sets(table)
        own = targets(
            batch,
            sent(_members(sets, len(table)), device),
            kept_on(device, self._stops_V),
            excludes_prior=self.settings.excludes_prior,
            most_places=self.auto.places if model.training else None,
        )
        rates = sent(self.sizes.rates_of(sets), device)
        inputs = embedding.inputs(batch) | outcome_inputs(table, sets, rates) | {"asked_at": own.places}
        edges, log_hazard_NKJ = kept_on(device, self._edges), model(inputs)
        log_rate_K = sent(self.sizes.log_rates_of(sets), device)
        weight_K = (-self.auto.rarity * (log_rate_K - self._usual_log_rate)).exp()
        nll_NK = hazard_nll(log_hazard_NKJ, own.days, own.is_event, edges) * weight_K
        with torch.no_grad():
            of_rates_NK = hazard_nll(rates.expand_as(log_hazard_NKJ), own.days, own.is_event, edges) * weight_K
            asked_NK = ~own.days.isnan()
            sums_N4 = torch.stack([x.double().sum(1) for x in (nll_NK, of_rates_NK, own.is_event, asked_NK)], dim=1)
            row_N = own.places // batch.token_ids.shape[1]
            sums_B4 = torch.zeros(len(batch.token_ids), len(OUTPUTS), dtype=torch.float64, device=device)
            sums_B4.index_add_(0, row_N, sums_N4)
        return StepResult(nll_NK.sum(), asked_NK.sum(), sums_B4)

    def _near(self, table: Tensor) -> Tensor:
        """Return the codes nearest to each code by text, nearest first and itself left out, (C, up to 7)."""
        if self._neighbours is None:
            member = self._member_CV.to(table.device).float()
            vectors = F.normalize(member @ table / member.sum(1, keepdim=True), dim=1)
            likeness = vectors @ vectors.T
            likeness.fill_diagonal_(-torch.inf)
            self._neighbours = likeness.topk(min(MOST_CODES - 1, len(likeness) - 1)).indices.cpu()
        return self._neighbours

    def _drawn_sets(
        self, table: Tensor, generator: torch.Generator | None = None, n: int | None = None
    ) -> list[list[int]]:
        """Draw sets of tokens: single codes, codes with their neighbours by text, and unions of random codes."""
        C, near = len(self._code_sets), self._near(table)
        n = self.auto.per_batch if n is None else n
        kind = torch.rand(n, generator=generator).tolist()
        first = torch.randint(C, (n,), generator=generator).tolist()
        size = torch.randint(1, near.shape[1] + 1, (n,), generator=generator).tolist()
        sets = []
        for which, code, more in zip(kind, first, size, strict=True):
            codes = [code]
            if which < self.auto.neighbours:
                codes += near[code, :more].tolist()
            elif which < self.auto.neighbours + self.auto.unions:
                codes += torch.randint(C, (more,), generator=generator).tolist()
            sets.append([token for own in dict.fromkeys(codes) for token in self._code_sets[own]])
        return sets

    def _fixed_sets(self, table: Tensor) -> list[list[int]]:
        """Return the sets of evaluation: up to 256 single codes, and 64 drawn sets."""
        if self._evaluated_sets is None:
            C = len(self._code_sets)
            chosen = np.unique(np.linspace(0, C - 1, min(C, 256)).round().astype(int)).tolist()
            drawn = self._drawn_sets(table, torch.Generator().manual_seed(self.settings.seed), 64)
            self._evaluated_sets = [self._code_sets[code] for code in chosen] + drawn
        return self._evaluated_sets

    def evaluate(self, split: str, outputs: Outputs, *, n_bootstrap: int) -> dict[str, Any]:
        """Return the loss (mean negative log likelihood per place and set) and `gain`: by how many nats per event the model's log
        likelihood is above that of the constant rates. Both are weighted by `auto.rarity`."""
        bootstrap = SubjectBootstrap.of(
            self.samples[split].subject_ids, n_samples=len(outputs), n_bootstrap=n_bootstrap, seed=0
        )
        totals = {name: bootstrap.totals(outputs[:, column]) for column, name in enumerate(OUTPUTS)}
        parts: dict[str, list[Floats]] = {"loss": [], "gain": []}
        for weights in bootstrap.weights():
            sums = {name: weights @ total for name, total in totals.items()}
            parts["loss"].append(sums["nll"] / np.maximum(sums["n_asked"], 1))
            parts["gain"].append((sums["nll_of_rates"] - sums["nll"]) / np.maximum(sums["n_events"], 1))
        facts = {"n": len(outputs), "n_subjects": bootstrap.n_subjects}
        facts |= {name: int(outputs[:, OUTPUTS.index(name)].sum()) for name in ("n_events", "n_asked")}
        return summaries({name: np.concatenate(values) for name, values in parts.items()}, 0.95) | facts

    def write_predictions(self, path: Path, split: str, outputs: Outputs) -> None:
        """Write one row per window: subject_id, prediction_time (of its last event), and the sums of `OUTPUTS`."""
        samples = self.samples[split]
        columns: dict[str, Any] = dict(samples.meds_keys)
        columns |= {name: outputs[:, column] for column, name in enumerate(OUTPUTS)}
        with atomic_path(path) as temporary:
            pl.DataFrame(columns).write_parquet(temporary)

    def plots(self) -> dict[str, Callable[[dict[str, Outputs], Path], None]]:
        """Return no plots: there is no single outcome to draw."""
        return {}


def _members(sets: Sequence[Sequence[int]], n_tokens: int) -> Tensor:
    """Return which tokens each set holds, (K, V) bool.

    >>> _members([[2], [0, 1]], 3).int().tolist()
    [[0, 0, 1], [1, 1, 0]]
    """
    member = torch.zeros(len(sets), n_tokens, dtype=torch.bool)
    for number, tokens in enumerate(sets):
        member[number, list(tokens)] = True
    return member
