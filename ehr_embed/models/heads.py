"""Heads of the models: they turn event vectors into one prediction per sample, or into the distribution of an event."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import OneOf, check_setting
from ehr_embed.models.blocks import Dropout

POOLINGS = ("mean", "cls", "max", "last", "attention")
VOCABULARY_HEADS = ("text_tied", "linear")
VocabularyHead = Annotated[str, OneOf(*VOCABULARY_HEADS)]
N_SPECIAL = 2
"""Number of special tokens, 0 (padding) and 1 (unknown); they are no events, so no model predicts them."""
LOGITS_AT_ONCE = 2**24
"""Most entries of an (events, vocabulary) tensor that is held at a time: 64 MiB in float32."""
LOGITS_AT_ONCE_GPU = 2**27
"""The same on a GPU, 512 MiB: 4,473 events with 30,000 tokens, where 2^24 would be 559, too few to fill a GPU."""
N_TIME_BINS = 64
Score = Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""Type of a function that scores one chunk of events, as `_token_scores` does."""
SHORTEST_GAP_DAYS, LONGEST_GAP_DAYS = 30 / 86_400, 36_525.0
"""Range of the time bins, in days: a gap below half a minute counts as none, and the other bins are spaced evenly on a
log scale up to a century."""


def without_autocast(x: Tensor) -> Any:
    """Return a context without autocast on the device of `x`: products keep the number format of their factors.

    Scores are compared and turned into probabilities. bfloat16 has eight significant bits, too few to give different
    samples different probabilities: among 450 subjects only 370 probabilities were distinct.
    """
    return torch.autocast(x.device.type, enabled=False) if x.device.type != "meta" else nullcontext()


class LogitLinear(nn.Linear):
    """A linear map to logits, computed in the precision of its weights, float32, whatever precision the layers before it have.

    Its parameters have the same names as those of `nn.Linear`, so checkpoints fit both.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     LogitLinear(4, 2)(torch.ones(1, 4, dtype=torch.bfloat16)).dtype
    torch.float32
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (..., C) from vectors (..., D) of any floating type."""
        with without_autocast(x):
            return super().forward(x.to(self.weight.dtype))


class Pooling(nn.Module):
    """Pools event vectors to one per sample: `mean`, `max`, `last` event, `cls` (first) or learned `attention`."""

    def __init__(self, kind: str, *, model_dim: int) -> None:
        super().__init__()
        check_setting("model.pooling", kind, Annotated[str, OneOf(*POOLINGS)])
        self.kind = kind
        self.score = nn.Linear(model_dim, 1) if kind == "attention" else None

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the pooled vectors (B, D) under a mask (B, T), True = event; undefined for a sample without events."""
        keep_BT1 = mask_BT.unsqueeze(-1)
        if self.kind == "cls":
            return x_BTD[:, 0]
        if self.kind == "last":
            last_B = mask_BT.long().cumsum(1).argmax(1)
            return x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), last_B]
        if self.kind == "max":
            return x_BTD.masked_fill(~keep_BT1, torch.finfo(x_BTD.dtype).min).amax(1)
        if self.score is not None:
            weight = self.score(x_BTD).float().masked_fill(~keep_BT1, float("-inf")).softmax(1)
            return (x_BTD * weight.to(x_BTD.dtype)).sum(1, dtype=torch.float32)
        return (x_BTD * keep_BT1).sum(1, dtype=torch.float32) / keep_BT1.sum(1)


class PooledHead(nn.Module):
    """Pooling, dropout and a linear map to the classes, which is computed in float32."""

    def __init__(self, *, pooling: str, model_dim: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.pooling = Pooling(pooling, model_dim=model_dim)
        self.dropout = Dropout(dropout)
        self.classes = LogitLinear(model_dim, num_classes)

    def forward(self, x_BTD: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits (B, num_classes) from event vectors (B, T, D) and `padding_mask` (B, T), True = event."""
        return self.classes(self.dropout(self.pooling(x_BTD, inputs["padding_mask"])))


