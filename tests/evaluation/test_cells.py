"""The bootstrap of many samples: cells of samples give what the samples give, and draws in blocks are draws."""

from __future__ import annotations

import numpy as np
import pytest

from ehr_embed.evaluation import bootstrap, cells, metrics
from ehr_embed.evaluation.bootstrap import Ranking, SubjectBootstrap, draw_counts
from ehr_embed.evaluation.cells import Cells
from ehr_embed.evaluation.metrics import binary_metrics


def data(n: int, prevalence: float, decimals: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    labels = rng.random(n) < prevalence
    return labels, np.round(1 / (1 + np.exp(-(labels - 2 + rng.normal(size=n)))), decimals)


def both(monkeypatch, labels, scores, subjects, *, seed=0, n_bootstrap=20):
    """Replicates sample by sample and by cells, under the same draws."""
    found = []
    for limit in (10**9, 0):
        monkeypatch.setattr(metrics, "MANY_SAMPLES", limit)
        drawn = SubjectBootstrap.of(subjects, n_samples=len(labels), n_bootstrap=n_bootstrap, seed=seed)
        found.append(metrics._binary_replicates(drawn, labels, scores, scores >= 0.3))
    return found


@pytest.mark.parametrize(("n", "prevalence", "decimals"), [(4000, 0.3, 12), (5000, 0.05, 2), (30, 0.5, 1)])
def test_cells_give_the_areas_and_counts_of_the_samples_under_the_same_draws(monkeypatch, n, prevalence, decimals):
    labels, scores = data(n, prevalence, decimals)
    one, other = both(monkeypatch, labels, scores, np.arange(n) // 3)
    for name in ("auroc", "auprc", "f1", "accuracy", "precision", "recall"):
        np.testing.assert_allclose(other[name], one[name], atol=1e-9, err_msg=name)
    for name in metrics.METRICS:
        assert other[name][0] == pytest.approx(one[name][0], abs=1e-12), name


def test_neighbouring_scores_may_be_ties_without_moving_an_area(monkeypatch):
    labels, scores = data(200_000, 0.2)
    one, other = both(monkeypatch, labels, scores, np.arange(len(labels)) // 4, n_bootstrap=5)
    for name in metrics.METRICS:
        np.testing.assert_allclose(other[name], one[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("per_subject", [1, 5])
def test_intervals_are_the_same_within_noise(monkeypatch, per_subject):
    """1,000 replicates know the end of an interval to about a tenth of its half width."""
    labels, scores = data(6000, 0.1)
    results = []
    for limit in (10**9, 0):
        monkeypatch.setattr(metrics, "MANY_SAMPLES", limit)
        ids = np.arange(len(labels)) // per_subject
        results.append(binary_metrics(labels, scores, threshold=0.3, subject_ids=ids, n_bootstrap=1000, split_name="x"))
    for name in metrics.METRICS:
        one, other = results[0][name], results[1][name]
        half = (one["high"] - one["low"]) / 2
        assert other["value"] == pytest.approx(one["value"], abs=1e-12)
        assert other["low"] == pytest.approx(one["low"], abs=0.25 * half), name
        assert other["high"] == pytest.approx(one["high"], abs=0.25 * half), name


def test_draws_in_blocks_are_multinomial(monkeypatch):
    monkeypatch.setattr(bootstrap, "MANY_SUBJECTS", 10)
    monkeypatch.setattr(bootstrap, "_BLOCK", 8)
    rng = np.random.default_rng(0)
    counts = np.array([draw_counts(20, rng) for _ in range(4000)])
    assert (counts.sum(axis=1) == 20).all()
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.08)
    np.testing.assert_allclose(counts.var(axis=0), 0.95, atol=0.12)
    # Cov of two counts is -1/n, within a block and between blocks alike.
    covariance = np.cov(counts.T)
    assert covariance[0, 1:8].mean() == pytest.approx(-0.05, abs=0.02)
    assert covariance[0, 8:].mean() == pytest.approx(-0.05, abs=0.02)


def test_there_are_not_more_cells_than_a_replicate_can_be_short_with():
    labels, scores = data(100_000, 0.5)
    found = Cells.fit(labels, scores, scores >= 0.3)
    assert len(found.size) <= 4 * cells.N_GROUPS + 4
    assert found.size.sum() == len(labels)
    assert isinstance(found.ranking, Ranking)
