"""A run's calibration is fitted on tuning alone, kept in its folder, and applied by whoever predicts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import ehr_embed
from ehr_embed.calibration.calibrator import Calibrator
from ehr_embed.calibration.temperature import Temperature
from ehr_embed.core.errors import UserError
from ehr_embed.experiment.run import run
from ehr_embed.reports.finished_run import FinishedRun
from tests.helpers.configs import composed
from tests.helpers.entry_points import metrics_of

SMALL = (
    "embedder=hashing", "embedder.embedding_dim=16", "data.n_subjects=240", "model=mean_pool", "trainer=short", "trainer.epochs=2",
    "trainer.batch_size=16", "trainer.learning_rate=1e-2", "trainer.n_bootstrap=20", "trainer.precision=32-true",
    "trainer.threads=1", "audit=off",
)  # fmt: skip
TEMPERATURE = ("calibration=temperature", "calibration.min_per_class=2")


def config(place: Path, run_dir: str, *overrides: str):
    return composed(*SMALL, f"cache_dir={place / 'cache'}", f"run_dir={place / run_dir}", *overrides)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run without a calibration in `plain`; the same, calibrated after its end, in `calibrated`."""
    place = tmp_path_factory.mktemp("calibration")
    run(config(place, "plain"))
    shutil.copytree(place / "plain", place / "calibrated")
    run(config(place, "calibrated", *TEMPERATURE, "resume=force"))
    return place


