"""Samples futures of a record from a decoder that was pretrained to predict the next event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import Count, ShareAbove0, Told, check_settings
from ehr_embed.core.transfer import reads_freely, sent
from ehr_embed.data.batches import Batch
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.decoder import Decoder
from ehr_embed.models.heads import (
    N_TIME_BINS,
    EventHead,
    ValueDistribution,
    logits_at_once,
    time_edges,
    token_logits,
)

COUNTED_EVERY = 8
"""Events between two counts of the futures that go on, on a GPU."""
SHORTEST_WAIT_DAYS = 1 / 86_400
"""One second: least time between the prediction time and the first event of a future."""


HorizonDays = Annotated[
    float, Field(gt=0), Told("a time above 0, in days", example="365", remedy="A future of no length has no events.")
]
Temperature = Annotated[float, Field(ge=0), Told("0 (greedy) or more", example="1.0")]
TopK = Annotated[Count | None, Told("1 or more tokens, or null for all", example="null")]
TopP = Annotated[ShareAbove0 | None, Told("a probability in (0, 1], or null for all", example="null")]


@dataclass(frozen=True)
class Sampling:
    """Settings of how futures are drawn.

    Attributes:
        n_samples: number of futures per prompt.
        horizon_days: a future ends before its first event that is later than this after the prediction time.
        max_new_events: a future ends after this many events.
        temperature: temperature of the token's distribution, which for the first event is the one given the silence; 0
            is greedy: the most probable token, the middle of the most probable gap bin, and the mean value.
        top_k: draw only from this many most probable tokens; None = all.
        top_p: draw only from the most probable tokens that together reach this probability; None = all.
        stop_tokens: a future ends with the first of these tokens.

    Raises:
        UserError: a number is out of range.
    """

    n_samples: Count = 1
    horizon_days: HorizonDays = 365.0
    max_new_events: Count = 128
    temperature: Temperature = 1.0
    top_k: TopK = None
    top_p: TopP = None
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), only_rules=True)


@dataclass(frozen=True)
class Trajectories:
    """The N generated events of all futures; the events of each future are in order of time.

    Attributes:
        is_cut: (B, n_samples) bool, whether a future ended at `max_new_events`, before its horizon.
        prompt: (N,) int64, the row of the event's prompt in the batch.
        sample: (N,) int64, the number of the event's future, 0 ... n_samples - 1.
        token_ids: (N,) int64.
        days: (N,) float64, days after the prediction time.
        values: (N,) float32, in robust standard deviations from the train median; NaN = no value.
    """

    is_cut: Tensor
    prompt: Tensor
    sample: Tensor
    token_ids: Tensor
    days: Tensor
    values: Tensor


def check_generates(model: nn.Module) -> Decoder:
    """Return the model as a decoder, or refuse a model that cannot generate.

    Raises:
        UserError: the model is no `Decoder`, or was built to predict classes.
    """
    if not isinstance(model, Decoder):
        raise UserError(
            f"{type(model).__name__} sees what comes after an event, so it cannot generate. Type: model=decoder task=next_event"
        )
    if not isinstance(model.head, EventHead):
        raise UserError("this decoder predicts classes, not events. Generate from a run of task=next_event.")
    return model


def check_lengths(n_prompt: int, max_new_events: int, max_length: int) -> None:
    """Refuse prompts that leave no room for the future.

    Raises:
        UserError: a prompt has no events, or prompt and future together exceed the model's `max_length`.
    """
    if n_prompt < 1:
        raise UserError(
            f"a prompt of {n_prompt} events: expected 1 or more. model.max_length={max_length} and max_new_events="
            f"{max_new_events} leave {max_length - max_new_events}. Type: a smaller max_new_events"
        )
    if n_prompt + max_new_events > max_length:
        raise UserError(
            f"a prompt of {n_prompt} events and max_new_events={max_new_events} exceed the model's max_length={max_length}; "
            "later events would have positions that it was not trained on. Type: "
            f"prompt_length={max(1, max_length - max_new_events)}, or "
            f"a smaller max_new_events"
        )


@torch.inference_mode()
def generate(
    model: nn.Module,
    embedding: EventEmbedding,
    prompts: Batch,
    sampling: Sampling,
    generator: torch.Generator,
    *,
    use_cache: bool = True,
) -> Trajectories:
    """Draw `n_samples` futures of every prompt.

    Each event is drawn in three steps: its token, its gap, its value. The first event must come after the prediction
    time, so its token and gap are drawn given that the gap is longer than the silence between the last event and the
    prediction time. All futures of a batch advance together; those that have ended are dropped when they are half of them.

    Args:
        model: a decoder after `task=next_event`, in evaluation mode.
        embedding: the embedding that the model was trained with.
        prompts: B records up to their prediction times, on the model's device.
        sampling: how futures are drawn.
        generator: random generator on the model's device; the same seed and prompts give the same futures.
        use_cache: whether to cache keys and values; without the cache the whole sequence is computed again for each
            event, with the same results.

    Raises:
        UserError: the model cannot generate, or prompt and future exceed its `max_length`.
    """
    decoder = check_generates(model)
    head = decoder.head
    assert isinstance(head, EventHead)
    n_prompt = int(prompts.is_event.sum(1).max())  # the only number that is read before the futures are under way
    check_lengths(n_prompt, sampling.max_new_events, decoder.body.max_length)
    weight_VD, bias_V = head.token_weights(embedding.table)
    sequences = _Sequences(decoder, embedding, prompts, sampling, use_cache=use_cache)
    stop_tokens = sent(list(sampling.stop_tokens), bias_V.device, torch.int64)
    events: list[tuple[Tensor, ...]] = []
    for number in range(sampling.max_new_events):
        token_R, value_R = _draw_event(
            sequences, head, embedding, (weight_VD, bias_V), sampling, generator, is_first=number == 0
        )
        happens_R = sequences.goes_on_R & (sequences.days_R <= sampling.horizon_days)
        events.append((sequences.future_R, token_R, sequences.days_R, value_R, happens_R))
        sequences.go_on(happens_R & ~torch.isin(token_R, stop_tokens))
        is_last = number + 1 == sampling.max_new_events
        # Counting waits for a GPU.
        if (is_last or reads_freely(bias_V.device) or number % COUNTED_EVERY == 0) and not sequences.drop_ended():
            break
    is_cut = torch.zeros(len(prompts.token_ids) * sampling.n_samples, dtype=torch.bool, device=bias_V.device)
    is_cut[sequences.future_R[sequences.goes_on_R]] = True
    future, token_ids, days, values, happens = (torch.cat(parts) for parts in zip(*events, strict=True))
    kept = happens.nonzero().squeeze(1)
    kept = kept[torch.argsort(future[kept], stable=True)]
    prompt, sample = future[kept] // sampling.n_samples, future[kept] % sampling.n_samples
    return Trajectories(is_cut.view(-1, sampling.n_samples), prompt, sample, token_ids[kept], days[kept], values[kept])


def _draw_event(
    sequences: _Sequences,
    head: EventHead,
    embedding: EventEmbedding,
    weights: tuple[Tensor, Tensor],
    sampling: Sampling,
    generator: torch.Generator,
    *,
    is_first: bool,
) -> tuple[Tensor, Tensor]:
    """Draw the next event of each future, advance by it, and return its token (R,) and value (R,), NaN where the head has none.

    Args:
        weights: weight (V, D) and bias (V,) of the tokens, as `head.token_weights` gives them.
        is_first: whether it is the first event after the prediction time, which is drawn given the silence before that time.
    """
    hidden_RD = sequences.hidden()
    logits_RV = token_logits(hidden_RD, *weights)
    if is_first:
        logits_RV = logits_RV + sequences.log_chance_of_silence()
    token_R = draw_token(logits_RV, sampling, generator)
    time_RQ, value = head.time_and_value(hidden_RD, embedding(token_R))
    gap_R = draw_gap(time_RQ, sequences.wait_R if is_first else None, sampling, generator)
    value_R = draw_value(value, sampling, generator) if value else torch.full_like(gap_R, float("nan"))
    sequences.advance(token_R, gap_R, value_R)
    return token_R, value_R


class _Sequences:
    """Holds the R futures under way: their times, their cache or inputs, and the vector of the last event of each.

    The futures of a prompt follow one another, as many of each prompt. Some may have ended.

    Attributes:
        goes_on_R: (R,) bool, False for a future that has ended.
    """

    def __init__(
        self, decoder: Decoder, embedding: EventEmbedding, prompts: Batch, sampling: Sampling, *, use_cache: bool
    ) -> None:
        self.decoder, self.embedding, self.n_samples = decoder, embedding, sampling.n_samples
        inputs = embedding.inputs(prompts)
        n_prompts = len(prompts.token_ids)
        lengths_B = prompts.is_event.sum(1)
        last_B = lengths_B - 1
        rows = torch.arange(n_prompts, device=last_B.device)
        self.future_R = torch.arange(n_prompts * sampling.n_samples, device=last_B.device)
        self.goes_on_R = torch.ones_like(self.future_R, dtype=torch.bool)
        prompt_R = self.future_R // sampling.n_samples
        self.lengths_R = lengths_B[prompt_R]
        self.elapsed_R = inputs["elapsed_days"][rows, last_B][prompt_R].double()
        self.age_R = inputs["age_days"][rows, last_B][prompt_R].double()
        # Days from the last event of the record to the prediction time.
        self.wait_R = prompts.days[rows, last_B][prompt_R].double()
        self.days_R = -self.wait_R
        self.cache = None
        self.inputs: dict[str, Tensor] = {}
        if use_cache:
            self.cache = decoder.new_cache(sampling.max_new_events)
            self.hidden_RD = decoder.hidden(inputs, self.cache)[rows, last_B][prompt_R]
            self.cache.share(sampling.n_samples)
        else:
            token_ids_BT = prompts.token_ids.long()
            without = ("rows", "row_ids", "places", "sequence_starts")  # wrong once the records have grown
            inputs = {name: x for name, x in inputs.items() if name not in without} | {"token_ids": token_ids_BT}
            room = (0, sampling.max_new_events)
            self.inputs = {name: F.pad(x[prompt_R], room) for name, x in inputs.items()}

    def hidden(self) -> Tensor:
        """Return the vector of each future's last event, (R, D)."""
        if self.cache is not None:
            return self.hidden_RD
        width = int(self.lengths_R.max())
        inputs = {name: x[:, :width] for name, x in self.inputs.items() if name != "token_ids"}
        inputs["embeddings"] = self.embedding(self.inputs["token_ids"][:, :width])
        return self.decoder.hidden(inputs)[torch.arange(len(self.lengths_R)), self.lengths_R - 1]

    def log_chance_of_silence(self) -> Tensor:
        """Return log P(gap > silence until the prediction time | token) for every token as the next event, (R, V).

        All futures of a prompt share these numbers, so they are computed once per prompt.
        """
        first = slice(None, None, self.n_samples)
        head = self.decoder.head
        assert isinstance(head, EventHead)
        found_BV = log_chance_beyond(head, self.hidden()[first], self.embedding.table, self.wait_R[first])
        return found_BV.repeat_interleave(self.n_samples, 0)

    def advance(self, token_R: Tensor, gap_R: Tensor, value_R: Tensor) -> None:
        """Add an event to every future."""
        self.elapsed_R = self.elapsed_R + gap_R
        self.age_R = self.age_R + gap_R
        self.days_R = self.days_R + gap_R
        new = {
            "padding_mask": torch.ones_like(token_R, dtype=torch.bool),
            "gap_days": gap_R.float(),
            "elapsed_days": self.elapsed_R.float(),
            "age_days": self.age_R.float(),
            "values": value_R,
        }
        if self.cache is not None:
            inputs = {name: x[:, None] for name, x in new.items()}
            inputs["embeddings"] = self.embedding(token_R)[:, None]
            self.hidden_RD = self.decoder.hidden(inputs, self.cache)[:, 0]
        else:
            rows = torch.arange(len(token_R), device=token_R.device)
            for name, x in (new | {"token_ids": token_R}).items():
                if name in self.inputs:
                    self.inputs[name][rows, self.lengths_R] = x
        self.lengths_R = self.lengths_R + 1

    def go_on(self, goes_on_R: Tensor) -> None:
        """Set which futures go on."""
        self.goes_on_R = goes_on_R

    def drop_ended(self) -> bool:
        """Drop ended futures, and prompts all of whose futures have ended, if half of the futures can be dropped.

        Each prompt keeps as many futures as the one with the most under way.

        Returns:
            Whether any future goes on.
        """
        n = self.n_samples
        goes_on_Pn = self.goes_on_R.view(-1, n)
        counts = goes_on_Pn.sum(1).tolist()
        kept, n_kept = [number for number, count in enumerate(counts) if count], max(counts)
        if 0 < 2 * len(kept) * n_kept <= len(self.goes_on_R):
            order_Pn = (~goes_on_Pn).to(torch.uint8).argsort(dim=1, stable=True)[:, :n_kept]
            prompts = None if len(kept) == len(counts) else sent(kept, order_Pn.device)
            first_P1 = torch.arange(len(counts), device=order_Pn.device).unsqueeze(1) * n
            rows_Pn = first_P1 + order_Pn
            self._select(prompts, (rows_Pn if prompts is None else rows_Pn[prompts]).flatten())
            self.n_samples = n_kept
        return n_kept > 0

    def _select(self, prompts: Tensor | None, rows: Tensor) -> None:
        for name in ("future_R", "goes_on_R", "lengths_R", "elapsed_R", "age_R", "wait_R", "days_R"):
            setattr(self, name, getattr(self, name)[rows])
        if self.cache is not None:
            self.cache.select(prompts, rows)
            self.hidden_RD = self.hidden_RD[rows]
        self.inputs = {name: x[rows] for name, x in self.inputs.items()}


