"""No training step of any model and task makes the host wait for a GPU.

A step runs on torch's device `meta`, whose tensors have no numbers: whoever reads one there, as `.item()`, `nonzero`, a boolean
index or `.cpu()` do, gets an error. A copy of a host tensor would pass there, and on a GPU it waits unless the memory is
page-locked, so it is refused too. Models and tasks are those of `conf/`; a new one is tried without an edit.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning_fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ehr_embed.config.build_model import build_model
from ehr_embed.config.instantiate import builder
from ehr_embed.core.errors import UserError
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.embedding.prepare import Prepared
from ehr_embed.experiment.inputs import prepare_from
from ehr_embed.models.blocks import Dropout
from ehr_embed.models.protocol import AdaptsToRecords, FitsAtOnce, adapt
from ehr_embed.tasks.next_event import NextEvent
from ehr_embed.tasks.protocol import StepResult, Task, check_causality, run_step
from ehr_embed.tasks.set_up import set_up
from ehr_embed.training.processes import Processes, learns_all
from ehr_embed.training.step_mean import StepMean
from tests.helpers.configs import CONF, composed
from tests.helpers.host_waits import count_nothing
from tests.helpers.small_meds import Event, write_meds

META = torch.device("meta")
SLOW = [pytest.param("text_encoder", marks=pytest.mark.slow)]
"""It loads a pretrained encoder for each task."""
MODELS = sorted({path.stem for path in (CONF / "model").glob("*.yaml")} - {slow.values[0] for slow in SLOW})
TASKS = sorted(path.stem for path in (CONF / "task").glob("*.yaml"))
MAX_LENGTH = 128
GIVEN = (
    (),
    ("task.labels=outcome",),
    ("task.labels=outcome", "task.class_weights=balanced"),
    ("task.labels=[outcome,other]", "task.class_weights=balanced"),
    ("task.labels=[outcome,score]",),
    ("task.labels=score",),
    ("task.windows=packed",),
    ("task.outcomes=auto", "task.auto.min_events=1"),
    ("task.outcomes={fever: {codes: [B]}, end: {codes: [C]}}", "task.times=early"),
    ("task.codes=[C]", "task.labels=outcome"),
)
"""Settings that the tasks need for the dataset below; each task takes all that it does not refuse."""
Case = tuple[str, Task, Prepared]


class NoCopy(TorchDispatchMode):
    """Refuses an operation on tensors of the host and of the device, which copies from memory that is not page-locked."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        is_sent = (kwargs or {}).get("non_blocking", False)
        assert is_sent or len({x.device for x in tensors if x.ndim or x.device == META}) < 2, f"{function} copies"
        return result


class NoNumbers(TorchFunctionMode):
    """Refuses to make a tensor of the device from numbers of the host, which copies them likewise."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function in (torch.tensor, torch.as_tensor, torch.asarray)
        assert not (made and (kwargs or {}).get("device") not in (None, torch.device("cpu"))), f"{function} copies"
        return function(*args, **(kwargs or {}))


def write_data(root: Path) -> Path:
    """Twelve subjects with one to nine codes' events, some with values, and labels of three kinds."""
    splits: dict[str, list[Event]] = {}
    for number, split in enumerate(("train", "tuning", "held_out")):
        splits[split] = []
        for s in range(4):
            subject = 10 * (number + 1) + s
            splits[split] += [(subject, None, f"SEX//{'FM'[s % 2]}", None), (subject, 0.0, "A", float(s))]
            for day in range(1, 2 + 3 * s):
                splits[split] += [(subject, float(day), "ABC"[(s + day) % 3], 1.0 * day if day % 2 else None)]
            splits[split] += [(subject, 20.0, "B", None), (subject, 30.0, "C", None), (subject, 40.0, "A", 2.0)]
    subjects = [10 * (number + 1) + s for number in range(3) for s in range(4)]
    labels: dict[str, list[tuple[int, float, Any]]] = {
        "outcome": [(s, 12.0, s % 2 == 1) for s in subjects],
        "other": [(s, 12.0, s % 4 > 1) for s in subjects],
        "early": [(s, 0.5, s % 2 == 1) for s in subjects],
        "score": [(s, 12.0, s / 7) for s in subjects],
    }
    return write_meds(root, splits, labels=labels)


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    """Every task that trains, set up on a small dataset with each of `GIVEN` that it takes."""
    root, cache = write_data(tmp_path_factory.mktemp("waits") / "data"), tmp_path_factory.mktemp("cache")
    found: list[Case] = []
    prepared = None
    for name in TASKS:
        taken, refusals = [], []
        base = composed(
            "data=meds", f"data.root={root}", "data.min_count=1", "data.values=both", f"cache_dir={cache}",
            "embedder=hashing", f"task={name}",
        )  # fmt: skip
        prepared = prepared or prepare_from(base)[1]
        for given in GIVEN:
            cfg = base.copy()
            try:
                for key, value in (text.split("=", 1) for text in given):
                    OmegaConf.update(cfg, key, yaml.safe_load(value))
                task = builder(cfg)(cfg.task)
                set_up(task, prepared.store, root / "labels", MAX_LENGTH)
            except (UserError, OmegaConfBaseException) as error:  # labels of another kind, or keys that it has not
                refusals.append(f"{given}: {str(error)[:200]}")
                continue
            taken.append((f"{name} {' '.join(given)}", task, prepared))
        assert taken, f"task={name} takes none of GIVEN: {refusals}"
        found += [case for case in taken if case[1].is_trained]
    return found


