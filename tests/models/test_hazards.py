"""Piecewise-exponential hazards: likelihood, incidence, and a head without a parameter per outcome."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ehr_embed.core.errors import UserError
from ehr_embed.models.decoder import Decoder
from ehr_embed.models.gbm import GBM
from ehr_embed.models.hazards import (
    HazardHead,
    cumulative_incidence,
    hazard_nll,
    hazard_sizes,
    outcome_inputs,
    with_hazards,
)
from tests.helpers.hazard_sizes import sizes

EDGES = torch.tensor([0.0, 2.0, 5.0])


def test_one_bin_and_one_outcome_are_the_exponential_model():
    rng = np.random.default_rng(0)
    days = torch.tensor(rng.exponential(10, 200), dtype=torch.float64)
    censor = torch.tensor(rng.exponential(15, 200), dtype=torch.float64)
    is_event, days = days <= censor, torch.minimum(days, censor)
    rate = is_event.sum() / days.sum()  # the maximum of the likelihood in closed form
    log_hazard = rate.log().clone().requires_grad_()
    edges = torch.zeros(1, dtype=torch.float64)
    nll = hazard_nll(log_hazard.expand(200, 1, 1), days[:, None], is_event[:, None], edges).sum()
    assert float(nll.detach()) == pytest.approx(float(is_event.sum() * (1 - rate.log())))
    nll.backward()
    assert abs(float(log_hazard.grad)) < 1e-9


@given(
    st.lists(st.floats(-4, 1), min_size=3, max_size=3),
    st.floats(0.01, 12, allow_nan=False),
    st.booleans(),
)
def test_the_likelihood_equals_an_integral_over_small_steps(log_hazard, days, is_event):
    steps = np.linspace(0, days, 20_001)
    middle = (steps[1:] + steps[:-1]) / 2
    hazard = np.exp(log_hazard)[np.searchsorted([2.0, 5.0], middle, side="left")]
    expected = float((hazard * np.diff(steps)).sum())
    if is_event:
        expected -= log_hazard[int(np.searchsorted([2.0, 5.0], days, side="left"))]
    found = hazard_nll(
        torch.tensor([[log_hazard]], dtype=torch.float64),
        torch.tensor([[days]], dtype=torch.float64),
        torch.tensor([[is_event]]),
        EDGES.double(),
    )
    assert float(found) == pytest.approx(expected, abs=2e-3)


def test_an_outcome_that_is_not_asked_for_has_no_loss_and_no_gradient():
    log_hazard = torch.zeros(1, 2, 3, requires_grad=True)
    nll = hazard_nll(log_hazard, torch.tensor([[float("nan"), 4.0]]), torch.tensor([[False, True]]), EDGES)
    assert nll[0, 0] == 0
    nll.sum().backward()
    assert log_hazard.grad[0, 0].abs().sum() == 0
    assert log_hazard.grad[0, 1].abs().sum() > 0


def test_each_member_has_the_likelihood_of_its_own_hazards():
    log_hazard, edges = torch.randn(4, 3, 2, 3), torch.tensor([0.0, 2.0, 5.0])
    days = torch.tensor([[1.0, 6.0], [3.0, 3.0], [7.0, torch.nan], [2.0, 0.5]])
    is_event = torch.tensor([[True, False], [True, True], [True, False], [False, True]])
    found = hazard_nll(log_hazard, days.unsqueeze(1), is_event.unsqueeze(1), edges)
    alone = [hazard_nll(member, days, is_event, edges) for member in log_hazard.unbind(1)]
    torch.testing.assert_close(found, torch.stack(alone, 1))


@given(st.lists(st.floats(-4, 0), min_size=6, max_size=6), st.floats(0.1, 30))
def test_outcome_rival_and_neither_add_up_to_one(log_hazards, days):
    log_hazard = torch.tensor(log_hazards, dtype=torch.float64).view(2, 3)
    at = torch.tensor([days], dtype=torch.float64)
    found, rival = (
        cumulative_incidence(
            log_hazard.flip(0) if flip else log_hazard, at, EDGES.double(), competing_at=1, competes=[True, False]
        )[0]
        for flip in (False, True)
    )
    neither = 1 - cumulative_incidence(log_hazard.exp().sum(0, keepdim=True).log(), at, EDGES.double())[0]
    assert float(found + rival + neither) == pytest.approx(1)


def test_no_parameter_belongs_to_an_outcome_and_each_outcome_stands_alone():
    torch.manual_seed(0)
    head = HazardHead(sizes(), embedding_dim=8)
    more = HazardHead(sizes(names=["a"], tokens=[[2]], log_rates=[[-3.0] * 3]), embedding_dim=8)
    assert {n: p.shape for n, p in head.named_parameters()} == {n: p.shape for n, p in more.named_parameters()}
    nn.init.normal_(head.shift.weight)
    table, query = torch.randn(6, 8), torch.randn(5, 12)
    rates = torch.tensor([[-3.0] * 3, [-4.0] * 3])
    both = head(query, outcome_inputs(table, [[2], [3, 4]], rates))
    swapped = head(query, outcome_inputs(table, [[4, 3], [2]], rates.flip(0)))
    torch.testing.assert_close(both, swapped.flip(1))
    assert not torch.allclose(both[:, 0] + 3, both[:, 1] + 4)  # outcomes differ by more than their rates
    # The size of a set counts beside the mean of its vectors.
    table[3] = table[2]
    one, two = head(query, outcome_inputs(table, [[2], [2, 3]], rates[:1].expand(2, 3))).unbind(1)
    assert not torch.allclose(one, two)


def test_a_head_starts_at_the_observed_rates():
    head = HazardHead(sizes(), embedding_dim=8)
    rates = torch.tensor([[-3.0] * 3, [-14.0] * 3])
    found = head(torch.zeros(2, 12), outcome_inputs(torch.randn(6, 8), [[2], [3]], rates))
    torch.testing.assert_close(found, rates.expand(2, 2, 3))


def decoder() -> nn.Module:
    torch.manual_seed(0)
    own = sizes()
    model = Decoder(embedding_dim=8, num_classes=own.num_classes, model_dim=16, n_heads=2, n_layers=2, dropout=0.0)
    return with_hazards(model, own, embedding_dim=8).eval()


def test_a_model_keeps_its_name_its_parts_and_its_protocols():
    plain, model = Decoder(embedding_dim=8, num_classes=12, model_dim=16, n_heads=2, n_layers=2), decoder()
    assert type(model).__name__ == "Decoder"
    assert isinstance(model, Decoder)
    assert model.is_causal
    assert {name for name in model.state_dict() if not name.startswith("hazards.")} == set(plain.state_dict())
    assert hazard_sizes(model).names == ["a", "b"]
    assert hazard_sizes(plain) is None


def test_asking_at_every_event_equals_asking_each_prefix():
    model, T = decoder(), 6
    vectors, table = torch.randn(1, T, 8), torch.randn(6, 8)
    days = torch.arange(T, dtype=torch.float32)[None]
    asked = outcome_inputs(table, [[2], [3, 4]], torch.full((2, 3), -3.0))

    def inputs(n: int) -> dict[str, torch.Tensor]:
        return {
            "embeddings": vectors[:, :n],
            "padding_mask": torch.ones(1, n, dtype=torch.bool),
            "gap_days": torch.ones(1, n),
            "elapsed_days": days[:, :n],
        } | asked

    with torch.no_grad():
        everywhere = model(inputs(T) | {"asked_at": torch.arange(T)})
        for n in range(1, T + 1):
            torch.testing.assert_close(everywhere[n - 1 : n], model(inputs(n)), rtol=1e-4, atol=1e-5)


def test_a_model_of_classes_and_a_learned_vector_without_outcomes_are_refused():
    with pytest.raises(UserError, match="model=cox"):
        with_hazards(GBM(embedding_dim=8, num_classes=12), sizes(), embedding_dim=8)
    with pytest.raises(UserError, match=r"task\.outcome_vectors=text"):
        HazardHead(sizes(vectors="learned", names=[], tokens=[], log_rates=[]), embedding_dim=8)


def test_planted_hazards_are_found():
    """Two outcomes whose log hazards depend on a subject's x and differ by bin: the likelihood falls to that of the truth."""
    rng = torch.Generator().manual_seed(0)
    n, edges, cut = 6000, torch.tensor([0.0, 2.0]), 12.0
    x = torch.randn(n, 1, generator=rng)
    truth = torch.stack([torch.cat([-2 + x, -3 + x], 1), torch.cat([-3 - 0.5 * x, -2 + 0 * x], 1)], 1)  # (n, 2, 2)
    target = -torch.rand(n, 2, generator=rng).log()  # the cumulative hazard at the event
    first = truth[..., 0].exp() * 2
    days = torch.where(target < first, target / truth[..., 0].exp(), 2 + (target - first) / truth[..., 1].exp())
    is_event, days = days < cut, days.clamp(max=cut)
    own = sizes(edges=[0.0, 2.0], width=4, log_rates=[[-2.5] * 2, [-2.5] * 2], bin_log_ratios=[0.0, 0.0])
    torch.manual_seed(0)
    query, head = nn.Linear(1, own.num_classes), HazardHead(own, embedding_dim=8)
    asked = outcome_inputs(torch.randn(6, 8, generator=rng), own.tokens, torch.tensor(own.log_rates))
    optimizer = torch.optim.Adam([*query.parameters(), *head.parameters()], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        nll = hazard_nll(head(query(x), asked), days, is_event, edges).mean()
        nll.backward()
        optimizer.step()
    nll, of_truth = nll.detach(), hazard_nll(truth, days, is_event, edges).mean()
    of_rates = hazard_nll(torch.full_like(truth, -2.5), days, is_event, edges).mean()
    assert abs(float(nll - of_truth)) < 0.01
    assert float(of_rates - of_truth) > 0.1
    assert (head(query(x), asked) - truth).abs().mean() < 0.2
