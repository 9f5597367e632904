"""No training step of any model and task makes the host wait for a GPU.

A step runs on torch's device `meta`, whose tensors have no numbers: whoever reads one there, as `.item()`, `nonzero`, a boolean
index or `.cpu()` do, gets an error. A copy of a host tensor would pass there, and on a GPU it waits unless the memory is
page-locked, so it is refused too. Models and tasks are those of `conf/`; a new one is tried without an edit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ehr_embed.config.build_model import build_model
from ehr_embed.config.instantiate import builder
from ehr_embed.core.errors import UserError
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.embedding.prepare import Prepared
from ehr_embed.experiment.inputs import prepare_from
from ehr_embed.models.protocol import AdaptsToRecords, FitsAtOnce, adapt
from ehr_embed.tasks.protocol import Task, check_causality, run_step
from ehr_embed.tasks.set_up import set_up
from ehr_embed.training.processes import Processes
from ehr_embed.training.step_mean import StepMean
from tests.helpers.configs import CONF, composed
from tests.helpers.small_meds import write_labels, write_tiny

META = torch.device("meta")
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
TASKS = sorted(path.stem for path in (CONF / "task").glob("*.yaml"))
GIVEN = (
    (),
    ("task.labels=outcome",),
    ("task.labels=[outcome,other]",),
    ("task.labels=[outcome,score]",),
    ("task.labels=score",),
    ("task.outcomes=auto", "task.auto.min_events=1"),
    ("task.outcomes={fever: {codes: [B]}, end: {codes: [C]}}",),
    ("task.codes=[C]", "task.labels=outcome"),
)
"""What the tasks need to know of the dataset below; each task takes all that it does not refuse."""
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


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    """Every task that trains, set up on a small dataset with each of `GIVEN` that it takes."""
    root, cache = write_tiny(tmp_path_factory.mktemp("waits") / "tiny"), tmp_path_factory.mktemp("cache")
    subjects = [10 * (number + 1) + s for number in range(3) for s in range(3)]
    write_labels(root / "labels" / "score", [(subject, 2.0, subject / 7) for subject in subjects])
    write_labels(root / "labels" / "other", [(subject, 2.0, subject % 3 > 0) for subject in subjects])
    found: list[Case] = []
    for name in TASKS:
        taken = []
        for given in GIVEN:
            try:
                cfg = composed(
                    "data=meds", f"data.root={root}", "data.min_count=1", "data.values=both", f"cache_dir={cache}",
                    "embedder=hashing", "trainer=short", f"task={name}", *given,
                )  # fmt: skip
                task, prepared = builder(cfg)(cfg.task), prepare_from(cfg)[1]
                set_up(task, prepared.store, root / "labels", 128)
            except Exception as error:  # keys that it has not, labels of another kind
                last = error
                continue
            taken.append((f"{name} {' '.join(given)}", task, prepared))
        assert taken, f"task={name} takes none of GIVEN: {last}"
        found += [case for case in taken if case[1].is_trained]
    return found


def built(name: str, task: Task, prepared: Prepared) -> torch.nn.Module | None:
    """The model for the task; None where the two are refused together."""
    cfg = composed("data=meds", "data.root=none", f"model={name}", "model.max_length=128")
    sizes: dict[str, Any] = {"embedding_dim": prepared.table.shape[1], "has_values": True} | task.sizes
    try:
        model = build_model(cfg.model, prepared.store.vocabulary, trusted=(), sizes=sizes)
        check_causality(task, model)
    except UserError:
        return None
    return model


@pytest.mark.parametrize("name", MODELS)
def test_no_step_waits_for_the_device(name, cases):
    tried = []
    processes = Processes(Fabric(accelerator="cpu", devices=1))
    for case, task, prepared in cases:
        model = built(name, task, prepared)
        if model is None:
            continue
        if isinstance(model, FitsAtOnce):  # it has no steps
            tried.append(case)
            continue
        embedding = EventEmbedding(prepared.table)
        adapt(model, embedding.table, prepared.store.vocabulary)
        dataset = task.dataset("train", np.random.default_rng(0))
        index = np.arange(len(dataset))
        if isinstance(model, AdaptsToRecords):
            model.adapt_to_records([embedding.inputs(task.dataset("train")[np.arange(len(task.dataset("train")))])])
        try:  # the first step fills what is kept for later ones
            run_step(task, model.train(), embedding, dataset[index])
        except UserError:  # together with this task, the model is refused
            continue
        tried.append(case)
        batch = dataset.on(META)[index]
        model, embedding = model.to(META), embedding.to(META)
        mean = StepMean(processes, META)
        run_step(task, model, embedding, batch)
        with NoCopy(), NoNumbers():
            for _ in range(2):
                result = run_step(task, model, embedding, batch)
                mean.loss(result).backward()
            mean.finish(model.parameters(), n_batches=2)
        assert any(p.grad is not None for p in model.parameters()), case
    assert tried
