"""A task of one's own that lacks something, or whose loss is no sum over the samples, is refused before it trains."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from omegaconf import open_dict

from ehr_embed.api import Metric, StepResult
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.experiment.run import run
from ehr_embed.inference.predictor import Predictor
from ehr_embed.tasks.classes_from_records import ClassesFromRecords
from ehr_embed.tasks.set_up import refuse_one_class
from ehr_embed.training.step_check import check_step
from tests.helpers.configs import composed
from tests.helpers.ragged_events import make_events
from tests.helpers.refusals import refused
from tests.helpers.small_meds import write_meds

TASKS = """
import numpy as np
import polars as pl
import torch.nn.functional as F
from ehr_embed.api import BatchDataset, Classification, Metric, SPLITS, StepResult, atomic_path, build_samples

class Number:
    metrics = (Metric("mae", is_higher_better=False),)
    monitor, is_higher_better, is_trained, needs_causal, n_outputs = "mae", False, True, None, 1
    sizes, class_names = {"num_classes": 1}, []
    reduction, width = "sum", 1

    def __init__(self):
        self.samples = {}

    def setup(self, store, labels_dir, max_length):
        self.events = {split: store.split(split) for split in SPLITS}
        for split, events in self.events.items():
            last = np.array([events.times[a:b].max() for a, b in zip(events.offsets, events.offsets[1:])])
            when = pl.DataFrame({"subject_id": events.subject_ids, "prediction_time": last.astype("datetime64[us]")})
            known = (events.subject_ids % 2).astype(np.float32) + 0.5
            self.samples[split] = build_samples(events, when, known[:, None] if self.width else known, max_length=max_length)

    def dataset(self, split, rng=None):
        return BatchDataset(self.events[split], self.samples[split])

    def step(self, model, embedding, batch):
        predicted = model(embedding.inputs(batch)).float()
        loss = F.l1_loss(predicted, batch.labels, reduction=self.reduction)
        return StepResult(loss, len(predicted), predicted.detach().double())

    def fit_thresholds(self, outputs):
        pass

    def evaluate(self, split, outputs, *, n_bootstrap):
        error = np.abs(self.samples[split].labels.reshape(-1) - outputs[:, 0]).mean()
        return {"mae": {"value": float(error), "low": None, "high": None}, "n": len(outputs)}

    def write_predictions(self, path, split, outputs):
        with atomic_path(path) as temporary:
            pl.DataFrame(dict(self.samples[split].meds_keys) | {"p": outputs[:, 0]}).write_parquet(temporary)

    def curves(self, outputs):
        return {}

class Mean(Number):
    reduction = "mean"

class OneDimensional(Number):
    width = 0

class Unfinished:
    metrics, monitor, is_higher_better, is_trained, needs_causal = Number.metrics, "mae", False, True, None
    setup, dataset, step, evaluate, write_predictions = (None,) * 5

class OtherMonitor(Number):
    monitor = "rmse"

class OtherWay(Number):
    is_higher_better = True

class OneClass(Classification):
    def setup(self, store, labels_dir, max_length):
        super().setup(store, labels_dir, max_length)
        self.samples["tuning"].labels[:] = 0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own_tasks")
    subjects = {"train": range(40), "tuning": range(100, 120), "held_out": range(200, 220)}
    splits = {
        split: [(s, float(day), ("GOOD", "BAD")[s % 2], None) for s in own for day in range(3)]
        for split, own in subjects.items()
    }
    labels = [(s, 2.0, s % 2 == 1) for own in subjects.values() for s in own]
    write_meds(folder / "set", splits, labels={"bad": labels})
    (folder / "tasks_of_own.py").write_text(TASKS)
    return folder


@pytest.fixture
def train(place, monkeypatch):
    monkeypatch.syspath_prepend(str(place))

    def train(task: str, *overrides: str) -> Path:
        cfg = composed(
            "data=meds", f"data.root={place / 'set'}", "data.min_count=1", f"cache_dir={place / 'cache'}", "audit=off",
            "embedder=hashing", "embedder.embedding_dim=8", "model=mean_pool", "model.model_dim=8", "model.max_length=16",
            "trainer=short", "trainer.epochs=1", "trainer.n_bootstrap=0", "trusted_packages=[tasks_of_own]",
            f"run_dir={place / task}", *overrides,
        )  # fmt: skip
        with open_dict(cfg):
            cfg.task = {"_target_": f"tasks_of_own.{task}"}
        run(cfg)
        return place / task

    return train


