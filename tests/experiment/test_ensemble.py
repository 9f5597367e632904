"""An ensemble is one run: trained by one command, blended on tuning alone, opened and compared like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from omegaconf import OmegaConf

import ehr_embed
from ehr_embed.comparison.compare import compare
from ehr_embed.config.targets import check_stored_node
from ehr_embed.core.errors import UserError
from ehr_embed.core.rereadable import Rereadable
from ehr_embed.experiment.ensemble import member_runs, written_out
from ehr_embed.experiment.run import run
from ehr_embed.explain import explain
from ehr_embed.inference.explainer import Explainer
from ehr_embed.inference.predictor import Predictor
from ehr_embed.models.ensemble import Ensemble, choose_weights, log_probabilities
from ehr_embed.models.gbm import GBM
from ehr_embed.models.mean_pool import MeanPool
from ehr_embed.training.trainer import Trainer
from tests.helpers.configs import composed
from tests.helpers.entry_points import metrics_of

SMALL = (
    "embedder=hashing", "embedder.embedding_dim=16", "data.n_subjects=240", "data.values=continuous", "model=mean_pool",
    "trainer=short", "trainer.epochs=2", "trainer.batch_size=16", "trainer.n_bootstrap=20", "trainer.precision=32-true",
    "trainer.threads=1", "audit=off",
)  # fmt: skip
MEMBERS = (
    "+model@ensemble.members.gbm.model=gbm", "ensemble.members.gbm.model.max_length=512",
    "ensemble.members.gbm.model.min_leaf_samples=5", "+ensemble.members.pooled.seeds=2",
)  # fmt: skip


def config(place: Path, run_dir: str, *overrides: str):
    return composed(*SMALL, f"cache_dir={place / 'cache'}", f"run_dir={place / run_dir}", *overrides)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An ensemble of two seeds and boosted trees, in `whole`, whose folder was moved from `before` afterwards."""
    place = tmp_path_factory.mktemp("ensemble")
    run(config(place, "before", *MEMBERS))
    (place / "before").rename(place / "whole")
    return place


def probabilities(folder: Path, split: str = "held_out") -> np.ndarray:
    return pl.read_parquet(folder / "predictions" / f"{split}.parquet")["predicted_boolean_probability"].to_numpy()


def log_odds(p: np.ndarray) -> np.ndarray:
    return np.log(p) - np.log1p(-p)


def test_one_folder_holds_the_blend_of_the_members_predictions(place):
    whole, names = place / "whole", ["gbm-0", "pooled-0", "pooled-1"]
    assert sorted(path.name for path in (whole / "members").iterdir()) == names
    assert {"config.yaml", "metrics.json", "best_checkpoint.pt", "model_card.md"} <= {p.name for p in whole.iterdir()}
    members = metrics_of(whole)["members"]
    assert [member["run"] for member in members] == [f"members/{name}" for name in names]
    weights = np.array([member["weight"] for member in members])
    assert weights.sum() == pytest.approx(1)
    assert weights[1] == weights[2], "seeds of one recipe"
    for split in ("tuning", "held_out"):
        parts = np.stack([log_odds(probabilities(whole / "members" / name, split)) for name in names])
        np.testing.assert_allclose(log_odds(probabilities(whole, split)), weights @ parts, atol=2e-5)
    for member, name in zip(members, names, strict=True):
        own = metrics_of(whole / "members" / name)["held_out"]["auroc"]["value"]
        found = member["held_out"]["auroc"]
        assert found["difference"] == pytest.approx(metrics_of(whole)["held_out"]["auroc"]["value"] - own)
        assert 0 < found["p"] <= found["p_holm"] <= 1
    assert "## Members" in (whole / "model_card.md").read_text()


def test_it_is_opened_and_compared_like_any_run(place, tmp_path):
    whole = place / "whole"
    root = next((place / "cache").glob("demo-240-*"))
    found = ehr_embed.load(whole).predict_proba(root, labels=next((root / "labels").iterdir()).name)
    np.testing.assert_allclose(found["probability_true"].to_numpy(), probabilities(whole), atol=1e-6)
    pairs = compare([whole, *(whole / "members").iterdir()], tmp_path / "out", reference=whole, n_bootstrap=20)
    assert set(pairs["run"]) == {str(whole)}
    assert pairs["other"].nunique() == 3


def test_weights_are_chosen_without_held_out_or_train(place, tmp_path, monkeypatch):
    seen: list[str] = []
    predict = Trainer.evaluate

    def watched(self, model, embedding, split, *rest):
        seen.append(split)
        return predict(self, model, embedding, split, *rest)

    monkeypatch.setattr(Trainer, "evaluate", watched)
    monkeypatch.setattr(
        "ehr_embed.training.blend.keep_fitted", lambda *_: pytest.fail("stop here") if set(seen) == {"tuning"} else None
    )
    runs = ",".join(str(path) for path in sorted((place / "whole" / "members").iterdir()))
    with pytest.raises(pytest.fail.Exception, match="stop here"):
        run(config(place, "again", f"ensemble.runs=[{runs}]"))