class EventScores(NamedTuple):
    """Negative log likelihoods, in nats, and ranks of N target events.

    Attributes:
        nll: (N,) negative log likelihood of the token.
        rank: (N,) int64, number of other tokens scored at least as high as the target; None in training.
        time_nll: (N,) negative log likelihood of the gap's bin given the token.
        value_nll: (N,) negative log likelihood, given the token, of the presence of a value plus, if there is one, of
            its density; None without values.
        is_target: (N,) bool, which of the N are targets, where the host does not know how many there are; all other numbers of
            the rest are 0. None = all are.
    """

    nll: Tensor
    rank: Tensor | None
    time_nll: Tensor
    value_nll: Tensor | None
    is_target: Tensor | None = None


class ValueDistribution(NamedTuple):
    """Distribution of an event's value: whether there is one, and a normal distribution of it; (N,) float32 each.

    Attributes:
        mean, log_sd: mean and log standard deviation of the normalised value.
        present: logit of the probability that there is a value.
    """

    mean: Tensor
    log_sd: Tensor
    present: Tensor

    def nll(self, values_N: Tensor) -> Tensor:
        """Return the negative log likelihood (N,) of values (N,), NaN = none."""
        is_present = ~values_N.isnan()
        # NaN is replaced before any arithmetic, because it would make the gradients of the other values NaN too.
        error_N = (values_N.nan_to_num() - self.mean) / self.log_sd.exp()
        density_N = 0.5 * error_N.square() + self.log_sd + 0.5 * math.log(2 * math.pi)
        presence_N = F.binary_cross_entropy_with_logits(self.present, is_present.float(), reduction="none")
        return presence_N + density_N * is_present


