"""Metrics equal scikit-learn's, intervals are by subject, and undefined numbers are refused instead of reported."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from ehr_embed.core.errors import UserError
from ehr_embed.evaluation import bootstrap, metrics
from ehr_embed.evaluation.bootstrap import SubjectBootstrap, weighted_areas
from ehr_embed.evaluation.metric_entries import intervals_missing
from ehr_embed.evaluation.metrics import (
    METRICS,
    binary_metrics,
    choose_threshold,
    multiclass_metrics,
    multilabel_metrics,
)


def naive_ece(outcomes: np.ndarray, probabilities: np.ndarray) -> float:
    """The definition, one bin at a time."""
    total = 0.0
    for index in range(10):
        upper = probabilities <= 1 if index == 9 else probabilities * 10 < index + 1
        inside = (probabilities * 10 >= index) & upper
        if inside.any():
            total += inside.sum() * abs(probabilities[inside].mean() - outcomes[inside].mean())
    return total / len(outcomes)


def noisy_scores(n: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.random(n)
    return (rng.random(n) < p).astype(int), np.clip(p + 0.3 * rng.normal(size=n), 0, 1).round(2)


@st.composite
def weighted_samples(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of both classes, scores from few values so that ties abound, and weights with zeros."""
    n = draw(st.integers(2, 25))
    labels = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n).filter(lambda y: 0 < sum(y) < len(y)))
    scores = draw(st.lists(st.integers(0, 8).map(lambda i: i / 8), min_size=n, max_size=n))
    weights = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    return np.array(labels), np.array(scores), np.array(weights)