def test_finished_runs_blend_to_the_same_and_a_finished_ensemble_is_left_as_it_is(place, tmp_path):
    runs = ",".join(str(path) for path in sorted((place / "whole" / "members").iterdir()))
    run(config(place, "blended", f"ensemble.runs=[{runs}]"))
    np.testing.assert_array_equal(probabilities(place / "blended"), probabilities(place / "whole"))
    before = (place / "blended" / "best_checkpoint.pt").stat().st_mtime_ns
    run(config(place, "blended", f"ensemble.runs=[{runs}]"))
    assert (place / "blended" / "best_checkpoint.pt").stat().st_mtime_ns == before
    run(config(place, "alike", f"ensemble.runs=[{runs}]", "ensemble.weights=equal"))
    assert [m["weight"] for m in metrics_of(place / "alike")["members"]] == pytest.approx([0.5, 0.25, 0.25])


def test_more_seeds_train_the_new_ones_alone(place):
    shutil.copytree(place / "whole", place / "more")
    old = {path: path.stat().st_mtime_ns for path in (place / "more" / "members").glob("*/best_checkpoint.pt")}
    with pytest.raises(UserError, match="resume=force"):
        run(config(place, "more", *MEMBERS[:-1], "+ensemble.members.pooled.seeds=3"))
    run(config(place, "more", *MEMBERS[:-1], "+ensemble.members.pooled.seeds=3", "resume=force"))
    assert len(metrics_of(place / "more")["members"]) == 4
    assert len(old) == 3
    assert old == {path: path.stat().st_mtime_ns for path in old}