def predictions(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    frame = pl.read_parquet(folder / "predictions" / f"{split}.parquet")
    return frame["boolean_value"].to_numpy(), frame["predicted_boolean_probability"].to_numpy()


def rows(p: np.ndarray) -> np.ndarray:
    return np.stack([1 - p, p], axis=1)


def test_a_finished_run_is_calibrated_without_training_it_again(place):
    assert (place / "plain" / "best_checkpoint.pt").read_bytes() == (
        place / "calibrated" / "best_checkpoint.pt"
    ).read_bytes()
    assert not (place / "plain" / "calibration.json").exists()
    assert "calibration" not in metrics_of(place / "plain")


def test_it_is_fitted_on_tuning_alone_and_applied_to_every_split(place):
    y, p = predictions(place / "plain", "tuning")
    expected = Temperature().fit(rows(p), np.eye(2)[y.astype(int)], is_exclusive=True)
    kept = json.loads((place / "calibrated" / "calibration.json").read_text())
    assert kept["parameters"]["temperatures"] == pytest.approx(expected["temperatures"], rel=1e-4)
    assert abs(np.log(kept["parameters"]["temperatures"][0])) > 0.01, "it changes something"
    calibrator = Calibrator(Temperature(), kept["parameters"], is_exclusive=True)
    for split in ("tuning", "held_out"):
        _, raw = predictions(place / "plain", split)
        np.testing.assert_allclose(predictions(place / "calibrated", split)[1], calibrator(rows(raw))[:, 1], atol=1e-9)


def test_metrics_before_and_after_are_told(place):
    plain, metrics = metrics_of(place / "plain"), metrics_of(place / "calibrated")
    found = metrics["calibration"]
    for split in ("tuning", "held_out"):
        for name in ("auroc", "auprc", "brier", "ece", "loss"):
            assert found["before"][split][name] == plain[split][name], "of the model's own probabilities"
        assert metrics[split]["auroc"] == plain[split]["auroc"]
    assert metrics["tuning"]["loss"]["value"] < plain["tuning"]["loss"]["value"]
    card = (place / "calibrated" / "model_card.md").read_text()
    assert f"| brier | {plain['held_out']['brier']['value']:.3f}" in card
    assert "calibration=none" in (place / "plain" / "model_card.md").read_text()
    table = pl.read_csv(place / "calibrated" / "plots" / "decision_curve.csv")
    assert set(table["curve"]) == {"tuning", "held_out", "tuning, before calibration", "held_out, before calibration"}
    assert (place / "calibrated" / "plots" / "decision_curve.png").is_file()
    assert FinishedRun(place / "calibrated").plot_decision() is not None


def test_whoever_predicts_applies_it(place):
    root = next((place / "cache").glob("demo-240-*"))
    labels = next((root / "labels").iterdir()).name
    for name in ("plain", "calibrated"):
        found = ehr_embed.load(place / name).predict_proba(root, labels=labels)
        np.testing.assert_allclose(found["probability_true"], predictions(place / name, "held_out")[1], atol=1e-6)
        np.testing.assert_allclose(found["probability_true"] + found["probability_false"], 1)


def test_an_ensemble_calibrates_its_blend(place):
    runs = f"ensemble.runs=[{place / 'plain'},{place / 'calibrated'}]"
    run(config(place, "blend", runs, "ensemble.weights=equal", *TEMPERATURE))
    # Two members with the same weights: the blend of what the models say is what each says, calibrated once.
    for split in ("tuning", "held_out"):
        np.testing.assert_allclose(
            predictions(place / "blend", split)[1], predictions(place / "calibrated", split)[1], atol=1e-5
        )


def test_another_calibration_needs_resume_force_and_leaves_nothing_of_the_old_one(place, tmp_path):
    shutil.copytree(place / "calibrated", tmp_path / "again")
    again = ["run_dir=" + str(tmp_path / "again"), "resume=force"]
    with pytest.raises(UserError, match=r"calibration\._target_ was .*Temperature.*resume=force"):
        run(config(place, "x", again[0]))
    run(config(place, "x", *again))
    assert not (tmp_path / "again" / "calibration.json").exists()
    np.testing.assert_array_equal(predictions(tmp_path / "again", "held_out"), predictions(place / "plain", "held_out"))
    run(config(place, "x", *again, "calibration=isotonic"))
    assert "too_few" in metrics_of(tmp_path / "again")["calibration"]
    assert "subjects of true" in (tmp_path / "again" / "model_card.md").read_text()


def test_a_missing_or_foreign_calibration_is_refused(place, tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(place / "calibrated", folder)
    path = folder / "calibration.json"
    content = json.loads(path.read_text())
    path.unlink()
    with pytest.raises(UserError, match=r"calibration\.json\b"):
        ehr_embed.load(folder)
    path.write_text(json.dumps(content | {"parameters": {"temperatures": [2.0]}}))
    with pytest.raises(UserError, match=r"calibration\.json.*(changed|bytes)"):
        ehr_embed.load(folder)
    (folder / "manifest.json").unlink()
    assert ehr_embed.load(folder).calibrator.parameters == {"temperatures": [2.0]}
    for change, message in (
        ({"parameters": {"temperatures": ["2"]}}, "parameter temperatures"),
        ({"calibration": {"_target_": "os.system"}}, "_target_=.*nothing else"),
        ({"calibration": {"_target_": "ehr_embed.models.encoder.Encoder"}}, "_target_=.*nothing else"),
        ({"calibration": {"_target_": "ehr_embed.calibration.temperature.Temperature", "_args_": [1]}}, "_args_"),
        ({"calibration": {"_target_": "ehr_embed.calibration.temperature.Temperature", "x": 1}}, "'x'"),
        ({"calibration": 3}, "mapping with _target_"),
        ({"class_names": ["no", "yes"]}, "'no', 'yes'.*false, true"),
        ({"format": 2}, "format 1"),
        ({"more": 2}, "format 1"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=message):
            ehr_embed.load(folder)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"calibration\.json\b.*JSON"):
        ehr_embed.load(folder)


def test_a_task_without_probabilities_is_refused_before_work(place):
    with pytest.raises(UserError, match=r"calibration: Temperature.*NextEvent.*Type: calibration=none"):
        run(config(place, "none", *TEMPERATURE, "task=next_event", "model=decoder_small"))
    assert not (place / "none").exists()