def draw_token(logits_RV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw token ids (R,) from scores (R, V) by temperature, top k and top p (Holtzman et al. 2020, arXiv:1904.09751).

    >>> draw_token(torch.tensor([[0.0, 3.0, 1.0]]), Sampling(temperature=0), torch.Generator()).tolist()
    [1]
    """
    if sampling.temperature == 0:
        return logits_RV.argmax(-1)
    scores = logits_RV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        kept = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < kept, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = scores.softmax(-1).sort(descending=True)
        # A token is kept as long as the more probable tokens together have not reached top_p; the first is always kept.
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
        scores = scores.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), float("-inf"))
    return draw_index(scores, generator)


def draw_index(scores_RC: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an index (R,) per row with the probabilities that are the softmax of scores (R, C).

    It takes one random number per row, and reads nothing back; `torch.multinomial` takes one per entry and waits for a GPU.

    >>> draw_index(torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(3, 3), torch.Generator()).tolist()
    [1, 1, 1]
    """
    below_RC = scores_RC.softmax(-1).cumsum(-1, dtype=torch.float64)
    total_R1 = below_RC[:, -1:]
    lot_R1 = torch.rand(len(scores_RC), 1, generator=generator, dtype=torch.float64, device=scores_RC.device)
    # Rounded up to the total, the lot would lie beyond every index.
    lot_R1 = torch.minimum(lot_R1 * total_R1, total_R1.nextafter(torch.zeros_like(total_R1)))
    return torch.searchsorted(below_RC, lot_R1, right=True)[:, 0]


def log_chance_beyond(head: EventHead, hidden_BD: Tensor, table_VE: Tensor, wait_B: Tensor) -> Tensor:
    """Return log P(gap > wait | token) of every token, (B, V) float32, computed for a block of tokens at a time.

    The sum of these numbers and the tokens' scores gives the distribution of the token after a silence of `wait_B`
    days, because p(token | gap > wait) is proportional to p(token) P(gap > wait | token).

    Args:
        hidden_BD: hidden states at the last event before the silence.
        table_VE: vectors of the tokens.
        wait_B: length of the silence, in days.
    """
    share_B1Q = log_share_beyond(wait_B)[:, None]
    n_tokens = max(1, logits_at_once(hidden_BD.device) // (len(hidden_BD) * max(hidden_BD.shape[1], N_TIME_BINS)))
    found = []
    for vectors_TE in table_VE.split(n_tokens):
        time_BTQ, _ = head.time_and_value(hidden_BD[:, None], vectors_TE)
        found.append((time_BTQ.log_softmax(-1) + share_B1Q).logsumexp(-1))
    return torch.cat(found, dim=1)


def log_share_beyond(wait_R: Tensor) -> Tensor:
    """Return the log of the share of each time bin that lies beyond a wait in days, (R,) -> (R, N_TIME_BINS) float32.

    The log of a gap is uniform within a bin. The first bin, no gap at all, never lies beyond a wait; the last bin has
    no end, so it always counts as beyond.

    >>> share = log_share_beyond(torch.tensor([0.0, 400.0])).exp()
    >>> share[0, :3].tolist(), bool(0 < share[1, 47] < 1), share[1, -2:].tolist()
    ([0.0, 1.0, 1.0], True, [1.0, 1.0])
    """
    edges = time_edges(wait_R.device).double()
    low_Q, high_Q = edges[:-1], edges[1:]  # of all bins but the first and the last
    beyond_RQ = (high_Q.log() - torch.maximum(low_Q, wait_R[:, None].clamp(min=1e-9)).log()).clamp(min=0)
    share_RQ = F.pad(beyond_RQ / (high_Q / low_Q).log(), (1, 0), value=0.0)
    return F.pad(share_RQ, (0, 1), value=1.0).log().float()


def draw_gap(time_RQ: Tensor, wait_R: Tensor | None, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw the days since the previous event, (R,) float64, from scores of the gap's bins (R, Q).

    The log of a gap is uniform within a bin. With `wait_R`, in days, the gap is longer than the wait, so only the part
    of a bin beyond the wait counts. The last bin has no end; it gives its lower bound, or the least gap beyond the
    wait.

    >>> scores = torch.zeros(1, 64).index_fill(1, torch.tensor([43]), 99)  # 94 to 127 days
    >>> gap = draw_gap(scores, torch.tensor([100.0]), Sampling(temperature=0), torch.Generator())
    >>> 100 < gap.item() < 130
    True
    """
    edges = time_edges(time_RQ.device).double()
    if wait_R is not None:
        time_RQ = time_RQ + log_share_beyond(wait_R)
    if sampling.temperature == 0:
        bin_R, position_R = time_RQ.argmax(-1), torch.full_like(time_RQ[:, 0], 0.5)
    else:
        bin_R = draw_index(time_RQ, generator)
        position_R = torch.rand(len(bin_R), generator=generator, device=time_RQ.device)
    start_R = edges[(bin_R - 1).clamp(min=0)]
    end_R = edges[bin_R.clamp(max=len(edges) - 1)]
    if wait_R is not None:
        start_R = torch.maximum(start_R, wait_R)
    gap_R = start_R * (end_R / start_R).clamp(min=1) ** position_R
    if wait_R is None:
        return torch.where(bin_R > 0, gap_R, 0.0)
    return torch.maximum(gap_R, wait_R + SHORTEST_WAIT_DAYS)


def draw_value(value: ValueDistribution, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw normalised values (R,), NaN = no value."""
    if sampling.temperature == 0:
        drawn_R, is_present = value.mean, value.present > 0
    else:
        noise_R = torch.randn(len(value.mean), generator=generator, device=value.mean.device)
        drawn_R = value.mean + value.log_sd.exp() * noise_R
        chance_R = torch.rand(len(value.mean), generator=generator, device=value.mean.device)
        is_present = chance_R < value.present.sigmoid()
    return drawn_R.masked_fill(~is_present, float("nan"))
