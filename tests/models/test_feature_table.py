"""Sparse tables of features: what estimators learn from them is what they learn from dense ones, zero and missing told apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from ehr_embed.core.errors import UserError
from ehr_embed.experiment.run import run
from ehr_embed.models import gbm, linear, logistic
from ehr_embed.models.feature_table import FeatureTable
from ehr_embed.models.gbm import GBM
from ehr_embed.models.linear import LIMIT, standard_cells
from ehr_embed.models.logistic import Logistic
from ehr_embed.models.protocol import FeatureSet
from ehr_embed.training import fit_table
from tests.helpers.value_levels import config, write_levels

NAN = float("nan")
CELLS = st.sampled_from([0.0, NAN, 1.0, -2.5, 7.0])


def features(n: int, *, seed: int = 0) -> np.ndarray:
    """Return counts (mostly 0), values (mostly missing, at times 0, or ties), rare cells and full columns: (n, 16) float32."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.3, (n, 4)) * rng.integers(1, 4, (n, 4))
    values = np.where(rng.random((n, 8)) < 0.2, rng.normal(0, 2, (n, 8)), NAN)
    values[:, :2] = np.where(rng.random((n, 2)) < 0.3, rng.integers(-1, 2, (n, 2)), NAN)
    always = rng.normal(50, 9, (n, 2))
    rare = np.where(rng.random((n, 2)) < 0.02, 1.0, [0.0, NAN])  # too few to split a leaf by
    return np.concatenate([counts, values, rare, always], axis=1).astype(np.float32)


def labels_of(x: np.ndarray, *, n_classes: int = 2) -> np.ndarray:
    """Missing, zero and less than zero are three different things to the label."""
    rng = np.random.default_rng(1)
    score = np.where(np.isnan(x[:, 4]), 0.3, np.where(x[:, 4] == 0, 1.5, -x[:, 4])) + 0.4 * (x[:, 0] == 0)
    score = score + 0.02 * x[:, -1] + np.nan_to_num(x[:, 6]) + rng.normal(0, 0.5, len(x))
    return np.digitize(score, np.quantile(score, np.arange(1, n_classes) / n_classes))


def table_of(x: np.ndarray) -> FeatureTable:
    parts = np.array_split(np.random.default_rng(2).permutation(len(x)), 7)
    return FeatureTable.from_blocks([(rows, x[rows]) for rows in parts], len(x))


def sets(n: int = 3000, *, n_classes: int = 2) -> tuple[np.ndarray, FeatureSet, FeatureSet]:
    x = features(n)
    y = labels_of(x, n_classes=n_classes)
    weights = np.where(y == 0, 1.0, 2.0)
    half = n // 2
    return x, *(FeatureSet(table_of(x[part]), y[part], weights[part]) for part in (slice(half), slice(half, n)))


@given(st.integers(1, 5).flatmap(lambda f: st.lists(st.lists(CELLS, min_size=f, max_size=f), min_size=1, max_size=9)))
def test_a_table_gives_back_what_it_was_given(rows):
    x = np.array(rows, np.float32)
    table = table_of(x)
    np.testing.assert_array_equal(table.dense(slice(None)), x)
    np.testing.assert_array_equal(table.dense([len(x) - 1, 0]), x[[-1, 0]])
    np.testing.assert_array_equal(np.concatenate([table.dense(rows) for rows in table.blocks()]), x)
    medians = [
        np.median(column[~np.isnan(column)]) if (~np.isnan(column)).any() else NAN for column in x.T.astype(float)
    ]
    np.testing.assert_array_equal(table.medians(), medians)


def test_a_table_takes_what_its_filled_cells_take():
    x = features(2000)[:, :12]
    table = table_of(x)
    filled = ((x[:, :4] != 0).sum() + (~np.isnan(x[:, 4:])).sum()).item()
    assert table.cells.nnz == filled < x.size / 3
    assert table.cells.indices.dtype == np.int32


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("stop_on", gbm.STOPS)
def test_trees_are_those_of_the_dense_table(n_classes, stop_on, monkeypatch):
    _, train, tuning = sets(n_classes=n_classes)
    options = {"embedding_dim": 4, "num_classes": n_classes, "n_trees": 40, "learning_rate": 0.2, "stop_on": stop_on}

    def text(of: object) -> str:
        monkeypatch.setattr(gbm, "rows_of", of)
        model = GBM(**options)
        model.fit(train, tuning, score=lambda p: -np.log(p[np.arange(len(p)), tuning.labels]).mean(),
                  is_higher_better=False, seed=3)  # fmt: skip
        return model.get_extra_state()

    sparse = gbm.rows_of
    assert text(sparse) == text(lambda table, _: table.dense(slice(None)))
    assert text(sparse) != text(lambda table, _: table.cells), "an absent cell of a sparse matrix is 0, not missing"


def test_standardised_cells_are_those_of_the_dense_table():
    x, train, _ = sets()
    x = x[: len(train.labels)].astype(np.float64)
    median = np.nanmedian(x, axis=0)
    filled = np.where(np.isnan(x), median, x)
    mean, scale = linear.moments(train.features, median)
    np.testing.assert_allclose(mean, filled.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scale, filled.std(0), rtol=1e-12)
    scale[scale == 0] = 1  # as in `Logistic.fit`
    expected = np.clip((filled - filled.mean(0)) / scale, -LIMIT, LIMIT)
    cells, offset = standard_cells(train.features, train.features.medians(), mean, scale)
    np.testing.assert_allclose(cells.toarray() + offset, expected, atol=1e-12)
    assert cells.nnz < x.size / 2


@pytest.mark.parametrize("n_classes", [2, 3])
def test_coefficients_are_those_of_the_dense_table(n_classes, monkeypatch):
    """The weights agree as nearly as the solver comes to the minimum; there is one minimum."""
    x, train, tuning = sets(n_classes=n_classes)
    model = Logistic(embedding_dim=4, num_classes=n_classes, penalties=(0.01,), max_iterations=5000)
    monkeypatch.setattr(logistic, "LogisticRegression", lambda **o: LogisticRegression(**o, tol=1e-10))
    model.fit(train, tuning, score=lambda p: p.mean(), is_higher_better=True, seed=0)
    fitted = model.fitted
    logits = linear.standardise(torch.from_numpy(x), fitted) @ fitted["weight"].T + fitted["bias"]
    standard = linear.standardise(torch.from_numpy(x), fitted).numpy()
    half = len(train.labels)
    dense = LogisticRegression(C=1 / (0.01 * train.weights.sum()), max_iter=5000, tol=1e-10)
    dense.fit(standard[:half], train.labels, sample_weight=train.weights)
    np.testing.assert_allclose(logits.softmax(-1).numpy(), dense.predict_proba(standard), atol=1e-5)


@pytest.mark.parametrize("model", ["gbm", "logistic"])
def test_a_table_that_does_not_fit_is_refused_with_its_size(tmp_path, monkeypatch, model):
    root = write_levels(tmp_path / "set")
    monkeypatch.setattr(fit_table, "available_memory", lambda: 20_000.0)
    monkeypatch.setattr(fit_table, "feature_set", lambda *_: pytest.fail("work before the refusal"))
    with pytest.raises(UserError, match=r"GiB for 240 samples.*Type: model\.max_codes=\d+, or model\.times=false"):
        run(config(root, tmp_path / "run", f"model={model}"))
