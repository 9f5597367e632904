"""A model of one's own reads the vectors of events in any of its forms, wherever the package calls it."""

from __future__ import annotations

import math
from pathlib import Path

import polars as pl
import pytest

from ehr_embed.core.errors import UserError
from ehr_embed.experiment.run import run
from ehr_embed.explain import explain
from ehr_embed.inference.predictor import Predictor
from tests.helpers.configs import composed
from tests.helpers.small_meds import write_meds

MODELS = """
import torch.nn.functional as F
from torch import nn
from ehr_embed.api import LogitLinear, event_vectors

class Bag(nn.Module):
    def __init__(self, *, embedding_dim, num_classes=None, vocab_size=None, has_values=False, max_length=16):
        super().__init__()
        self.classes = LogitLinear(embedding_dim, num_classes)

    def forward(self, inputs):
        is_event = inputs["padding_mask"].unsqueeze(-1)
        x = self.vectors(inputs) * is_event
        return self.classes(x.sum(1) / is_event.sum(1).clamp(min=1))

class ByRows(Bag):
    def vectors(self, inputs):
        return F.embedding(inputs["row_ids"], inputs["rows"])

class ByVectors(Bag):
    def vectors(self, inputs):
        return event_vectors(inputs)

class ByName(Bag):
    def vectors(self, inputs):
        return inputs["embeddings"]

class ByPlaces(Bag):
    def vectors(self, inputs):
        inputs["places"]
        return event_vectors(inputs)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    subjects = {"train": range(40), "tuning": range(100, 120), "held_out": range(200, 220)}
    splits = {
        split: [(s, float(day), ("GOOD", "BAD")[s % 2] if day else "VISIT", None) for s in own for day in range(3)]
        for split, own in subjects.items()
    }
    labels = [(s, 2.0, s % 2 == 1) for own in subjects.values() for s in own]
    codes = [(name, f"{name.title()} news", None) for name in ("GOOD", "BAD", "VISIT")]
    write_meds(folder / "set", splits, codes=codes, labels={"bad": labels})
    (folder / "models_of_own.py").write_text(MODELS)
    return folder


def config(place: Path, model: str, *overrides: str):
    return composed(
        "data=meds", f"data.root={place / 'set'}", "data.min_count=1", f"cache_dir={place / 'cache'}", "embedder=hashing",
        "embedder.embedding_dim=8", "model=mean_pool", "~model.model_dim", "~model.dropout", "~model.pooling",
        "~model.whiten", "~model.shrinkage", f"model._target_=models_of_own.{model}", "model.max_length=16", "audit=off",
        "trainer=short", "trainer.epochs=2", "trainer.n_bootstrap=0", "trainer.learning_rate=0.05",
        "trusted_packages=[models_of_own]", f"run_dir={place / model}", *overrides,
    )  # fmt: skip


@pytest.fixture
def models(place, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(place))
    return place


@pytest.mark.parametrize("model", ["ByRows", "ByVectors"])
def test_it_is_checked_trained_and_explained(models, model, tmp_path, capsys):
    assert math.isnan(run(config(models, model, "check=true")))
    assert f"{model}, 18 parameters" in capsys.readouterr().out
    assert run(config(models, model)) == 1.0, "the code of the last events is the label"
    about = (f"run={models / model}", "trusted_packages=[models_of_own]", f"output={tmp_path}")
    table, *_ = explain(composed(*about, "min_samples=1", "task.labels=bad", name="explain"))
    by_text = dict(pl.read_csv(table).select("text", "mean_attribution").iter_rows())
    assert by_text["Good news"] < 0 < by_text["Bad news"]


def test_both_forms_give_the_same_prediction(models):
    scores = []
    for model in ("ByRows", "ByVectors"):
        if not (models / model / "metrics.json").exists():
            run(config(models, model))
        predictor = Predictor(models / model, trusted_packages=["models_of_own"])
        scores.append(predictor.predict_proba(models / "set", labels="bad")["probability_true"].to_list())
    assert scores[0] == scores[1]


@pytest.mark.parametrize("check", ["check=true", "check=false"])
def test_a_name_that_is_not_there_ends_in_what_to_type(models, tmp_path, check):
    with pytest.raises(
        UserError, match=r'ByName reads inputs\["embeddings"\].*ehr_embed\.api\.event_vectors\(inputs\)'
    ):
        run(config(models, "ByName", check, f"run_dir={tmp_path / 'run'}"))
    assert not list(tmp_path.rglob("*.pt"))


def test_so_does_a_name_that_is_not_always_there(models):
    with pytest.raises(UserError, match=r'ByPlaces reads inputs\["places"\].*if "places" in inputs'):
        run(config(models, "ByPlaces", "check=true"))
