"""Piecewise-exponential hazards of any outcomes: a head that knows an outcome by the texts of its events.

The hazard of outcome k in time bin j is exp(rate_kj + shift_kj + q_j . w_k). The model gives one query q_j per bin, and w_k and
shift_kj are projections of the mean text vector of the outcome's events and of their number. So no parameter belongs to an
outcome, and an outcome that was never trained on can be asked for. `rate_kj`, the outcome's log rate in train, is a fixed number
from which training starts; without it training is unstable (FEMR, Steinberg et al. 2023, arXiv:2301.03150, gives the head and
this warning).

Suffixes: N samples or places, K outcomes, J time bins, G times, D width of an outcome's vector, E width of a text's vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import OneOf, check_setting
from ehr_embed.core.transfer import reads_freely, sent
from ehr_embed.models.heads import without_autocast
from ehr_embed.models.protocol import FitsAtOnce, declarations

HAZARDS = "hazards"
"""Key of `HazardSizes` among the sizes that a task gives a model."""
OutcomeVectors = Annotated[str, OneOf("text", "learned")]
LIMIT = 15.0
"""Largest deviation of a log hazard from the outcome's log rate: a factor of three million."""

FEW = 4
"""The last block is computed at the asked places alone if these are at most one in `FEW` of all places."""


@runtime_checkable
class MakesHazards(Protocol):
    """A model that gives log hazards itself, such as a Cox model, in place of queries for a hazard head."""

    def set_hazards(self, sizes: HazardSizes) -> None:
        """Take the time bins and outcomes of the task; called once, before the weights are loaded."""
        ...


@dataclass(frozen=True, kw_only=True)
class HazardSizes:
    """The facts with which a hazard head is built; a checkpoint keeps them as plain values.

    Attributes:
        edges: (J,) lower bounds of the time bins in days, from 0; the last bin is open.
        width: D.
        vectors: `text`, or `learned` for the control in which each outcome has a vector of its own.
        names: the outcomes of the task; empty if the task draws outcomes anew for each batch.
        tokens: the token ids of each of them.
        log_rates: (K, J) log of the events per day of each of them in train.
        token_log_rates: (V,) log of the events per day of each token in train, for other outcomes.
        bin_log_ratios: (J,) log of each bin's events per day over those of all bins, for other outcomes.
        competing: tokens of the competing events, such as death; they are outcome `competing_at`.
        competing_at: number of the outcome that holds the competing events; None = there is none.
        competes: (K,) whether the competing events compete with each outcome; an outcome that holds them has no competitor.
    """

    edges: list[float]
    width: int
    vectors: str = "text"
    names: list[str]
    tokens: list[list[int]]
    log_rates: list[list[float]]
    token_log_rates: list[float]
    bin_log_ratios: list[float]
    competing: list[int]
    competing_at: int | None = None
    competes: list[bool]

    @property
    def num_classes(self) -> int:
        """Return the number of outputs that a model needs to give a query per time bin."""
        return self.width * len(self.edges)

    def rates_of(self, sets: Sequence[Sequence[int]]) -> Tensor:
        """Return the log rates (K, J) of sets of tokens: the sum of their tokens' rates, in the shape that all outcomes share."""
        return torch.tensor(self.log_rates_of(sets))[:, None] + torch.tensor(self.bin_log_ratios)

    def log_rates_of(self, sets: Sequence[Sequence[int]]) -> list[float]:
        """Return the log rate of each set of tokens in all bins together, (K,)."""
        return [math.log(sum(math.exp(self.token_log_rates[token]) for token in tokens)) for tokens in sets]

    def plain(self) -> dict[str, Any]:
        """Return the facts as plain values."""
        return asdict(self)


