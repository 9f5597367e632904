"""Trees and logistic regression as members of the model axis: they learn a signal, chance stays chance, and a run loads again."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import ehr_embed
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import read_json
from ehr_embed.experiment.run import run
from ehr_embed.models.gbm import GBM, STOPS
from tests.helpers.refusals import refused
from tests.helpers.small_meds import Event, write_labels, write_meds
from tests.helpers.value_levels import (
    N_SUBJECTS,
    config,
    root,  # noqa: F401 (fixtures)
)

MODELS = ("gbm", "logistic")


def auroc(run_dir: Path) -> float:
    return read_json(run_dir / "metrics.json")["held_out"]["auroc"]["value"]


@pytest.fixture(scope="module")
def runs(root) -> Path:
    for model in MODELS:
        run(config(root, root.parent / model, f"model={model}"))
    return root.parent


@pytest.mark.parametrize("model", MODELS)
def test_a_planted_signal_is_learned_and_the_run_is_whole(runs, model):
    assert auroc(runs / model) > 0.97
    facts = read_json(runs / model / "metrics.json")["train"]
    assert (facts["epochs"], facts["best_epoch"], facts["n"]) == (1, 1, N_SUBJECTS)
    assert facts["n_parameters"] > 1
    assert facts["events_per_s"] > 0
    files = {path.name for path in (runs / model).iterdir()} | {
        path.name for path in (runs / model / "plots").iterdir()
    }
    assert {"best_checkpoint.pt", "latest_checkpoint.pt", "metrics.jsonl", "loss.png", "roc.png"} <= files
    row = pl.read_ndjson(runs / model / "metrics.jsonl").row(0, named=True)
    assert row["tuning/auroc"] == pytest.approx(read_json(runs / model / "metrics.json")["tuning"]["auroc"]["value"]), (
        "what the log says is what the evaluation finds"
    )
    checkpoint = torch.load(runs / model / "best_checkpoint.pt", weights_only=True)
    assert "TEST" in checkpoint["model_state_dict"]["features._extra_state"]["codes"]


@pytest.mark.parametrize("model", MODELS)
def test_shuffled_labels_land_at_chance(root, tmp_path, model):
    run(config(root, tmp_path / "run", f"model={model}", "task.shuffle_labels=1"))
    assert abs(auroc(tmp_path / "run") - 0.5) < 0.17


@pytest.mark.parametrize("model", MODELS)
def test_a_run_loaded_again_predicts_what_it_predicted(runs, root, model):
    """Whatever the batches are, on a dataset with codes it never saw, and after another vocabulary on its own texts."""
    predictor = ehr_embed.load(runs / model)
    expected = pl.read_parquet(runs / model / "predictions" / "held_out.parquet")["predicted_boolean_probability"]
    found = predictor.predict_proba(root, labels="case")["probability_true"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    predictor.run.config["trainer"]["batch_size"] = 7
    by_sevens = predictor.predict_proba(root, labels="case")["probability_true"]
    np.testing.assert_allclose(by_sevens, found, rtol=1e-12)
    texts = predictor.run.vocabulary.texts
    records = [[texts[2], texts[3]], ["Something else", texts[2], texts[3]]]
    known, with_new = predictor.predict_proba(records)[:, 1]
    assert known == with_new, "a code without a column has no effect"
    np.testing.assert_array_equal(predictor.predict_proba(root, labels="case")["probability_true"], by_sevens)
    with pytest.raises(UserError, match=r"(GBM|Logistic) .*Give texts, or the root of a MEDS dataset"):
        predictor.predict_proba(np.zeros((2, 16)))


@pytest.mark.parametrize("model", MODELS)
def test_codes_of_another_dataset_are_matched_by_name(runs, model, tmp_path):
    """Codes that come first in the alphabet would move every column that was matched by number."""
    events: list[Event] = []
    for subject, value in ((1, 8.0), (2, 0.0)):
        events += [(subject, 0.0, "AAA", None), (subject, 1.0, "TEST", value), (subject, 2.0, "ZZZ", 3.0)]
    other = write_meds(tmp_path / "other", {"held_out": events})
    write_labels(other / "labels" / "when", [(1, 3.0, True), (2, 3.0, False)])
    found = ehr_embed.load(runs / model).predict_proba(other, labels="when")["probability_true"]
    assert found[0] > 0.5 > found[1]


@pytest.mark.parametrize("model", MODELS)
def test_a_fitted_run_is_evaluated_again_as_it_was(runs, root, tmp_path, model):
    run(config(root, tmp_path / "run", f"model={model}", "trainer.epochs=0", f"init_from={runs / model}"))
    first, again = (read_json(folder / "metrics.json")["held_out"] for folder in (runs / model, tmp_path / "run"))
    assert first == again


@pytest.mark.parametrize("model", MODELS)
def test_three_classes(root, tmp_path, model):
    run(config(root, tmp_path / "run", f"model={model}", "task.labels=level"))
    assert auroc(tmp_path / "run") > 0.95


@pytest.mark.parametrize("model", MODELS)
def test_class_weights_reach_the_fit(runs, root, tmp_path, model):
    run(config(root, tmp_path / "run", f"model={model}", "task.class_weights=[1,20]"))
    plain, weighted = (
        pl.read_parquet(folder / "predictions" / "held_out.parquet")["predicted_boolean_probability"]
        for folder in (runs / model, tmp_path / "run")
    )
    assert weighted.mean() > plain.mean() + 0.005


@pytest.mark.parametrize("model", MODELS)
def test_bins_alone_carry_the_signal_too(root, tmp_path, model):
    run(config(root, tmp_path / "run", f"model={model}", "data.values=bins"))
    assert auroc(tmp_path / "run") > 0.95
    run(config(root, tmp_path / "blind", f"model={model}", "data.values=none"))
    assert auroc(tmp_path / "blind") < 0.7


@pytest.mark.parametrize("stop_on", STOPS)
def test_few_trees_are_kept_where_none_generalise(root, tmp_path, stop_on):
    options = ["model=gbm", f"model.stop_on={stop_on}", "model.learning_rate=0.2"]
    run(config(root, tmp_path / "signal", *options))
    assert auroc(tmp_path / "signal") > 0.97
    run(config(root, tmp_path / "noise", *options, "task.shuffle_labels=1"))
    checkpoint = torch.load(tmp_path / "noise" / "best_checkpoint.pt", weights_only=True)
    assert checkpoint["model_state_dict"]["_extra_state"].count("Tree=") < 60, "of 1000"


def test_a_seed_repeats_the_trees(root, tmp_path):
    seeds = {"a": 0, "b": 0, "c": 1}
    for name, seed in seeds.items():
        run(config(root, tmp_path / name, "model=gbm", f"seed={seed}", "model.sample_share=0.5"))
    a, b, c = (
        torch.load(tmp_path / n / "best_checkpoint.pt", weights_only=True)["model_state_dict"]["_extra_state"]
        for n in seeds
    )
    assert a == b != c


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.label_smoothing=0.1"], r"label_smoothing=0\.1.*Type: task\.label_smoothing=0"),
        (["trainer.freeze=body"], "GBM .*Type: model=encoder or model=decoder"),
        (["embedder.trainable=residual"], r"embedder\.trainable=residual: GBM .*Type: embedder\.trainable=frozen"),
        (["init_from=RUN"], "GBM .*Type: model=encoder or model=decoder"),
        (["model.feature_share=0"], r"model\.feature_share=0"),
        (["model.n_trees=0"], r"model\.n_trees=0"),
        (["model.stop_on=los"], r"unknown model\.stop_on 'los': did you mean 'loss'"),
    ],
)
def test_what_it_cannot_do_is_refused(runs, root, tmp_path, overrides, message):
    overrides = [override.replace("RUN", str(runs / "gbm")) for override in overrides]
    with pytest.raises(UserError, match=message):
        run(config(root, tmp_path / "run", "model=gbm", *overrides))


@pytest.mark.parametrize("model", MODELS)
def test_tasks_it_cannot_do_are_refused(root, tmp_path, model):
    with pytest.raises(UserError, match=rf"model={model} predicts classes.*Type: model=decoder"):
        run(config(root, tmp_path / "run", f"model={model}", task=["task=next_event"]))
    several = ["task=multilabel", "task.labels=[case,other]"]
    with refused("Multilabel", "task=classification"):
        run(config(root, tmp_path / "run", f"model={model}", task=several))


def test_a_missing_openmp_library_says_what_to_install(monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name == "lightgbm":
                raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "lightgbm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(UserError, match=r"libgomp\.so\.1.*apt-get install libgomp1"):
        GBM(embedding_dim=4, num_classes=2).set_extra_state("tree")