@cache
def small(name: str) -> DictConfig:
    """The configuration of a model, of one layer where it has layers."""
    cfg = composed("data=meds", "data.root=none", f"model={name}", f"model.max_length={MAX_LENGTH}")
    if "n_layers" in cfg.model:
        cfg.model.n_layers = 1
    return cfg


def built(name: str, task: Task, prepared: Prepared) -> tuple[nn.Module, EventEmbedding] | None:
    """The model for the task, after what comes before training; None where the two are refused together."""
    cfg = small(name)
    sizes: dict[str, Any] = {"embedding_dim": prepared.table.shape[1], "has_values": True} | task.sizes
    embedding = EventEmbedding(prepared.table)
    try:
        torch.manual_seed(0)
        model = build_model(cfg.model, prepared.store.vocabulary, trusted=(), sizes=sizes).train()
        check_causality(task, model)
        if isinstance(model, FitsAtOnce):  # it has no steps
            return model, embedding
        adapt(model, embedding.table, prepared.store.vocabulary)
        train = task.dataset("train")
        if isinstance(model, AdaptsToRecords):
            model.adapt_to_records([embedding.inputs(train[np.arange(len(train))])])
        run_step(task, model, embedding, train[np.arange(len(train))])  # fills what is kept for later steps
    except UserError:
        return None
    return model, embedding


def check_all_learn(model: nn.Module, case: str) -> None:
    """Each parameter has a gradient, without which DDP would have to look for those that have none."""
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"{case}: {without}"


@pytest.mark.parametrize("name", [*MODELS, *SLOW])
def test_no_step_waits_for_the_device(name, cases):
    processes, tried = Processes(Fabric(accelerator="cpu", devices=1)), 0
    for case, task, prepared in cases:
        found = built(name, task, prepared)
        if found is None:
            continue
        tried += 1
        model, embedding = found
        if isinstance(model, FitsAtOnce):
            continue
        dataset = task.dataset("train", np.random.default_rng(0))
        model, embedding = model.to(META), embedding.to(META)
        batch, mean = dataset.on(META)[np.arange(len(dataset))], StepMean(processes, META)
        run_step(task, model, embedding, batch)
        with NoCopy(), NoNumbers():
            for _ in range(2):
                mean.loss(run_step(task, model, embedding, batch)).backward()
            mean.finish(model.parameters(), n_batches=2)
        check_all_learn(model, case)
    assert tried, "no task takes this model"


def test_processes_look_for_parameters_without_a_gradient_where_there_may_be_some(cases, monkeypatch):
    """A task of another package may ask a model of this one for a part of its outputs, and a backbone may use a part of itself."""

    class ScoresOnly(NextEvent):
        def step(self, model, embedding, batch):
            inputs = self.inputs(embedding, batch, self.is_target(batch))
            nll = model(inputs).nll
            return StepResult(nll.sum(), len(nll), nll.detach())

    task, prepared = next((task, prepared) for _, task, prepared in cases if type(task) is NextEvent)
    model, embedding = built("decoder_small", task, prepared) or pytest.fail("refused")
    assert learns_all(model, task)
    own = ScoresOnly()
    own.__dict__.update(task.__dict__)
    run_step(own, model, embedding, task.dataset("train")[np.arange(4)]).loss_sum.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None], "the heads of times and values"
    assert not learns_all(model, own)
    assert not learns_all(nn.Linear(2, 2), task)
    monkeypatch.setattr(model, "learns_all", False, raising=False)
    assert not learns_all(model, task)


@pytest.mark.parametrize("name", ["code_encoder", "code_tab", "decoder_small", "encoder_small", "gru", *SLOW])
def test_steps_that_count_nothing_learn_the_same(name, cases, monkeypatch):
    """Steps on a CPU count what they need; those on a GPU compute with upper bounds, which change neither loss nor gradient."""
    n_tried = 0
    for case, task, prepared in cases:
        if "class_weights" in case or (found := built(name, task, prepared)) is None:
            continue
        model, embedding = found
        for module in model.modules():
            if isinstance(module, Dropout):
                module.n_dropped = 0
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, nn.RNNBase):
                module.dropout = 0.0
        dataset = task.dataset("train", np.random.default_rng(0))
        batch, results = dataset[np.arange(len(dataset))], []
        for counts in (True, False):
            with monkeypatch.context() as patch:
                count_nothing(patch, counts=counts)
                torch.manual_seed(1)
                model.zero_grad()
                step = run_step(task, model, embedding, batch)
                step.loss_sum.backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            results.append((step.loss_sum.detach(), torch.as_tensor(step.count), gradient))
        (loss, count, gradient), (bound_loss, bound_count, bound_gradient) = results
        assert count == bound_count > 0, case
        n_tried += 1
        torch.testing.assert_close(bound_loss, loss, rtol=1e-5, atol=1e-5, msg=case)
        assert bound_gradient.isfinite().all(), case
        assert (bound_gradient - gradient).norm() <= 1e-4 * gradient.norm(), case
    assert n_tried
