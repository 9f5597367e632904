"""Quantile normalisation: scipy's mid-ranks, whatever the order, the ties and the columns beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, rankdata

from ehr_embed.models.quantiles import LEAST_RANK, MIN_VALUES, N_KNOTS, QuantileNormal

NAN = float("nan")


def fitted(*columns: np.ndarray) -> QuantileNormal:
    normal = QuantileNormal(len(columns))
    number = torch.cat([torch.full((len(x),), i) for i, x in enumerate(columns)])
    order = torch.randperm(len(number), generator=torch.Generator().manual_seed(0))
    normal.fit(number[order], torch.from_numpy(np.concatenate(columns)).float()[order])
    return normal


def scores(x: np.ndarray) -> np.ndarray:
    """scipy's average rank r (from 1) is the mid-rank (r - 1/2) / n."""
    return norm.ppf(np.clip((rankdata(x) - 0.5) / len(x), LEAST_RANK, 1 - LEAST_RANK))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-6, 6), min_size=MIN_VALUES, max_size=60), st.lists(st.floats(-9, 9, width=16), min_size=30)
)
def test_of_train_the_scores_are_those_of_scipys_ranks(tied, other):
    x, y = np.array(tied, np.float32), np.array(other, np.float32)
    normal = fitted(x, y)
    for column, numbers in enumerate((x, y)):
        found = normal(torch.tensor(column), torch.from_numpy(numbers))
        np.testing.assert_allclose(found.numpy(), scores(numbers), atol=2e-5)


def test_many_numbers_are_interpolated_and_a_frequent_one_keeps_its_rank():
    rng = np.random.default_rng(0)
    x = np.where(rng.random(20_000) < 0.3, 0.5, rng.gumbel(size=20_000)).astype(np.float32)
    normal = fitted(x)
    assert len(normal.knots) <= N_KNOTS
    ranks = norm.cdf(normal(torch.tensor(0), torch.from_numpy(x)).numpy())
    assert np.abs(ranks - np.clip((rankdata(x) - 0.5) / len(x), LEAST_RANK, 1 - LEAST_RANK)).max() < 1.5 / N_KNOTS
    frequent = norm.cdf(float(normal(torch.tensor(0), torch.tensor([0.5]))))
    assert frequent == pytest.approx(((x < 0.5).mean() + (x <= 0.5).mean()) / 2, abs=1e-5)


def test_numbers_beyond_train_between_train_and_missing():
    normal = fitted(np.arange(40, dtype=np.float32))
    least = norm.ppf(LEAST_RANK)
    found = normal(torch.tensor(0), torch.tensor([-1e9, 1e9, NAN, 9.5])).tolist()
    assert found == pytest.approx([least, -least, 0, norm.ppf(0.25)], abs=1e-5)


def test_a_column_of_too_few_numbers_becomes_zero():
    normal = fitted(np.arange(MIN_VALUES - 1, dtype=np.float32), np.arange(MIN_VALUES, dtype=np.float32))
    found = normal(torch.tensor([0, 1]), torch.tensor([3.0, 3.0]))
    assert found[0] == 0
    assert found[1] < -0.5


def test_weights_count_a_number_several_times():
    once, often = QuantileNormal(1), QuantileNormal(1)
    x = torch.arange(30.0)
    often.fit(torch.zeros(50, dtype=torch.int64), torch.cat([x, torch.zeros(20)]))
    once.fit(torch.zeros(31, dtype=torch.int64), torch.cat([x, torch.zeros(1)]), torch.tensor([1.0] * 30 + [20.0]))
    torch.testing.assert_close(once(torch.tensor(0), x), often(torch.tensor(0), x))


def test_a_copy_from_the_state_dict_is_the_same():
    normal, copy = fitted(np.arange(40, dtype=np.float32)), QuantileNormal(1)
    copy.load_state_dict(normal.state_dict())
    x = torch.linspace(-3, 45, 50)
    torch.testing.assert_close(copy(torch.tensor(0), x), normal(torch.tensor(0), x))
