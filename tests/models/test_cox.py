"""model=cox and model=boosted_hazards: planted coefficients are found, tuning chooses the size, and only times are fitted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.models.boosted_hazards import BoostedHazards
from ehr_embed.models.cox import Cox
from ehr_embed.models.feature_table import FeatureTable
from ehr_embed.models.hazards import hazard_nll
from ehr_embed.models.protocol import FeatureSet
from tests.helpers.hazard_sizes import sizes


def split(seed: int, n: int = 1500) -> FeatureSet:
    """Three features, of which the first raises the hazard of outcome a and lowers that of b; the third is missing at times."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3)).astype(np.float32)
    rate = np.stack([0.1 * np.exp(x[:, 0]), 0.05 * np.exp(-x[:, 0])], axis=1)
    event, censor = rng.exponential(1 / rate), rng.uniform(1, 20, (n, 1))
    days, status = np.minimum(event, censor), event <= censor
    days[:50, 1], status[:50, 1] = np.nan, 3  # not asked for
    x[rng.random(n) < 0.2, 2] = np.nan
    labels = np.concatenate([days, status], axis=1).astype(np.float32)
    return FeatureSet(FeatureTable.from_blocks([(np.arange(n), x)], n), labels, np.ones(n))


def fitted() -> Cox:
    model = Cox(embedding_dim=8, num_classes=12, n_penalties=15)
    model.set_hazards(sizes())
    model.fit(split(0), split(1), score=lambda outputs: 0.0, is_higher_better=False, seed=0)
    return model


def test_planted_coefficients_and_baselines_are_found():
    model = fitted()
    weight = model.fitted["weight"].numpy()
    assert weight[0, 0] == pytest.approx(1, abs=0.15)
    assert weight[1, 0] == pytest.approx(-1, abs=0.15)
    assert abs(weight[:, 1:]).max() < 0.1
    # A standardised feature has mean 0, so the baseline is the rate at x = 0.
    np.testing.assert_allclose(model.fitted["baseline"].exp().numpy(), [[0.1] * 3, [0.05] * 3], rtol=0.25)
    other = Cox(embedding_dim=8, num_classes=12)
    other.set_extra_state(model.get_extra_state())
    assert other.n_fitted() == model.n_fitted() >= 8


def test_the_likelihood_of_new_subjects_is_near_that_of_the_truth():
    model, new = fitted(), split(2)
    x = torch.from_numpy(np.nan_to_num(new.features.dense(slice(None)))).double()
    state = model.fitted
    log_hazard = ((x - state["mean"]) / state["scale"] @ state["weight"].T).unsqueeze(-1) + state["baseline"]
    truth = torch.stack([np.log(0.1) + x[:, 0], np.log(0.05) - x[:, 0]], 1).unsqueeze(-1).expand(-1, 2, 3)
    days, status = torch.from_numpy(new.labels[:, :2]).double(), torch.from_numpy(new.labels[:, 2:]) == 1
    edges = torch.tensor([0.0, 2.0, 5.0], dtype=torch.float64)
    found, best = (float(hazard_nll(own, days, status, edges).sum(1).mean()) for own in (log_hazard, truth))
    assert best < found < best + 0.02


def test_boosted_hazards_come_near_the_truth_where_it_is_not_linear_and_are_restored():
    def bent(seed: int) -> FeatureSet:
        """The hazard is high where the first feature is far from 0, which Cox regression cannot see."""
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(1500, 3)).astype(np.float32)
        rate = np.stack([0.05 * np.exp(2.0 * (np.abs(x[:, 0]) > 1)), np.full(1500, 0.05)], axis=1)
        event, censor = rng.exponential(1 / rate), rng.uniform(1, 20, (1500, 1))
        labels = np.concatenate([np.minimum(event, censor), event <= censor], axis=1).astype(np.float32)
        labels[:50, 1] = np.nan  # not asked for
        return FeatureSet(FeatureTable.from_blocks([(np.arange(1500), x)], 1500), labels, np.ones(1500))

    model = BoostedHazards(embedding_dim=8, num_classes=12, learning_rate=0.1, feature_share=1.0)
    model.set_hazards(sizes())
    model.fit(bent(0), bent(1), score=lambda outputs: 0.0, is_higher_better=False, seed=0)
    x = bent(2).features.dense(slice(None)).astype(np.float64)
    risk = np.stack([own.predict(x, raw_score=True) for own in model.boosters], axis=1)
    far = np.abs(x[:, 0]) > 1
    assert risk[far, 0].mean() - risk[~far, 0].mean() == pytest.approx(2.0, abs=0.3)
    hazard = np.exp(risk[:, 0]) * model.baseline[0].exp().numpy()[:, None]
    assert hazard[:, ~far].mean() == pytest.approx(0.05, rel=0.25), "the offset is part of the fit"
    assert np.abs(risk[:, 1]).max() < 0.5, "nothing is found where nothing is"
    other = BoostedHazards(embedding_dim=8, num_classes=12)
    other.set_extra_state(model.get_extra_state())
    np.testing.assert_array_equal(other.boosters[0].predict(x, raw_score=True), risk[:, 0])
    assert other.n_fitted() == model.n_fitted() > 10
    with pytest.raises(UserError, match="task=time_to_event"):
        BoostedHazards(embedding_dim=8, num_classes=12).fit(
            bent(0), bent(1), score=lambda x: 0.0, is_higher_better=False, seed=0
        )


def test_without_times_it_says_what_to_type():
    with pytest.raises(UserError, match="task=time_to_event"):
        Cox(embedding_dim=8, num_classes=12).fit(
            split(0, 10), split(1, 10), score=lambda x: 0.0, is_higher_better=False, seed=0
        )
    with pytest.raises(UserError, match=r"task\.outcomes"):
        Cox(embedding_dim=8, num_classes=12).set_hazards(sizes(names=[]))