def test_runs_of_other_samples_are_refused(place, tmp_path):
    runs = [str(path) for path in sorted((place / "whole" / "members").iterdir())]
    with pytest.raises(UserError, match=r"samples or labels.*held_out"):
        run(config(place, "other", f"ensemble.runs=[{','.join(runs)}]", "task.label_fraction=0.5"))
    copy = shutil.copytree(runs[1], tmp_path / "copy")
    (copy / "manifest.json").unlink()
    checkpoint = torch.load(copy / "best_checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"embedding_state_dict": {"learned": torch.zeros(1)}}, copy / "best_checkpoint.pt")
    with pytest.raises(UserError, match=r"/copy/\S+ .*Train it with: embedder\.trainable=frozen"):
        run(config(place, "learned", f"ensemble.runs=[{copy}]"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+ensemble.members.a.seed=3"], "key of ensemble.members.a"),
        (["+ensemble.members.a.trainer.learn=1"], r"trainer 'learn'"),
        (["+ensemble.members.a.seeds=1", "+ensemble.members.b.trainer.epochs=-1"], r"epochs"),
        (["+ensemble.members.a.seeds=0"], r"ensemble\.members\.a\.seeds=0"),
        (["ensemble.weights=best"], r"ensemble\.weights 'best': Valid: equal, tuning"),
        (["+ensemble.members.a.seeds=1", "embedder.trainable=residual"], r"embedder\.trainable=frozen"),
        (["+ensemble.members.a.seeds=1", "+model@ensemble.members.b.model=gbm"], r"512, 4096 events"),
        (["+ensemble.members.a.seeds=1", "task=next_event", "model=decoder_small"], r"NextEvent .*Type: task=classification"),
        (["+ensemble.members.a.seeds=1", "+task@pretrain.task=next_event"], "pretrain=null"),
        (["ensemble.runs=[nowhere]"], "nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_blended_is_refused_before_work(overrides, message, tmp_path):
    chosen = [o for o in SMALL if not (o.startswith("model=") and any(x.startswith("model=") for x in overrides))]
    with pytest.raises(UserError, match=message):
        run(composed(*chosen, f"cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}", *overrides))
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert not (tmp_path / "run" / "members").exists()


def test_a_member_is_no_path_out_of_the_folder(tmp_path):
    cfg = composed(*SMALL, f"run_dir={tmp_path / 'run'}")
    cfg.ensemble.members = {"../out": {"seeds": 1}}
    with pytest.raises(UserError, match="letters, digits"):
        run(cfg)


def test_a_stored_configuration_names_models_alone_as_members():
    ensemble, pool = f"{Ensemble.__module__}.Ensemble", f"{MeanPool.__module__}.MeanPool"
    good = {"_target_": ensemble, "max_length": 8, "members": [{"_target_": pool, "max_length": 8}]}
    assert check_stored_node(good, "model") == good
    for evil in ("os.system", "ehr_embed.core.files.write_json", "ehr_embed.tasks.classification.Classification"):
        with pytest.raises(UserError, match=r"_target_=\S+ .*nothing else"):
            check_stored_node(good | {"members": [{"_target_": evil}]}, "model")


def test_few_labels_tell_no_weights():
    """When members predict noise, unequal weights are rare; a member that misleads on many labels loses its weight."""
    rng, n_unequal = np.random.default_rng(0), 0
    for _ in range(50):
        labels = (rng.random(40) < 0.1).astype(np.int64)
        p = np.clip(rng.beta(1, 9, (2, 40)), 1e-3, 1 - 1e-3)
        n_unequal += choose_weights(list(np.log(np.stack([1 - p, p], -1))), labels, [0, 1])[1]
    assert n_unequal < 20
    labels = rng.integers(0, 2, 1000)
    good = np.log(np.where(np.eye(2)[labels] > 0, 0.8, 0.2))
    weights, differ = choose_weights([good, good[:, ::-1]], labels, [0, 1])
    assert differ
    assert weights == pytest.approx([1, 0], abs=1e-3)


def test_inner_members_count_by_their_mean_probability():
    logits = torch.randn(5, 4, 3)
    torch.testing.assert_close(log_probabilities(logits).exp(), logits.double().softmax(-1).mean(1))


def test_a_member_may_type_only_the_keys_in_which_its_trainer_differs(tmp_path):
    """A member may type single keys of an optimizer too, unless it chooses another optimizer."""
    typed = ("+ensemble.members.own.seeds=1", "+ensemble.members.slow.trainer.learning_rate=1e-4",
             "+ensemble.members.slow.trainer.optimizer.betas=[0.5,0.9]")  # fmt: skip
    runs = member_runs(written_out(config(tmp_path, "run", *typed)), tmp_path)
    own, slow = (OmegaConf.to_container(cfg.trainer) for cfg in runs.values())
    assert {key for key in own if own[key] != slow[key]} == {"learning_rate", "optimizer"}
    assert (own.keys(), slow["learning_rate"]) == (slow.keys(), 1e-4)
    assert slow["optimizer"] == own["optimizer"] | {"betas": [0.5, 0.9]}


def test_the_stored_configuration_repeats_the_ensemble(place):
    """Its own members are trained again, in the new folder, and nothing of the first one is read."""
    stored = OmegaConf.load(place / "whole" / "config.yaml")
    stored.run_dir = str(place / "repeated")
    run(stored)
    assert len(list((place / "repeated" / "members").iterdir())) == 3
    np.testing.assert_allclose(probabilities(place / "repeated"), probabilities(place / "whole"), atol=1e-6)


def test_all_members_align_or_none():
    def ensemble(*members) -> Ensemble:
        return Ensemble(embedding_dim=4, num_classes=2, members=list(members), max_length=8)

    trees = GBM(embedding_dim=4, num_classes=2)
    told: list = []
    trees.align = lambda *given: told.append(given)
    read: list = []
    trees.adapt_to_records = lambda batches: read.append(sum(1 for _ in batches))
    for batches in (Rereadable(lambda: iter([{}, {}])), iter([{}, {}])):  # read by each member, or kept for the second
        ensemble(trees, trees).adapt_to_records(batches)
    assert read == [2, 2, 2, 2]
    ensemble(trees, trees).align({"A": ("B", 1.0)}, {"C": "B"})
    assert told == [({"A": ("B", 1.0)}, {"C": "B"})] * 2
    mixed = ensemble(trees, MeanPool(embedding_dim=4, num_classes=2))
    mixed.align(None)
    assert mixed.reads_vectors
    trees.reads_vectors = False
    assert not ensemble(trees).reads_vectors
    with pytest.raises(UserError, match=r"MeanPool, does not align.*data\.aligned_to=none"):
        mixed.align({"A": ("B", 1.0)})


def test_it_is_evaluated_unchanged_and_explained_by_leaving_codes_out(place, tmp_path):
    """Boosting, one of the members, has no gradient, so integrated gradients would leave it out of the explanation."""
    whole = place / "whole"
    trained = [o for o in SMALL if not o.startswith("trainer")]
    evaluated = composed(
        *trained, *MEMBERS, f"cache_dir={place / 'cache'}", f"run_dir={tmp_path / 'evaluated'}", f"init_from={whole}",
        "trainer=evaluate", "trainer.n_bootstrap=0", "trainer.precision=32-true", "trainer.threads=1",
    )  # fmt: skip
    run(evaluated)
    np.testing.assert_allclose(probabilities(tmp_path / "evaluated"), probabilities(whole), atol=1e-6)
    assert not (tmp_path / "evaluated" / "members").exists(), "nothing was trained"
    table, _ = explain(
        composed(f"run={whole}", f"output={tmp_path}", "max_samples=8", "min_samples=1", "threads=1", name="explain")
    )
    assert pl.read_csv(table)["mean_abs_attribution"].max() > 0
    predictor = Predictor(whole)
    root = next((place / "cache").glob("demo-240-*"))
    data = predictor.read(str(root), labels=next((root / "labels").iterdir()).name, split="held_out", lookups=())
    found = Explainer(predictor, target=None, n_steps=16, max_steps=64, tolerance=0.01).attribute(data, 0)
    assert found.score == pytest.approx(log_odds(probabilities(whole))[0], abs=1e-4)
    assert len(found.events) == data.samples.lengths[0]
