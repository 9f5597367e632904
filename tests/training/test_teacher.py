"""Teacher and average: no probability of a model that saw its sample, none of another split read; the average's closed form."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from ehr_embed.core.errors import UserError
from ehr_embed.models.feature_table import FeatureTable
from ehr_embed.models.gbm import GBM
from ehr_embed.models.protocol import FeatureSet
from ehr_embed.run_folder.checkpoints import BEST
from ehr_embed.tasks.classification import Classification
from ehr_embed.training import teacher as teachers
from ehr_embed.training.ema import Ema
from ehr_embed.training.settings import TrainerSettings
from ehr_embed.training.state import Continuation
from ehr_embed.training.teacher import OPTIONS, folds, teacher_model
from tests.helpers.planted import planted, train

__all__ = ["planted"]


def feature_set(x: np.ndarray, y: np.ndarray) -> FeatureSet:
    table = FeatureTable.from_blocks([(np.arange(len(x)), x.astype(np.float32))], len(x))
    return FeatureSet(table, y.astype(np.int64), np.ones(len(y)))


def test_a_fold_is_never_seen_by_the_model_that_speaks_of_it():
    """Labels of a fold turned over leave its own probabilities as they were, and change those of the others."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3))
    y = (x[:, 0] + rng.normal(size=400) > 0).astype(np.int64)
    fold = folds(np.arange(400), 0)
    # All folds together choose the number of trees, so there is one.
    model = GBM(embedding_dim=4, num_classes=2, n_trees=1, learning_rate=1.0, feature_share=1.0)
    before = model.cross_fit(feature_set(x, y), fold, seed=0)
    turned = np.where(fold == 2, 1 - y, y)
    after = model.cross_fit(feature_set(x, turned), fold, seed=0)
    np.testing.assert_array_equal(before[fold == 2], after[fold == 2])
    assert np.abs(before - after)[fold != 2].max() > 0.05
    np.testing.assert_allclose(before.sum(1), 1)
    assert np.corrcoef(before[:, 1], x[:, 0])[0, 1] > 0.6, "and it learns"