class HazardHead(nn.Module):
    """Turns queries into log hazards of outcomes.

    Args:
        sizes: what the head is built for.
        embedding_dim: width E of the text vectors.

    Raises:
        UserError: `sizes.vectors` is unknown, or `learned` without a fixed list of outcomes.
    """

    edges: Tensor

    def __init__(self, sizes: HazardSizes, *, embedding_dim: int) -> None:
        super().__init__()
        check_setting("task.outcome_vectors", sizes.vectors, OutcomeVectors)
        if sizes.vectors == "learned" and not sizes.names:
            raise UserError(
                "task.outcome_vectors=learned: each outcome has a vector of its own, and task.outcomes=auto draws outcomes "
                "anew for each batch. Type: task.outcome_vectors=text"
            )
        self.sizes, D, J = sizes, sizes.width, len(sizes.edges)
        self.register_buffer("edges", torch.tensor(sizes.edges), persistent=False)
        if sizes.vectors == "learned":
            self.learned: nn.Embedding | None = nn.Embedding(len(sizes.names), embedding_dim)
        else:
            self.learned = None
        self.outcome = nn.Sequential(
            nn.LayerNorm(embedding_dim), nn.Linear(embedding_dim, 2 * D), nn.GELU(), nn.Linear(2 * D, D)
        )
        self.of_size = nn.Linear(1, D)
        self.shift = nn.Linear(D, J)
        nn.init.zeros_(self.shift.weight)
        nn.init.zeros_(self.shift.bias)

    def forward(self, query: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Return log hazards per day, (..., K, J) float32, from queries (..., J * D).

        Args:
            query: output of the model.
            inputs: `outcome_vectors` (K, E), `outcome_sizes` (K,) number of events in the set, `outcome_log_rates` (K, J), and
                `outcome_ids` (K,) with learned vectors.
        """
        with without_autocast(query):
            vectors_KE = inputs["outcome_vectors"] if self.learned is None else self.learned(inputs["outcome_ids"])
            size_K1 = inputs["outcome_sizes"].float().log().unsqueeze(-1)
            w_KD = self.outcome(vectors_KE.float()) + self.of_size(size_K1)
            query_JD = query.float().unflatten(-1, (len(self.edges), -1))
            score = torch.einsum("...jd,kd->...kj", query_JD, w_KD) / math.sqrt(w_KD.shape[1])
            return inputs["outcome_log_rates"] + (score + self.shift(w_KD)).clamp(-LIMIT, LIMIT)


class GivesHazards(nn.Module):
    """Mixin: give a model that classifies a hazard head, which reads its logits as queries."""

    hazards: HazardHead

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return log hazards: (B, K, J), (B, M, K, J) of M members, or (N, K, J) at the N places of `asked_at`.

        Args:
            inputs: those of the model, those of `HazardHead.forward`, and `asked_at` (N,) int64, numbers b * T + t of places,
                for a causal model that is asked at many events of a record at once.
        """
        if "asked_at" not in inputs:
            return self.hazards(super().forward(inputs), inputs)
        model, places_N = cast(Any, self), inputs["asked_at"]
        is_few = FEW * len(places_N) <= inputs["padding_mask"].numel() and reads_freely(places_N.device)
        if is_few and not self.training and hasattr(model, "hidden_at"):
            x_ND = model.hidden_at(inputs, places_N)
        else:
            x_ND = model.hidden(inputs).flatten(0, 1)[places_N]
        return self.hazards(model.head.classes(model.head.dropout(x_ND)), inputs)


def with_hazards(model: nn.Module, sizes: HazardSizes, *, embedding_dim: int) -> nn.Module:
    """Give `model`, built with `sizes.num_classes` outputs, a hazard head, and return it.

    The model keeps its class's name, its parts and their names, so checkpoints of its body fit and every protocol that it
    fulfils holds as before.
    """
    if isinstance(model, MakesHazards):
        model.set_hazards(sizes)
        return model
    if isinstance(model, FitsAtOnce):
        raise UserError(
            f"task=time_to_event predicts times, and {type(model).__name__} is fitted to one class per sample. Type: model=cox, "
            "or model=encoder"
        )
    kind = type(model)
    model.hazards = HazardHead(sizes, embedding_dim=embedding_dim)
    model.__class__ = type(
        kind.__name__, (GivesHazards, kind), {"__doc__": kind.__doc__, "__module__": kind.__module__}
    )
    return model


def hazard_sizes(model: nn.Module) -> HazardSizes | None:
    """Return the sizes of a model's hazard head; None for a model without one."""
    model = getattr(model, "module", model)
    sizes = getattr(getattr(model, "hazards", None), "sizes", None)
    return sizes if isinstance(sizes, HazardSizes) else None


def asks_everywhere(model: nn.Module) -> bool:
    """Return whether a model can be asked at each event of a record at once: it is causal, and its vector of a record is that of
    the last event."""
    return bool(declarations(model).is_causal) and hasattr(model, "hidden") and _pooling(model) == "last"


def _pooling(model: nn.Module) -> str | None:
    return getattr(getattr(getattr(model, "head", None), "pooling", None), "kind", None)


def check_asks_everywhere(model: nn.Module) -> None:
    """Refuse a model that cannot be asked at each event of a record at once.

    Raises:
        UserError: as `asks_everywhere`.
    """
    if not asks_everywhere(model):
        raise UserError(
            f"task.outcomes=auto predicts at every event of a record, and {type(model).__name__} (pooling={_pooling(model)}) reads "
            "later events there, or mixes the vectors of several events. Type: model=decoder model.pooling=last"
        )


def outcome_inputs(
    table_VE: Tensor, sets: Sequence[Sequence[int]], log_rates_KJ: Tensor, *, ids: bool = False
) -> dict[str, Tensor]:
    """Return the inputs of `HazardHead.forward` for sets of token ids, none of them empty.

    Args:
        table_VE: vectors of all tokens.
        sets: K sets.
        log_rates_KJ: log of the events per day in train.
        ids: whether outcomes have learned vectors, whose numbers are their places in `sets`.
    """
    device = table_VE.device
    sizes = sent([len(tokens) for tokens in sets], device)
    flat = sent([token for tokens in sets for token in tokens], device)
    vectors = F.embedding_bag(flat, table_VE, sizes.cumsum(0) - sizes, mode="mean")
    inputs = {"outcome_vectors": vectors, "outcome_sizes": sizes, "outcome_log_rates": sent(log_rates_KJ, device)}
    return inputs | ({"outcome_ids": torch.arange(len(sets), device=device)} if ids else {})


class FittedToOutcomes:
    """Base class of models that are fitted at once to the named outcomes of a task.

    Attributes:
        option: the model's name in `model=NAME`.
        of_classes: that of its sibling that predicts classes.
        sizes: time bins and outcomes of the task; None = the task has none.
    """

    option: ClassVar[str]
    of_classes: ClassVar[str]
    sizes: HazardSizes | None = None

    def set_hazards(self, sizes: HazardSizes) -> None:
        """Take the time bins and outcomes of the task.

        Raises:
            UserError: the task draws outcomes anew for each batch, and this model is fitted to named ones.
        """
        if not sizes.names:
            raise UserError(
                f"model={self.option} is fitted to named outcomes. Type: task.outcomes={{NAME: {{codes: [CODE]}}}}, or "
                "model=decoder"
            )
        self.sizes = sizes

    def outcomes_and_edges(self) -> tuple[int, Tensor]:
        """Return the number K of outcomes and the lower bounds of the bins in days, (J,) float64.

        Raises:
            UserError: the task has no times, since it is no time-to-event task.
        """
        if self.sizes is None:
            raise UserError(
                f"model={self.option} predicts times. Type: task=time_to_event, or model={self.of_classes} for classes"
            )
        return len(self.sizes.tokens), torch.tensor(self.sizes.edges, dtype=torch.float64)


@dataclass(frozen=True)
class AskedSets:
    """Sets of events that a trained head is asked for, with the competing events among them (`with_competing`).

    Attributes:
        sizes: of the head.
        sets: token ids of each set.
        log_rates: (K, J).
        n_asked: sets without the competing one that was added.
        rival: number of the competing set; None = there is none.
        competes: whether the competing set competes with each set.
    """

    sizes: HazardSizes
    sets: list[list[int]]
    log_rates: Tensor
    n_asked: int
    rival: int | None
    competes: list[bool]

    @classmethod
    def of(cls, sizes: HazardSizes, sets: Sequence[Sequence[int]], log_rates: Tensor) -> AskedSets:
        """Add the competing events, where the run's data have them and not every set holds them.

        Args:
            sizes: of the head.
            sets: token ids of each set.
            log_rates: (K, J) of each set.
        """
        asked, rival, competes = with_competing(sets, sizes.competing)
        if len(asked) > len(sets):
            known = sizes.competing_at
            rate = sizes.rates_of([sizes.competing])[0] if known is None else torch.tensor(sizes.log_rates[known])
            log_rates = torch.cat([log_rates, rate[None]])
        return cls(sizes, asked, log_rates, len(sets), rival, competes)

    def inputs(self, table_VE: Tensor) -> dict[str, Tensor]:
        """Return the inputs of the head, given the vectors of all tokens."""
        return outcome_inputs(table_VE, self.sets, self.log_rates, ids=self.sizes.vectors == "learned")

    def incidence(self, log_hazard: Tensor, days_G: Tensor) -> Tensor:
        """Return the cumulative incidence (B, Q, G) of the asked sets by the times `days_G`, the mean over members."""
        edges = torch.tensor(self.sizes.edges, device=log_hazard.device)
        members = by_member(log_hazard)
        found = cumulative_incidence(members, days_G, edges, competing_at=self.rival, competes=self.competes)
        return found.mean(1)[:, : self.n_asked]


def by_member(log_hazard: Tensor) -> Tensor:
    """Return log hazards as (B, M, K, J): those of a model without members, (B, K, J), are those of one."""
    return log_hazard.unsqueeze(1) if log_hazard.ndim == 3 else log_hazard


def exposure(days: Tensor, edges_J: Tensor) -> Tensor:
    """Return the days spent in each bin until `days` after the start, (...) -> (..., J).

    >>> exposure(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 2.0, 3.0])).tolist()
    [[1.0, 0.0, 0.0], [2.0, 1.0, 2.0]]
    """
    width_J = torch.cat([edges_J.diff(), edges_J.new_tensor([math.inf])])
    return torch.minimum((days.unsqueeze(-1) - edges_J).clamp(min=0), width_J)


def bin_of(days: Tensor, edges_J: Tensor) -> Tensor:
    """Return the bin (...) int64 of each time above 0; a bin includes its upper bound.

    >>> bin_of(torch.tensor([1.0, 2.0, 2.5, 9.0]), torch.tensor([0.0, 2.0, 3.0])).tolist()
    [0, 0, 1, 2]
    """
    return (torch.bucketize(days, edges_J) - 1).clamp(min=0)


def hazard_nll(log_hazard: Tensor, days: Tensor, is_event: Tensor, edges_J: Tensor) -> Tensor:
    """Return the negative log likelihood of right-censored times: hazard times exposure, minus the log hazard at an event.

    Args:
        log_hazard: (..., K, J) per day.
        days: (..., K) days to the event or to censoring, of a shape that broadcasts to that of the hazards, as (B, 1, K) for M
            members; a NaN gives 0.
        is_event: (..., K) bool.
        edges_J: lower bounds of the bins in days.

    >>> one_bin = torch.tensor([0.1]).log().expand(2, 1, 1)
    >>> hazard_nll(one_bin, torch.tensor([[5.0], [5.0]]), torch.tensor([[True], [False]]), torch.zeros(1)).flatten()
    tensor([2.8026, 0.5000])
    """
    known = ~days.isnan()
    days = days.nan_to_num()
    # `gather` takes a smaller index without a word, and would give all members the event of the first.
    at = bin_of(days, edges_J).unsqueeze(-1).expand(*log_hazard.shape[:-1], 1)
    at_event = log_hazard.gather(-1, at).squeeze(-1)
    return ((log_hazard.exp() * exposure(days, edges_J)).sum(-1) - at_event * is_event) * known


def with_competing(
    sets: Sequence[Sequence[int]], competing: Sequence[int]
) -> tuple[list[list[int]], int | None, list[bool]]:
    """Return outcomes with the competing events among them, the number of these, and which outcomes they compete with.

    An outcome that holds all competing events, such as death itself, has no competitor. If every outcome holds them, or no event
    competes, none is added and the number is None. An outcome that is just the competing events stands for them.

    Args:
        sets: the tokens of each outcome.
        competing: tokens of the competing events.

    >>> with_competing([[3]], [9])
    ([[3], [9]], 1, [True, False])
    >>> with_competing([[9], [3]], [9])
    ([[9], [3]], 0, [False, True])
    >>> with_competing([[9, 3]], [9])
    ([[9, 3]], None, [False])
    """
    found, at = [list(own) for own in sets], None
    if competing and not all(set(competing) <= set(own) for own in found):
        same = [number for number, own in enumerate(found) if set(own) == set(competing)]
        at = same[0] if same else len(found)
        found += [] if same else [list(competing)]
    return found, at, [at is not None and not set(competing) <= set(own) for own in found]


def cumulative_incidence(
    log_hazard: Tensor,
    days_G: Tensor,
    edges_J: Tensor,
    *,
    competing_at: int | None = None,
    competes: Sequence[bool] = (),
) -> Tensor:
    """Return the probability that each outcome has happened by each time, (..., K, J) -> (..., K, G).

    An outcome can only happen before the competing event, so its probability is the integral of its hazard times the
    probability that neither has happened yet.

    Args:
        log_hazard: per day.
        days_G: times in days.
        edges_J: lower bounds of the bins in days.
        competing_at: number of the outcome that competes; None = none does.
        competes: (K,) whether it competes with each outcome; the competing outcome itself has no competitor.

    >>> log_hazard = torch.tensor([[0.1], [0.3]]).log()
    >>> cumulative_incidence(log_hazard, torch.tensor([5.0, 1e9]), torch.zeros(1), competing_at=1, competes=[True, False])
    tensor([[0.2162, 0.2500],
            [0.7769, 1.0000]])
    """
    hazard, spent_GJ = log_hazard.exp(), exposure(days_G, edges_J)
    alone = -torch.expm1(-hazard @ spent_GJ.T)
    if competing_at is None:
        return alone
    either = hazard + hazard[..., competing_at : competing_at + 1, :]  # (..., K, J)
    used = either.unsqueeze(-2) * spent_GJ  # (..., K, G, J)
    before = used.cumsum(-1) - used
    found = ((hazard / either).unsqueeze(-2) * (-before).exp() * -torch.expm1(-used)).sum(-1)
    return torch.where(torch.tensor(competes, device=hazard.device)[:, None], found, alone)