@settings(max_examples=150, deadline=None)
@given(weighted_samples())
def test_areas_equal_sklearn_with_ties_and_weights(sample: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    y, p, w = sample
    auroc, auprc = weighted_areas(y, p, np.stack([np.ones(len(y)), w]))
    assert auroc[0] == pytest.approx(sk.roc_auc_score(y, p))
    assert auprc[0] == pytest.approx(sk.average_precision_score(y, p))
    if w[y == 0].sum() and w[y == 1].sum():
        assert auroc[1] == pytest.approx(sk.roc_auc_score(y, p, sample_weight=w))
        assert auprc[1] == pytest.approx(sk.average_precision_score(y, p, sample_weight=w))
    else:
        assert np.isnan([auroc[1], auprc[1]]).all()


@settings(max_examples=80, deadline=None)
@given(weighted_samples(), st.integers(0, 9).map(lambda i: i / 8))
def test_binary_points_equal_sklearn(sample: tuple[np.ndarray, np.ndarray, np.ndarray], threshold: float) -> None:
    y, p, subjects = sample
    result = binary_metrics(y, p, threshold=threshold, subject_ids=subjects, n_bootstrap=0, split_name="tuning")
    predicted = (p >= threshold).astype(int)
    zero: Any = 0  # sklearn documents a number; its inferred type is str
    expected = {
        "auroc": sk.roc_auc_score(y, p),
        "auprc": sk.average_precision_score(y, p),
        "f1": sk.f1_score(y, predicted, zero_division=zero),
        "accuracy": sk.accuracy_score(y, predicted),
        "precision": sk.precision_score(y, predicted, zero_division=zero),
        "recall": sk.recall_score(y, predicted),
        "brier": sk.brier_score_loss(y, p),
        "ece": naive_ece(y, p),
        "loss": sk.log_loss(y, p),
    }
    assert {name: result[name]["value"] for name in METRICS} == pytest.approx(expected)
    assert all(result[name]["low"] is None and result[name]["high"] is None for name in METRICS)
    assert (result["n"], result["n_subjects"]) == (len(y), len(set(subjects.tolist())))
    assert result["prevalence"] == pytest.approx(y.mean())


def test_replicates_equal_metrics_of_the_redrawn_samples() -> None:
    """Weights are only a fast way to say: take these subjects' rows, some of them several times."""
    y, p = noisy_scores(60)
    subjects = np.random.default_rng(1).integers(0, 15, 60)
    draws = SubjectBootstrap.of(subjects, n_samples=60, n_bootstrap=20, seed=3)
    replicates = metrics._binary_replicates(draws, y.astype(bool), p, p >= 0.5)
    weights = np.concatenate(list(draws.weights()))
    assert weights.shape == (21, draws.n_subjects)
    assert (weights.sum(axis=1) == draws.n_subjects).all()
    for index in range(21):
        rows = np.repeat(np.arange(60), weights[index].astype(int)[draws.subject])
        point = binary_metrics(
            y[rows], p[rows], threshold=0.5, subject_ids=subjects[rows], n_bootstrap=0, split_name="redrawn"
        )
        assert {name: replicates[name][index] for name in METRICS} == pytest.approx(
            {name: point[name]["value"] for name in METRICS}
        )


def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    y, p = noisy_scores(40)
    whole = binary_metrics(y, p, threshold=0.5, subject_ids=np.arange(40) // 2, n_bootstrap=30, split_name="tuning")
    monkeypatch.setattr(bootstrap, "_CHUNK_ENTRIES", 7 * 40)
    assert whole == binary_metrics(
        y, p, threshold=0.5, subject_ids=np.arange(40) // 2, n_bootstrap=30, split_name="tuning"
    )


def width(entry: dict[str, float]) -> float:
    return entry["high"] - entry["low"]


def test_bootstrap_is_by_subject() -> None:
    """Copying every subject's rows nine times adds no information, so the interval must not narrow."""
    y, p = noisy_scores(200)
    ids = np.arange(200)
    once = binary_metrics(y, p, threshold=0.5, subject_ids=ids, split_name="tuning")
    copied_y, copied_p = np.repeat(y, 9), np.repeat(p, 9)
    copied = binary_metrics(copied_y, copied_p, threshold=0.5, subject_ids=np.repeat(ids, 9), split_name="tuning")
    by_sample = binary_metrics(copied_y, copied_p, threshold=0.5, subject_ids=np.arange(1800), split_name="tuning")
    for name in METRICS:
        assert copied[name] == pytest.approx(once[name])
        assert 0 < width(by_sample[name]) < 0.6 * width(copied[name])


def test_interval_covers_the_truth() -> None:
    """P(score of a positive > score of a negative) is Phi(1/sqrt 2) = 0.7602 for unit normals one apart; of 100
    nominal 90% intervals, 80 or more hold it unless coverage is wrong."""
    truth, covered = 0.76025, 0
    rng = np.random.default_rng(0)
    for trial in range(100):
        y = rng.random(150) < 0.4
        p = 1 / (1 + np.exp(-(rng.normal(size=150) + y)))
        result = binary_metrics(
            y, p, threshold=0.5, subject_ids=np.arange(150), n_bootstrap=200, seed=trial, confidence=0.9, split_name="x"
        )
        covered += result["auroc"]["low"] <= truth <= result["auroc"]["high"]
    assert 80 <= covered <= 98


def test_one_class_replicates_are_left_out() -> None:
    """One positive subject among four: a third of the replicates lack it, and must not turn the interval to NaN."""
    result = binary_metrics(
        [0, 0, 0, 1],
        [0.1, 0.2, 0.3, 0.9],
        threshold=0.5,
        subject_ids=[1, 2, 3, 4],
        n_bootstrap=200,
        split_name="tuning",
    )
    assert result["auroc"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert result["recall"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    json.dumps(result, allow_nan=False)


def test_pooled_auroc_is_not_the_mean_over_batches() -> None:
    """Two batches, each perfectly ranked, on different score levels: the batch mean is 1, the truth is 0.75."""
    y, p = np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.8, 0.9])
    by_batch = [sk.roc_auc_score(y[batch], p[batch]) for batch in (slice(0, 2), slice(2, 4))]
    assert np.mean(by_batch) == 1.0
    pooled = binary_metrics(y, p, threshold=0.5, subject_ids=np.arange(4), n_bootstrap=0, split_name="tuning")
    assert pooled["auroc"]["value"] == 0.75


@settings(max_examples=80, deadline=None)
@given(weighted_samples())
def test_threshold_maximises_f1(sample: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    y, p, _ = sample
    threshold = choose_threshold(y, p)
    best = max(sk.f1_score(y, p >= candidate) for candidate in np.unique(p))
    assert sk.f1_score(y, p >= threshold) == pytest.approx(best)


def test_threshold_survives_float32() -> None:
    y, p = noisy_scores(500)
    single = p.astype(np.float32)
    threshold = choose_threshold(y, single)
    result = binary_metrics(y, single, threshold=threshold, subject_ids=y, n_bootstrap=0, split_name="tuning")
    assert result["f1"]["value"] == pytest.approx(sk.f1_score(y, single.astype(np.float64) >= threshold))


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_split_is_refused(label: int) -> None:
    arguments: Any = {"threshold": 0.5, "subject_ids": [1, 2, 3], "split_name": "held_out"}
    counts = "3 negatives and 0 positives" if label == 0 else "0 negatives and 3 positives"
    with pytest.raises(UserError, match=f"'held_out'.*{counts}.*AUROC is undefined.*Add subjects"):
        binary_metrics([label] * 3, [0.1, 0.2, 0.3], **arguments)
    with pytest.raises(UserError, match=r"'tuning'.*Add subjects to this split"):
        choose_threshold([label] * 3, [0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("bad", "message"), [(math.nan, "NaN"), (math.inf, "infinite"), (1.5, "outside"), (-3, "logits")]
)
def test_bad_probabilities_are_refused(bad: float, message: str) -> None:
    with pytest.raises(UserError, match=f"1 of 3 probabilities.*{message}"):
        binary_metrics([0, 1, 1], [0.1, 0.2, bad], threshold=0.5, subject_ids=[1, 2, 3], split_name="tuning")


def test_shapes_labels_and_settings_are_checked() -> None:
    arguments: Any = {"threshold": 0.5, "split_name": "tuning"}
    with pytest.raises(UserError, match=r"\(n,\), got \(2,\) and \(1,\)"):
        binary_metrics([0, 1], [0.1], subject_ids=[1, 2], **arguments)
    with pytest.raises(UserError, match="0 or 1"):
        binary_metrics([0, 2], [0.1, 0.2], subject_ids=[1, 2], **arguments)
    with pytest.raises(UserError, match="one subject_id"):
        binary_metrics([0, 1], [0.1, 0.2], subject_ids=[1], **arguments)
    with pytest.raises(UserError, match="0 negatives and 0 positives"):
        binary_metrics([], [], subject_ids=[], **arguments)
    with pytest.raises(UserError, match="confidence"):
        binary_metrics([0, 1], [0.1, 0.2], subject_ids=[1, 2], confidence=95, **arguments)


def class_scores(n: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(n, n_classes))
    y = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    p = np.exp(1.3 * logits)
    return y, p / p.sum(axis=1, keepdims=True)


def test_multiclass_equals_sklearn() -> None:
    y, p = class_scores(300, 4)
    names = ["home", "ward", "icu", "died"]
    result = multiclass_metrics(
        y, p, class_names=names, subject_ids=np.arange(300) // 2, n_bootstrap=100, split_name="held_out"
    )
    predicted, onehot = p.argmax(axis=1), np.eye(4)[y]
    expected = {
        "auroc": sk.roc_auc_score(y, p, multi_class="ovr", average="macro"),
        "auprc": sk.average_precision_score(onehot, p, average="macro"),
        "f1": sk.f1_score(y, predicted, average="macro"),
        "accuracy": sk.accuracy_score(y, predicted),
        "precision": sk.precision_score(y, predicted, average="macro"),
        "recall": sk.recall_score(y, predicted, average="macro"),
        "brier": ((p - onehot) ** 2).sum(axis=1).mean(),
        "ece": naive_ece(predicted == y, p.max(axis=1)),
        "loss": sk.log_loss(y, p),
    }
    assert {name: result[name]["value"] for name in METRICS} == pytest.approx(expected)
    assert all(result[name]["low"] < result[name]["high"] for name in METRICS)
    assert result["auroc"]["low"] < result["auroc"]["value"] < result["auroc"]["high"]
    assert {name: entry["n"] for name, entry in result["per_class"].items()} == {
        name: int((y == index).sum()) for index, name in enumerate(names)
    }
    assert (result["n"], result["n_subjects"]) == (300, 150)
    json.dumps(result, allow_nan=False)


def test_multiclass_refusals() -> None:
    y, p = class_scores(50, 3)
    arguments: Any = {"class_names": ["a", "b", "c"], "split_name": "tuning", "subject_ids": np.arange(50)}
    with pytest.raises(UserError, match=r"'tuning'.*3 classes.* b\b"):
        multiclass_metrics(np.where(y == 1, 0, y), p, **arguments)
    with pytest.raises(UserError, match=r"sum to 1 .*softmax"):
        multiclass_metrics(y, p / 2, **arguments)
    with pytest.raises(UserError, match=r"integers in 0 \.\.\. 2"):
        multiclass_metrics(y + 1, p, **arguments)
    with pytest.raises(UserError, match=r"\(n, 3\)"):
        multiclass_metrics(y, p[:, :2], **arguments)


def test_multilabel_is_the_mean_of_binary() -> None:
    (y0, p0), (y1, p1) = noisy_scores(120, seed=0), noisy_scores(120, seed=1)
    common: Any = {"subject_ids": np.arange(120) // 3, "n_bootstrap": 50, "split_name": "held_out"}
    result = multilabel_metrics(
        np.stack([y0, y1], 1), np.stack([p0, p1], 1), thresholds=[0.4, 0.6], label_names=["aki", "sepsis"], **common
    )
    alone = [binary_metrics(y0, p0, threshold=0.4, **common), binary_metrics(y1, p1, threshold=0.6, **common)]
    assert result["per_label"] == {"aki": alone[0], "sepsis": alone[1]}
    for name in METRICS:
        assert result[name]["value"] == pytest.approx(np.mean([own[name]["value"] for own in alone]))
        assert width(result[name]) < max(width(own[name]) for own in alone)
    with pytest.raises(UserError, match="'sepsis' hold 120 negatives"):
        multilabel_metrics(
            np.stack([y0, 0 * y1], 1),
            np.stack([p0, p1], 1),
            thresholds=[0.4, 0.6],
            label_names=["aki", "sepsis"],
            **common,
        )


def test_point_only_path_is_cheap() -> None:
    y, p = noisy_scores(200_000)
    start = time.perf_counter()
    binary_metrics(y, p, threshold=0.5, subject_ids=np.arange(200_000), n_bootstrap=0, split_name="tuning")
    assert time.perf_counter() - start < 2  # 0.05 s on an idle core; the slack is for a busy machine


@pytest.mark.parametrize("n_samples", [6, 400])
def test_one_subject_has_no_interval_of_zero_width(n_samples):
    labels, probabilities = np.arange(n_samples) % 2, np.linspace(0.1, 0.9, n_samples)
    result = metrics.binary_metrics(
        labels, probabilities, threshold=0.5, subject_ids=np.zeros(n_samples), n_bootstrap=50, split_name="held_out"
    )
    assert result["n_subjects"] == 1
    assert all((result[name]["low"], result[name]["high"]) == (None, None) for name in metrics.METRICS)
    assert "one subject" in intervals_missing({"held_out": result})[0]