class EventHead(nn.Module):
    """Predicts an event from a hidden state: its token, then the gap before it and its value, both given the token.

    Args:
        kind: `text_tied`: a token's score is the dot product of the hidden state and a projection of the vector of its
            text, so that the head can predict a code never seen in training. `linear`: each token has a learned vector.
        model_dim: width D of the hidden states.
        embedding_dim: width E of the text vectors.
        vocab_size: number V of tokens.
        has_values: whether events carry a numeric value to predict.
    """

    def __init__(self, *, kind: str, model_dim: int, embedding_dim: int, vocab_size: int, has_values: bool) -> None:
        super().__init__()
        check_setting("model.vocabulary_head", kind, VocabularyHead)
        self.kind = kind
        if kind == "linear":
            self.tokens = nn.Linear(model_dim, vocab_size)
        else:
            self.text = nn.Sequential(nn.LayerNorm(embedding_dim), nn.Linear(embedding_dim, 4 * model_dim), nn.GELU())
            self.key = nn.Linear(4 * model_dim, model_dim)
            self.bias = nn.Linear(4 * model_dim, 1)
        self.given = nn.Sequential(nn.LayerNorm(embedding_dim), nn.Linear(embedding_dim, model_dim))
        self.time = nn.Sequential(nn.GELU(), nn.Linear(model_dim, N_TIME_BINS))
        self.value = nn.Sequential(nn.GELU(), nn.Linear(model_dim, 3)) if has_values else None
        self._compiled: Score | None = None

    def compile_scores(self) -> None:
        """Compile what a chunk of events scores, so that its scores are read and written once instead of once per operation."""
        self._compiled = torch.compile(_token_scores, dynamic=True)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without what was compiled, which cannot be copied or sent to another process."""
        return {**super().__getstate__(), "_compiled": None}

    def token_weights(self, table_VE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights (V, D) and biases (V,) of a table's tokens; special tokens have a bias of minus infinity.

        Raises:
            UserError: a linear head gets a table of another size than its vocabulary.
        """
        if self.kind == "linear":
            weight_VD, bias_V = self.tokens.weight, self.tokens.bias
            if len(table_VE) != len(weight_VD):
                raise UserError(
                    f"a linear vocabulary head of {len(weight_VD)} tokens cannot score {len(table_VE)} tokens, because "
                    "each of its tokens has a learned vector. Use the vocabulary it was trained with, or pretrain with "
                    "model.vocabulary_head=text_tied."
                )
        else:
            text = self.text(table_VE)
            weight_VD, bias_V = self.key(text) / math.sqrt(self.key.out_features), self.bias(text).squeeze(-1)
        return weight_VD, F.pad(bias_V[N_SPECIAL:], (N_SPECIAL, 0), value=float("-inf"))

    def logits(self, x_BTD: Tensor, table_VE: Tensor) -> Tensor:
        """Return scores of every token in float32, (..., D) -> (..., V); those of the special tokens are minus infinity."""
        return token_logits(x_BTD, *self.token_weights(table_VE))

    def forward(self, x_BTD: Tensor, inputs: dict[str, Tensor]) -> Tensor | EventScores:
        """Return logits (B, T, V), or for inputs with `targets` the scores of the N targets, in row-major order.

        The scores are computed without holding all logits at once.

        Args:
            x_BTD: hidden states.
            inputs: `table` (V, E), the vectors of all tokens; for scores also `targets` (B, T) token ids, 0 = none,
                `target_gap_days` (B, T), and `target_values` (B, T), NaN = none, if events carry values. With `target_places`
                (N,), numbers of places b * T + t among which all targets are, -1 = none, the targets are not counted, which
                would make the host wait for a GPU.
        """
        table_VE = inputs["table"]
        if "targets" not in inputs:
            return self.logits(x_BTD, table_VE)
        is_target_N = None
        if "target_places" in inputs:
            place_N = inputs["target_places"].clamp(min=0)
            is_target_N = (inputs["target_places"] >= 0) & (inputs["targets"].flatten()[place_N] > 0)
        else:
            place_N = inputs["targets"].flatten().nonzero().squeeze(1)

        def chosen(name: str) -> Tensor:
            return inputs[name].flatten()[place_N]

        x_ND, target_N = x_BTD.flatten(0, 1)[place_N], chosen("targets").long()
        if is_target_N is not None:  # any token that has a finite score
            target_N = target_N.clamp(min=N_SPECIAL)
        weight_VD, bias_V = self.token_weights(table_VE)
        # Half precision would round scores to ties and spoil the ranks; training needs no ranks, and is twice as fast
        # with it.
        with nullcontext() if self.training else without_autocast(x_ND):
            if not self.training:
                x_ND, weight_VD, bias_V = x_ND.float(), weight_VD.float(), bias_V.float()
            score = self._compiled if self.training else None
            nll_N, rank_N = token_scores(x_ND, weight_VD, bias_V, target_N, with_ranks=not self.training, score=score)
        time_NQ, value = self.time_and_value(x_ND, table_VE[target_N])
        time_nll_N = F.cross_entropy(time_NQ, time_bin(chosen("target_gap_days")), reduction="none")
        value_nll_N = None
        if value is not None:
            value_nll_N = value.nll(chosen("target_values"))
        scores = EventScores(nll_N, rank_N, time_nll_N, value_nll_N)
        return scores if is_target_N is None else _only(scores, is_target_N)

    def time_and_value(self, x_ND: Tensor, vectors_NE: Tensor) -> tuple[Tensor, ValueDistribution | None]:
        """Return the scores of the gap's bins, (N, N_TIME_BINS) float32, and the distribution of the normalised value.

        Both are computed in float32 outside training. The distribution is None without values.

        Args:
            x_ND: hidden states.
            vectors_NE: text vectors of the tokens that follow.
        """
        with nullcontext() if self.training else without_autocast(x_ND):
            if not self.training:
                x_ND = x_ND.float()
            given_ND = x_ND + self.given(vectors_NE)
            time_NQ = self.time(given_ND).float()
            if self.value is None:
                return time_NQ, None
            mean_N, log_sd_N, present_N = self.value(given_ND).float().unbind(-1)
            return time_NQ, ValueDistribution(mean_N, log_sd_N.clamp(-5, 5), present_N)


def _only(scores: EventScores, is_target_N: Tensor) -> EventScores:
    """Return the scores with 0 for all that are no targets."""
    kept = [None if x is None else torch.where(is_target_N, x, torch.zeros_like(x)) for x in scores[:-1]]
    nll_N, rank_N, time_nll_N, value_nll_N = kept
    assert nll_N is not None
    assert time_nll_N is not None
    return EventScores(nll_N, rank_N, time_nll_N, value_nll_N, is_target_N)