def test_trees_end_where_unseen_samples_begin_to_lose():
    """Trees without end fit noise: their probabilities of unseen samples are worse than the prevalence."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 3)), rng.integers(0, 2, 300)
    x[:, 0] += 0.3 * y
    options = {"embedding_dim": 4, "num_classes": 2, "learning_rate": 0.3, "min_leaf_samples": 5}
    found = GBM(**options, n_trees=200).cross_fit(feature_set(x, y), folds(np.arange(300), 0), seed=0)
    loss = -np.log(found[np.arange(300), y]).mean()
    assert loss < np.log(2) + 0.005
    assert found[:, 1].std() == pytest.approx(0.1, abs=0.08), "the signal is still used"
    fixed = GBM(**options, n_trees=200).cross_fit(
        feature_set(x, y), folds(np.arange(300), 0), seed=0, chooses_trees=False
    )
    assert -np.log(fixed[np.arange(300), y]).mean() > np.log(2) + 0.1


def test_samples_of_a_subject_share_a_fold():
    subjects = np.repeat(np.arange(40), 3)
    fold = folds(subjects, 1)
    assert all(len(set(fold[subjects == s])) == 1 for s in range(40))
    assert np.bincount(fold).tolist() == [24] * 5


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(teachers, "OPTIONS", OPTIONS | {"n_trees": 20, "min_leaf_samples": 2})
    splits: list[str] = []
    for_split = teachers.cross_fitted.__globals__

    def cross_fitted(trainer, model, embedding, *, share):
        loader = trainer.loader
        trainer.loader = lambda split, *rest: splits.append(split) or loader(split, *rest)
        try:
            return teachers_cross_fitted(trainer, model, embedding, share=share)
        finally:
            trainer.loader = loader

    teachers_cross_fitted = for_split["cross_fitted"]
    monkeypatch.setattr(teachers, "cross_fitted", cross_fitted)
    return splits


def test_a_run_with_a_teacher_reads_train_alone_for_it_and_keeps_what_it_found(planted, tmp_path, quick, monkeypatch):
    store, _ = planted
    seen = []
    loss = Classification.loss
    monkeypatch.setattr(Classification, "loss", lambda self, x, y: seen.append(y) or loss(self, x, y))
    options = {"epochs": 2}
    model = lambda sizes: teacher_model("gbm", store.vocabulary, sizes)  # noqa: E731
    rows = train(planted, tmp_path / "a", teacher_of=model, cache_dir=str(tmp_path / "cache"), **options)[1]
    assert set(quick) == {"train"}
    training = torch.cat([y for y in seen if y.is_floating_point()])
    assert training.shape == (2 * 60, 2)
    torch.testing.assert_close(training.sum(1), torch.ones(120))
    assert ((training[:, 1] > 0.5).float().mean() - 1 / 3).abs() < 0.02
    assert not set(training[:, 1].tolist()) & {0.0, 1.0}
    assert len(list((tmp_path / "cache" / "teachers").iterdir())) == 1
    monkeypatch.setattr(GBM, "cross_fit", lambda *_, **__: pytest.fail("fitted again"))
    again = train(planted, tmp_path / "b", teacher_of=model, cache_dir=str(tmp_path / "cache"), **options)[1]
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in again]


def test_an_average_is_its_closed_form():
    weight = nn.Parameter(torch.tensor([1.0]))
    ema = Ema([weight], 0.3)
    expected, values = 1.0, [5.0, -2.0, 3.0]
    for step, value in enumerate(values, 1):
        weight.data.fill_(value)
        ema.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert [(1 + t) / (10 + t) < 0.3 for t in (1, 2, 3)] == [True, True, False]
    with ema.in_place():
        assert float(weight.detach()) == pytest.approx(expected)
    assert float(weight.detach()) == 3.0


def test_a_run_predicts_with_the_average_and_keeps_the_weights_that_learn(planted, tmp_path):
    model = train(planted, tmp_path / "a", ema=0.9, keep="last", patience=None)[3]
    saved = torch.load(tmp_path / "a" / BEST, weights_only=True)
    name = "head.classes.weight"
    assert saved["epoch"] == 6
    assert not torch.equal(saved["model_state_dict"][name], saved["learning_state_dict"][name])
    torch.testing.assert_close(model.state_dict()[name], saved["model_state_dict"][name])
    plain = train(planted, tmp_path / "b", keep="last", patience=None)[3]
    (
        torch.testing.assert_close(plain.state_dict()[name], saved["learning_state_dict"][name]),
        "learning is not disturbed",
    )


def test_a_run_that_was_stopped_goes_on_with_its_average(planted, tmp_path):
    options = {"ema": 0.9, "keep": "last", "patience": None, "save_every": 2, "schedule": "cosine"}
    whole = train(planted, tmp_path / "a", **options)[3].state_dict()
    path = tmp_path / "a" / "checkpoint_epoch_2.pt"
    (tmp_path / "b").mkdir()
    shutil.copy(path, tmp_path / "b" / "latest_checkpoint.pt")
    run = Continuation(path, torch.load(path, weights_only=True))
    resumed = train(planted, tmp_path / "b", run=run, **options)[3].state_dict()
    for name, weights in whole.items():
        torch.testing.assert_close(resumed[name], weights, rtol=0, atol=0)


def test_the_last_epoch_is_kept_whatever_tuning_says(planted, tmp_path):
    facts, *_ = train(planted, tmp_path / "run", learning_rate=0.0, min_learning_rate=0.0, patience=None, keep="last")
    assert (facts["epochs"], facts["best_epoch"]) == (6, 6)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"teacher": "oracle"}, r"trainer\.teacher.*gbm"),
        ({"teacher_share": 2}, r"trainer\.teacher_share"),
        ({"ema": 1.0}, r"trainer\.ema"),
        ({"ema": 0.9, "strategy": "fsdp"}, r"trainer\.strategy=ddp"),
        ({"betas": [0.9]}, r"trainer\.betas"),
        ({"keep": "first"}, r"trainer\.keep"),
        ({"keep": "last"}, r"trainer\.patience=null"),
    ],
)
def test_wrong_settings_are_refused(options, key):
    with pytest.raises(UserError, match=key):
        TrainerSettings(**options)
