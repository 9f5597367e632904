"""Calibrations on their own: planted distortions are undone, ranks stay, and numbers from a file are checked."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, softmax
from sklearn.metrics import log_loss, roc_auc_score

from ehr_embed.calibration.calibrator import fit_calibrator
from ehr_embed.calibration.isotonic import Isotonic
from ehr_embed.calibration.none import NoCalibration
from ehr_embed.calibration.platt import Platt
from ehr_embed.calibration.temperature import Temperature
from ehr_embed.core.errors import UserError
from ehr_embed.evaluation.decision_curve import decision_table, net_benefit, net_benefit_of_all

METHODS = (Temperature, Platt, Isotonic)


def planted(n: int, *, slope: float, shift: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, 2) whose log-odds are `slope` times the true ones plus `shift`, and labels (n, 2) of the true ones."""
    rng = np.random.default_rng(seed)
    z = rng.normal(-1, 1.5, n)
    y = (rng.random(n) < expit(z)).astype(int)
    p = expit(slope * z + shift)
    return np.stack([1 - p, p], axis=1), np.eye(2)[y]


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_distortion_is_undone_on_new_samples(method):
    shift = 0.0 if method is Temperature else 1.5
    own, new = (planted(4000, slope=3.0, shift=shift, seed=seed) for seed in (0, 1))
    parameters = method().fit(*own, is_exclusive=True)
    found = method().apply(new[0], parameters, is_exclusive=True)
    truth = np.log(new[0][:, 1] / new[0][:, 0])
    true_p = expit((truth - shift) / 3.0)
    assert np.abs(found[:, 1] - true_p).mean() < 0.02
    assert log_loss(new[1].argmax(1), found) < log_loss(new[1].argmax(1), new[0]) - 0.1
    np.testing.assert_allclose(found.sum(axis=1), 1)
    if method is not Isotonic:
        assert roc_auc_score(new[1][:, 1], found[:, 1]) == roc_auc_score(new[1][:, 1], new[0][:, 1])
    if method is Temperature:
        assert parameters["temperatures"][0] == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_exclusive", [True, False])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_fitted_numbers_go_through_json_and_lower_the_loss_where_they_were_fitted(method, is_exclusive, n_classes):
    rng = np.random.default_rng(n_classes)
    z = rng.normal(0, 1, (600, n_classes))
    if is_exclusive:
        truth, given_p = softmax(z, axis=1), softmax(3 * z + 1, axis=1)
        labels = np.eye(n_classes)[[rng.choice(n_classes, p=row) for row in truth]]
    else:
        truth, given_p = expit(z), expit(3 * z + 1)
        labels = (rng.random(z.shape) < truth).astype(float)
        labels[::7, 0] = np.nan  # unknown
    parameters = method().fit(given_p, labels, is_exclusive=is_exclusive)
    checked = method().check(json.loads(json.dumps(parameters)), n_classes, is_exclusive=is_exclusive)
    found = method().apply(given_p, checked, is_exclusive=is_exclusive)
    assert np.array_equal(found, method().apply(given_p, parameters, is_exclusive=is_exclusive))
    assert found.shape == given_p.shape
    assert ((found > 0) & (found < 1)).all()

    def loss(p):
        return -np.nanmean(labels * np.log(p) + (0 if is_exclusive else (1 - labels) * np.log1p(-p)))

    assert loss(found) < loss(given_p) - 0.01
    assert np.abs(found - truth).mean() < np.abs(given_p - truth).mean()
    if is_exclusive:
        np.testing.assert_allclose(found.sum(axis=1), 1)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40), st.floats(0.05, 20))
def test_a_temperature_keeps_the_order_of_two_classes(values, temperature):
    p = np.array(values)
    found = Temperature().apply(np.stack([1 - p, p], axis=1), {"temperatures": [temperature]}, is_exclusive=True)[:, 1]
    order = np.argsort(p, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    assert np.isfinite(found).all()


def test_certain_probabilities_stay_finite():
    p = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]] * 40)
    labels = np.eye(2)[[1, 0, 1] * 39 + [0, 1, 0]]
    for method in METHODS:
        found = method().apply(p, method().fit(p, labels, is_exclusive=True), is_exclusive=True)
        assert np.isfinite(found).all()
    perfect = np.eye(2)[[1, 0, 1] * 40]
    found = Isotonic().apply(p, Isotonic().fit(p, perfect, is_exclusive=True), is_exclusive=True)
    assert found.min() == pytest.approx(1 / 122), "a step without a positive is no certainty"


def test_few_subjects_of_a_class_are_said_and_nothing_is_fitted(caplog):
    p, labels = planted(400, slope=2)
    classes, subjects = labels.argmax(1), np.arange(400)
    names = ["false", "true"]
    enough = fit_calibrator(Temperature(), p, classes, subjects, names, is_exclusive=True)
    assert enough.calibrator is not None
    assert sum(enough.subjects.values()) == 400
    one = np.where(classes == 1, -1, subjects)  # all positive samples are of one subject
    few = fit_calibrator(Temperature(), p, classes, one, names, is_exclusive=True)
    assert few.calibrator is None
    assert "tuning has 1 subjects of true" in few.too_few
    assert "calibration.min_per_class" in caplog.text
    assert fit_calibrator(NoCalibration(), p, classes, subjects, names, is_exclusive=True).calibrator is None


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (Temperature, {}),
        (Temperature, {"temperatures": [1.0, 2.0]}),
        (Temperature, {"temperatures": [float("nan")]}),
        (Temperature, {"temperatures": [0]}),
        (Temperature, {"temperatures": [10**400]}),
        (Temperature, {"temperatures": [True]}),
        (Platt, {"slopes": [1.0], "shifts": [0.0, 0.0]}),
        (Platt, {"slopes": [-1.0], "shifts": [[0.0, 0.0]]}),
        (Isotonic, {"probabilities": [[0.1, 0.2]], "rates": [[0.2]]}),
        (Isotonic, {"probabilities": [[0.2, 0.1]], "rates": [[0.2, 0.3]]}),
        (Isotonic, {"probabilities": [[0.1]], "rates": [[1.0]]}),
        (Isotonic, {"probabilities": [[]], "rates": [[]]}),
        (Isotonic, {"probabilities": "x", "rates": 3}),
    ],
)
def test_numbers_of_a_foreign_file_are_refused(method, parameters):
    with pytest.raises(UserError, match=r"which train\.py writes"):
        method().check(parameters, 2, is_exclusive=True)


def test_net_benefit_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, 200), rng.random(200).round(2)
    for t, found in zip((0.1, 0.25, 0.9), net_benefit(y, p, np.array([0.1, 0.25, 0.9]), split_name="x"), strict=True):
        acted = p >= t
        expected = ((acted & (y == 1)).sum() - (acted & (y == 0)).sum() * t / (1 - t)) / len(y)
        assert found == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(net_benefit(y, np.ones(200), split_name="x"), net_benefit_of_all(y.mean()))
    table = decision_table({"held_out": (y, p)})
    assert table.columns == ["curve", "threshold", "net_benefit", "net_benefit_of_all", "net_benefit_of_none"]
    assert len(table) == 99