def token_logits(x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
    """Return scores (..., V) of the tokens from hidden states (..., D), in float32."""
    with without_autocast(x_ND):
        return F.linear(x_ND.float(), weight_VD.float(), bias_V.float())


def logits_at_once(device: torch.device) -> int:
    """Return the most entries of an (events, vocabulary) tensor that is held at a time on a device.

    >>> logits_at_once(torch.device("cpu")) < logits_at_once(torch.device("cuda"))
    True
    """
    return LOGITS_AT_ONCE if device.type == "cpu" else LOGITS_AT_ONCE_GPU


def token_scores(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, target_N: Tensor, *, with_ranks: bool, score: Score | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the cross-entropy and the rank of each target, holding at most `logits_at_once` logits at a time.

    The backward pass computes the logits of each chunk again instead of keeping them.

    Args:
        score: computes a chunk; None = plainly. `EventHead.compile_scores` gives a compiled one.

    Returns:
        Cross-entropy (N,) float32, and rank (N,) int64 or None. A tie counts against the target.
    """
    score = score or _token_scores
    n_rows = max(1, logits_at_once(x_ND.device) // len(weight_VD))
    parts = [
        # There is no dropout here, so the second forward pass needs no random state.
        checkpoint(score, x, weight_VD, bias_V, target, with_ranks, use_reentrant=False, preserve_rng_state=False)
        if len(x_ND) > n_rows
        else score(x, weight_VD, bias_V, target, with_ranks)
        for x, target in zip(x_ND.split(n_rows), target_N.split(n_rows), strict=True)
    ]
    nll, rank = zip(*parts, strict=True)
    return torch.cat(nll), torch.cat(rank) if with_ranks else None


def _token_scores(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, with_ranks: bool) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight.to(x.dtype), bias.to(x.dtype)).float()
    nll = F.cross_entropy(logits, target, reduction="none")
    if not with_ranks:
        return nll, target
    at_target = logits.detach().gather(1, target[:, None])
    return nll, (logits.detach() >= at_target).sum(1) - 1


def time_edges(device: torch.device | None = None) -> Tensor:
    """Return the lower bounds, in days, of the second and later time bins, (N_TIME_BINS - 1,)."""
    return torch.logspace(math.log10(SHORTEST_GAP_DAYS), math.log10(LONGEST_GAP_DAYS), N_TIME_BINS - 1, device=device)


def time_bin(gap_days: Tensor) -> Tensor:
    """Return the time bin of each gap, (...) days -> (...) int64; bin 0 means no gap.

    >>> time_bin(torch.tensor([0.0, 1 / 1440, 365.25, 1e6])).tolist()
    [0, 3, 47, 63]
    """
    return torch.bucketize(gap_days.float(), time_edges(gap_days.device), right=True)


def check_classifies(name: str, num_classes: int | None, vocab_size: int | None) -> int:
    """Return `num_classes` for a model that predicts classes only.

    Raises:
        UserError: the task predicts events, or gives neither size.
    """
    if num_classes is None or vocab_size is not None:
        raise UserError(
            f"{name} predicts classes, and this task predicts events (num_classes={num_classes}, vocab_size={vocab_size}). "
            "Type: model=decoder for task=next_event, model=encoder for task=masked_event, or task=classification"
        )
    return num_classes


def build_head(
    *,
    num_classes: int | None,
    vocab_size: int | None,
    has_values: bool,
    embedding_dim: int,
    model_dim: int,
    pooling: str,
    vocabulary_head: str,
    dropout: float,
) -> PooledHead | EventHead:
    """Build the head for a task that predicts classes (`num_classes`) or events (`vocab_size`).

    Raises:
        UserError: the pooling or the vocabulary head is unknown, or not exactly one of the two sizes is given.
    """
    if num_classes is not None and vocab_size is None:
        return PooledHead(pooling=pooling, model_dim=model_dim, num_classes=num_classes, dropout=dropout)
    if vocab_size is not None and num_classes is None:
        return EventHead(
            kind=vocabulary_head,
            model_dim=model_dim,
            embedding_dim=embedding_dim,
            vocab_size=vocab_size,
            has_values=has_values,
        )
    raise UserError(
        f"num_classes={num_classes}, vocab_size={vocab_size}: expected one of the two. A model predicts classes or events."
    )
