"""Paired bootstrap tests: their size, their power, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from ehr_embed.compare import main
from ehr_embed.comparison.compare import paired_tests, print_tests
from ehr_embed.comparison.paired_bootstrap import (
    difference,
    least_p,
    paired_replicates,
    replicates,
    replicates_needed,
)
from ehr_embed.core.errors import UserError
from ehr_embed.evaluation import cells
from ehr_embed.evaluation.predictions import (
    Predictions,
    read_predictions,
    write_multiclass_predictions,
    write_predictions,
)


def binary(scores: np.ndarray, labels: np.ndarray, subjects: np.ndarray | None = None) -> Predictions:
    subjects = np.arange(len(labels)) if subjects is None else subjects
    keys = pl.DataFrame({"subject_id": subjects, "prediction_time": np.arange(len(labels))})
    return Predictions(keys, labels.astype(bool)[:, None], scores[:, None])


def scores_of(labels: np.ndarray, signal: float, rng: np.random.Generator) -> np.ndarray:
    return 1 / (1 + np.exp(-(signal * labels + rng.normal(size=len(labels)))))


def test_the_first_replicate_is_the_data_as_scikit_learn_scores_them():
    rng = np.random.default_rng(0)
    labels = rng.random(200) < 0.3
    scores = scores_of(labels, 1.0, rng)
    found = replicates(binary(scores, labels), n_bootstrap=3)
    assert found["auroc"][0] == pytest.approx(roc_auc_score(labels, scores))
    assert found["auprc"][0] == pytest.approx(average_precision_score(labels, scores))
    assert found["brier"][0] == pytest.approx(brier_score_loss(labels, scores))
    assert all(len(values) == 4 for values in found.values())


def test_a_run_does_not_differ_from_itself():
    rng = np.random.default_rng(0)
    labels = rng.random(100) < 0.5
    values = replicates(binary(scores_of(labels, 1.0, rng), labels), n_bootstrap=50)["auroc"]
    result = difference(values, values)
    assert (result.difference, result.low, result.high, result.p) == (0, 0, 0, 1)


def test_equal_runs_differ_by_chance_and_a_better_one_is_found():
    """Over many pairs of equally good runs, about one in twenty has p below 0.05; a clear gap nearly always has."""
    rng = np.random.default_rng(1)
    below = {0.0: 0, 0.8: 0}
    n_pairs = 60
    for gap in below:
        for _ in range(n_pairs):
            labels = rng.random(300) < 0.4
            runs = [replicates(binary(scores_of(labels, 1.0 + g, rng), labels), n_bootstrap=200) for g in (gap, 0.0)]
            below[gap] += difference(runs[0]["auroc"], runs[1]["auroc"]).p < 0.05
    assert below[0.0] <= 8
    assert below[0.8] >= 50


def test_runs_together_have_the_draws_that_each_has_alone(monkeypatch):
    rng = np.random.default_rng(0)
    labels = rng.random(300) < 0.3
    runs = [binary(scores_of(labels, signal, rng), labels, np.arange(300) // 2) for signal in (0.5, 1.0, 1.5)]
    exact = paired_replicates(runs, n_bootstrap=20)
    for one, run in zip(exact, runs, strict=True):
        for metric, values in replicates(run, n_bootstrap=20).items():
            np.testing.assert_allclose(values, one[metric])
    monkeypatch.setattr(cells, "MANY_SAMPLES", 0)
    for one, other in zip(exact, paired_replicates(runs, n_bootstrap=20), strict=True):
        for metric in one:
            np.testing.assert_allclose(other[metric], one[metric], atol=1e-9)


@pytest.mark.parametrize("n_runs", [2, 8, 20])
def test_an_obvious_difference_is_significant_among_any_number_of_runs(n_runs):
    """The reference is far better than one run and as good as the others."""
    rng = np.random.default_rng(n_runs)
    labels = rng.random(300) < 0.4
    good = scores_of(labels, 3.0, rng)
    runs = {f"run{i}": binary(np.clip(good + 0.002 * rng.normal(size=300), 0, 1), labels) for i in range(n_runs - 1)}
    runs["poor"] = binary(scores_of(labels, 0.3, rng), labels)
    pairs = paired_tests(runs, n_bootstrap=replicates_needed(n_runs - 1))
    assert len(pairs) == 3 * (n_runs - 1)
    assert set(pairs["run"]) == {"run0"}
    auroc = pairs[pairs["metric"] == "auroc"].set_index("other")
    assert auroc.loc["poor", "p_holm"] <= 0.0101
    assert least_p(n_runs - 1, replicates_needed(n_runs - 1)) <= 0.01


def test_equal_runs_are_rarely_told_apart_however_many_there_are():
    """The family-wise error of 8 equally good runs: one of 7 comparisons is below 0.05 in about one family of twenty."""
    rng = np.random.default_rng(5)
    n_families, n_wrong = 60, 0
    for _ in range(n_families):
        labels = np.arange(200) < 80
        runs = [binary(scores_of(labels, 1.0, rng), labels) for _ in range(8)]
        pairs = paired_tests({str(i): run for i, run in enumerate(runs)}, n_bootstrap=399)
        n_wrong += (pairs[pairs["metric"] == "auroc"]["p_holm"] < 0.05).any()
    assert n_wrong <= 8  # P = 0.006 for a rate of 0.05


def test_too_few_draws_are_said_with_the_number_needed(capsys, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.random(100) < 0.4
    runs = {str(i): binary(scores_of(labels, 1.0, rng), labels) for i in range(8)}
    print_tests(paired_tests(runs, n_bootstrap=100), "0", "held_out", tmp_path, 100)
    told = " ".join(capsys.readouterr().out.split())
    assert "7 comparisons with the reference, 100 replicates: the least adjusted p is 0.1386" in told
    assert "--n-bootstrap 1399" in told


def test_one_subject_gives_no_interval_and_no_p(capsys, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.random(50) < 0.4
    runs = {str(i): binary(scores_of(labels, 1.0, rng), labels, np.zeros(50, int)) for i in range(2)}
    pairs = paired_tests(runs, n_bootstrap=100)
    assert pairs[["low", "high", "p", "p_holm"]].isna().all(axis=None)
    print_tests(pairs, "0", "held_out", tmp_path, 100)
    assert "no interval: one subject" in " ".join(capsys.readouterr().out.split())


def test_subjects_move_together():
    """Copies of the same subjects tell nothing new: the interval must not shrink."""
    rng = np.random.default_rng(2)
    labels = rng.random(150) < 0.4
    one, other = scores_of(labels, 1.2, rng), scores_of(labels, 0.8, rng)
    widths = []
    for copies in (1, 5):
        subjects = np.tile(np.arange(150), copies)
        pair = [binary(np.tile(s, copies), np.tile(labels, copies), subjects) for s in (one, other)]
        result = difference(*(replicates(run, n_bootstrap=300)["auroc"] for run in pair))
        widths.append(result.high - result.low)
    assert widths[1] == pytest.approx(widths[0], rel=0.01)


def test_runs_on_other_subjects_or_labels_are_refused():
    labels = np.array([0, 1, 0, 1])
    scores = np.array([0.1, 0.9, 0.2, 0.8])
    one = binary(scores, labels)
    with pytest.raises(UserError, match=r"a and b .*\(4 and 4 .*Compare runs on the same dataset and labels"):
        paired_tests({"a": one, "b": binary(scores, labels, np.arange(1, 5))}, n_bootstrap=5)
    with pytest.raises(UserError, match=r"a and b .*Compare runs on the same labels"):
        paired_tests({"a": one, "b": binary(scores, 1 - labels)}, n_bootstrap=5)


def test_predictions_are_read_whatever_their_order(tmp_path):
    times = np.array(["2020-01-02", "2020-01-01"], dtype="datetime64[us]")
    path = tmp_path / "predictions" / "held_out.parquet"
    path.parent.mkdir()
    write_predictions(
        path, subject_ids=[7, 7], prediction_times=times, labels=[1, 0], probabilities=[0.75, 0.25], threshold=0.5
    )
    read = read_predictions(path)
    assert read.labels[:, 0].tolist() == [False, True]
    assert read.probabilities[:, 0].tolist() == [0.25, 0.75]


def test_several_classes_are_averaged(tmp_path):
    path = tmp_path / "predictions" / "held_out.parquet"
    path.parent.mkdir()
    rng = np.random.default_rng(3)
    labels = rng.integers(3, size=60)
    probabilities = rng.dirichlet([1, 1, 1], size=60)
    write_multiclass_predictions(
        path,
        subject_ids=np.arange(60),
        prediction_times=np.full(60, "2020-01-01", dtype="datetime64[us]"),
        labels=labels,
        probabilities=probabilities,
        class_names=["a", "b", "c"],
    )
    value = replicates(read_predictions(path), n_bootstrap=0)["auroc"][0]
    assert value == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr"), abs=1e-6)


def test_mistakes_on_the_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "found no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "no run has ended here" in capsys.readouterr().err
    assert not list(Path(tmp_path).iterdir())
