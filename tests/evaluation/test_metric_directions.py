"""A metric declares where it is defined whether higher is better, and a search reads this from the task."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf

from ehr_embed.comparison.results import read_rows
from ehr_embed.core.errors import UserError
from ehr_embed.evaluation.metric import Metric
from ehr_embed.search.checks import chosen_directions
from ehr_embed.tasks.classification import Classification
from ehr_embed.tasks.multilabel import Multilabel
from ehr_embed.tasks.next_event import NextEvent
from tests.helpers.configs import composed
from tests.helpers.refusals import refused


class Workload:
    """A task of one's own, with a metric that no list of the package knows."""

    metrics = (Metric("squared_error", is_higher_better=False), Metric("explained", is_higher_better=True))
    monitor = "squared_error"
    is_higher_better = False


class Undeclared:
    """A task written before metrics were declared."""

    monitor = "squared_error"
    is_higher_better = False


def own(kind: type) -> list:
    config = {"task": {"_target_": f"{__name__}.{kind.__name__}"}, "trusted_packages": [__name__.split(".")[0]]}
    return [OmegaConf.create(config)]


@pytest.mark.parametrize("kind", [Workload, Undeclared])
def test_a_task_of_ones_own_is_searched_in_its_own_direction(kind):
    assert chosen_directions(None, [], own(kind)) == ["minimize"]
    assert chosen_directions("minimize", [], own(kind)) == ["minimize"]
    with pytest.raises(UserError, match=r"squared_error is better minimized.*hydra\.sweeper\.direction=minimize"):
        chosen_directions("maximize", [], own(kind))


def test_objectives_have_the_directions_that_the_task_declares():
    names = ["tuning.explained", "tuning.squared_error"]
    assert chosen_directions(None, names, own(Workload)) == ["maximize", "minimize"]
    with pytest.raises(UserError, match=r"tuning\.explained is better maximized.*=\[maximize,minimize\]"):
        chosen_directions(["minimize", "minimize"], names, own(Workload))
    with refused("train.n_parameters", "=[maximize,minimize]"):
        chosen_directions(None, ["tuning.explained", "train.n_parameters"], own(Workload))
    chosen = chosen_directions(["maximize", "minimize"], ["tuning.auroc", "train.n_parameters"], [composed()])
    assert chosen == ["maximize", "minimize"]


@pytest.mark.parametrize("objective", ["held_out.auroc", "held_out.per_class.a.f1"])
def test_an_objective_on_held_out_is_refused(objective):
    with pytest.raises(UserError, match=r"hydra\.sweeper\.objectives=\[tuning\."):
        chosen_directions("maximize", [objective], [composed()])


@pytest.mark.parametrize("monitor", ["held_out.auroc", "held_out/auroc"])
def test_a_monitor_on_held_out_is_refused(monitor):
    with pytest.raises(UserError, match=r"metric on tuning.*Type: task\.monitor=auroc"):
        Classification(monitor=monitor)


def test_a_search_over_tasks_that_disagree_is_refused():
    jobs = [composed(), composed("task=next_event", "model=decoder_small")]
    with pytest.raises(UserError, match=r"auroc \(maximize\) and NextEvent perplexity \(minimize\)"):
        chosen_directions(None, [], jobs)
    assert chosen_directions(None, [], [composed("task.monitor=loss"), jobs[1]]) == ["minimize"]


@pytest.mark.parametrize("kind", [Classification, Multilabel, NextEvent])
def test_every_declared_metric_can_be_monitored(kind):
    for metric in kind.metrics:
        assert kind(monitor=metric.name).is_higher_better == metric.is_higher_better
    with pytest.raises(UserError, match=r"unknown task\.monitor 'accurracy'"):
        kind(monitor="accurracy")


@pytest.mark.parametrize(
    ("monitor", "told", "direction"),
    [
        ("squared_error", {"name": "squared_error", "is_higher_better": False}, "minimize"),
        ("brier", None, "minimize"),  # of a run before metrics.json told it
        ("auroc", None, "maximize"),
    ],
)
def test_runs_are_compared_in_the_direction_that_they_tell(tmp_path, monitor, told, direction):
    metrics = {"tuning": {monitor: {"value": 0.5, "low": None, "high": None}}, "held_out": {}, "train": {}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics | ({"monitor": told} if told else {})))
    (tmp_path / "config.yaml").write_text(f"task: {{monitor: {monitor}}}\n")
    rows, found = read_rows([tmp_path])
    assert (rows[0]["objective"], found) == (0.5, direction)