def test_a_whole_task_is_trained_and_says_why_nothing_else_is_predicted(train, caplog):
    caplog.set_level("INFO")
    folder = train("Number")
    assert (folder / "metrics.json").exists()
    train("Number")
    assert "finished already (the settings are the same; whether the code of tasks_of_own has changed" in caplog.text
    with refused("its task Number has no class_names", "probabilities", "predictions/"):
        Predictor(folder, trusted_packages=["tasks_of_own"])


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("Unfinished", ["has no fit_thresholds (which may do nothing), curves (which may return {})"]),
        ("OtherMonitor", ["OtherMonitor.monitor='rmse'", "metrics (mae)"]),
        ("OtherWay", ["OtherWay.is_higher_better=True", "declares is_higher_better=False for mae"]),
        ("OneClass", ["task OneClass, split tuning: only one class", "false: 20, true: 0"]),
        ("Mean", ["Mean.step", "the mean over the batch", 'reduction="sum"']),
        ("OneDimensional", ["outputs of shape (2, 1) and labels of shape (2,)", "labels of shape (n, 1)"]),
    ],
)
def test_what_is_wrong_with_a_task_is_told_before_it_trains(train, place, task, told):
    with refused(*told):
        train(task)
    assert not list((place / task).glob("*.pt"))


def own_task(labels: list[int], *, names: list[str], is_ranking: bool) -> Any:
    metric = Metric("own", is_higher_better=True, is_ranking=is_ranking)
    samples = {"train": SimpleNamespace(labels=np.array(labels))}
    return SimpleNamespace(metrics=(metric,), monitor="own", class_names=names, samples=samples)


def test_only_metrics_that_need_every_class_refuse_a_split_without_one():
    refuse_one_class(own_task([0, 1, -100, -1], names=["no", "yes"], is_ranking=True))
    refuse_one_class(own_task([3, 5, 8], names=["days"], is_ranking=True))
    refuse_one_class(own_task([0, 0, 2], names=["a", "b", "c"], is_ranking=False))
    with refused("split train", "a: 2, b: 0, c: 1"):
        refuse_one_class(own_task([0, 0, 2, -1], names=["a", "b", "c"], is_ranking=True))


@dataclass
class Rows:
    """A batch of one number per row, which is its label, its input and its length."""

    labels: torch.Tensor

    def to(self, device):
        return self


class RowsDataset:
    lengths = np.arange(1, 9)

    def __getitem__(self, index):
        return Rows(torch.as_tensor(self.lengths[index]).float())


def mean(x):
    return x.mean()


def random_mask(x):
    return x[torch.rand(len(x)) < 0.5].sum()


def mean_of_some(x):
    return x.sum() if x[0] > 6 else x.mean()


def fails(x):
    raise ValueError("not of this shape")


@pytest.mark.parametrize(("loss", "is_refused"), [(mean, True), (torch.sum, False), (random_mask, False),
                                                  (mean_of_some, False), (fails, False)])  # fmt: skip
def test_a_loss_is_refused_only_if_all_samples_agree(loss, is_refused):
    class Own:
        def step(self, model, embedding, batch):
            return StepResult(loss(batch.labels), len(batch.labels), batch.labels)

    model: Any = torch.nn.Identity()
    given: Any = (Own(), model, EventEmbedding(torch.zeros(2, 2)), RowsDataset())
    with refused("the mean over the batch") if is_refused else nullcontext():
        check_step(*given)
    assert model.training


def test_labels_of_subjects_of_another_split_are_refused():
    """Else each sample would come once per split that names it."""

    class OfAll(ClassesFromRecords):
        def labels_of(self, events, vocabulary):
            subjects = [0, 7, 14]
            return pl.DataFrame({"subject_id": subjects, "prediction_time": [10] * 3, "value": [True, False, True]})

    events, _ = make_events([(0, [0]), (0, [0])])  # subjects 7 and 0
    store: Any = SimpleNamespace(split=lambda name: events, vocabulary=None)
    with refused("OfAll.labels_of, split train", "1 of 3 rows", "subject 14", "events.subject_ids"):
        OfAll().label_set(store, Path())


def test_a_package_that_python_does_not_find_says_how_it_is_found(place):
    with refused("cannot find absent_lab.tasks.Own", "PYTHONPATH=FOLDER", "absent_lab/"):
        run(
            composed("task._target_=absent_lab.tasks.Own", "trusted_packages=[absent_lab]", f"run_dir={place / 'none'}")
        )
