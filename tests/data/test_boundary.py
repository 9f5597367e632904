"""No sample reaches past its prediction time, however it was built and whoever reads it."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ehr_embed
from ehr_embed.core.errors import UserError
from ehr_embed.data.batches import BatchDataset
from ehr_embed.data.boundary import check_boundary
from ehr_embed.data.checked import checked_dataset
from ehr_embed.data.samples import Samples, build_samples, packed_samples, window_samples
from ehr_embed.data.store import STATIC_TIME, SplitEvents
from ehr_embed.experiment.inputs import embed
from ehr_embed.experiment.run import run
from ehr_embed.explain import explain
from ehr_embed.generate import generate_trajectories
from ehr_embed.predict import predict
from tests.helpers.configs import composed
from tests.helpers.ragged_events import label_frame, make_events, subjects
from tests.helpers.refusals import refused
from tests.helpers.small_meds import ROOT, Event, write_meds

LEAKING = """
from dataclasses import replace
import numpy as np
from ehr_embed.data.batches import BatchDataset
from ehr_embed.tasks.classification import Classification
from ehr_embed.tasks.next_event import NextEvent

def extended(events, samples):
    end = events.offsets[np.searchsorted(events.offsets, samples.static_start, side="right")]
    return replace(samples, stop=np.minimum(samples.stop + 2, end))

class InSetup(Classification):
    def setup(self, store, labels_dir, max_length):
        super().setup(store, labels_dir, max_length)
        self.samples = {split: extended(store.split(split), samples) for split, samples in self.samples.items()}

class InDataset(Classification):
    def dataset(self, split, rng=None):
        held = super().dataset(split, rng)
        return type(held)(held.events, extended(held.events, held.samples))

class OwnConstructor(BatchDataset):
    def __init__(self, events, samples):
        self.events, self.samples = events, samples

class OwnClass:
    def __init__(self, held):
        self.held, self.events, self.lengths = held, held.events, held.lengths
    def on(self, device):
        return self
    def __len__(self):
        return len(self.held)
    def __getitem__(self, index):
        return self.held[index]

class InSubclass(Classification):
    def dataset(self, split, rng=None):
        held = super().dataset(split, rng)
        return OwnConstructor(held.events, extended(held.events, held.samples))

class InPlace(Classification):
    def dataset(self, split, rng=None):
        held = super().dataset(split, rng)
        held.samples = extended(held.events, held.samples)
        return held

class InBatches(Classification):
    def dataset(self, split, rng=None):
        held = super().dataset(split, rng)
        return OwnClass(OwnConstructor(held.events, extended(held.events, held.samples)))

class Honest(Classification):
    def dataset(self, split, rng=None):
        return OwnClass(super().dataset(split, rng))

class NoDataset(Classification):
    def dataset(self, split, rng=None):
        return [self.samples[split]]

class Pretraining(NextEvent):
    def setup(self, store, labels_dir, max_length):
        super().setup(store, labels_dir, 4)
        self.samples = {split: extended(store.split(split), samples) for split, samples in self.samples.items()}
"""
N_TRAIN, N_LATE = 300, 284


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the dataset `set`, of whose 300 subjects in train 284 have events after the prediction time, and tasks of
    one's own that show them."""
    folder = tmp_path_factory.mktemp("boundary")
    splits: dict[str, list[Event]] = {"train": [], "tuning": [], "held_out": []}
    labels = []
    for split, n_subjects, first in (("train", N_TRAIN, 0), ("tuning", 20, 1000), ("held_out", 20, 2000)):
        for number in range(n_subjects):
            subject, is_case = first + number, number % 2 == 0
            code = "GOOD" if is_case else "BAD"
            days = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
            splits[split] += [(subject, None, "SEX//F", None), *((subject, day, code, None) for day in days)]
            labels.append((subject, 2.5 if number < N_LATE else 9.0, is_case))
    write_meds(folder / "set", splits, labels={"case": labels})
    (folder / "leaking_tasks.py").write_text(LEAKING)
    return folder


def config(place: Path, *overrides: str, name: str = "train"):
    own = [f"run_dir={place / 'run'}"] if name == "train" else []
    return composed(
        "data=meds", f"data.root={place / 'set'}", "data.min_count=1", f"cache_dir={place / 'cache'}", "embedder=hashing",
        "embedder.embedding_dim=8", "model=decoder_small", "model.model_dim=16", "model.n_layers=1", "model.max_length=16",
        "trainer=short", "trainer.epochs=1", "trainer.n_bootstrap=0", "trainer.precision=32-true",
        "trusted_packages=[leaking_tasks]", *own, *overrides, name=name,
    )  # fmt: skip


@pytest.fixture
def tasks(place, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(place))
    return place


REFUSED = r"284 of 300 samples .*subject 0 at 2020-01-03T12:00:00.*build_samples"


@pytest.mark.parametrize("task", ["InSetup", "InDataset", "InSubclass", "InPlace"])
def test_a_task_of_ones_own_that_looks_ahead_is_not_trained(tasks, tmp_path, task):
    with pytest.raises(UserError, match=REFUSED):
        run(config(tasks, f"task._target_=leaking_tasks.{task}", "task.monitor=auroc", f"run_dir={tmp_path / 'run'}"))
    assert not list(tmp_path.rglob("*.pt"))


def test_nor_a_dataset_of_ones_own_that_has_no_samples_to_look_at(tasks, tmp_path):
    """Its batches are looked at; one that shows nothing later is trained."""

    def train(task: str) -> None:
        run(config(tasks, f"task._target_=leaking_tasks.{task}", "task.monitor=auroc", f"run_dir={tmp_path / task}"))

    with refused("InBatches, split train", "1.5 days after their prediction time", "build_samples"):
        train("InBatches")
    with refused("NoDataset, split train", "list without events, lengths, on", "BatchDataset(events, samples)"):
        train("NoDataset")
    assert not list(tmp_path.rglob("*.pt"))
    train("Honest")


def test_nor_in_the_stage_before(tasks, tmp_path):
    stage = "+pretrain.task={_target_: leaking_tasks.Pretraining}"
    with refused("Pretraining, split train", "past their prediction time"):
        run(config(tasks, "task.monitor=auroc", stage, f"run_dir={tmp_path / 'run'}"))


def test_nor_exported(tasks, tmp_path):
    with pytest.raises(UserError, match=REFUSED):
        embed(
            config(
                tasks, "task._target_=leaking_tasks.InSetup", "export=patient_files", f"export.dir={tmp_path / 'files'}",
                name="embed",
            )
        )  # fmt: skip
    assert not list(tmp_path.rglob("*.pt"))


@pytest.fixture(scope="module")
def finished(place) -> Path:
    """Runs of a classifier, `run`, and of a generator, `pretrained`."""
    run(config(place, "task.monitor=auroc"))
    run(config(place, "task=next_event", f"run_dir={place / 'pretrained'}"))
    return place


def _looking_ahead(events: SplitEvents, *args, **options) -> Samples:
    samples = build_samples(events, *args, **options)
    ends = events.offsets[np.searchsorted(events.offsets, samples.static_start, side="right")]
    return replace(samples, stop=np.minimum(samples.stop + 1, ends))


USES = {
    "predict": lambda place: predict(
        composed(
            f"run={place / 'run'}", f"data.root={place / 'set'}", "split=train", "task.labels=case", "output=p.parquet",
            name="predict",
        )
    ),
    "load": lambda place: ehr_embed.load(place / "run").predict_proba(place / "set", labels="case", split="train"),
    "explain": lambda place: explain(
        composed(f"run={place / 'run'}", "split=train", "task.labels=case", "max_samples=1", name="explain")
    ),
    "generate": lambda place: generate_trajectories(
        composed(f"run={place / 'pretrained'}", "split=train", "labels=case", "max_new_events=4", name="generate")
    ),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_nor_predicted_explained_or_generated_from(finished, use, monkeypatch, tmp_path):
    """There the samples are the package's own, whatever the run's task does; a fault in them is refused too."""
    monkeypatch.chdir(tmp_path)
    for module in ("trained_run", "records"):
        monkeypatch.setattr(f"ehr_embed.inference.{module}.build_samples", _looking_ahead)
    with refused("284 of 300 samples", "past their prediction time"):
        USES[use](finished)


def _visible(samples: Samples, number: int) -> list[int]:
    ranges = ((samples.static_start, samples.static_stop), (samples.start, samples.stop))
    return [event for start, stop in ranges for event in range(start[number], stop[number])]


def _is_honest(events: SplitEvents, samples: Samples, number: int) -> bool:
    """Brute force finds every event of a sample in its subject's record, and none after the prediction time."""
    row = events.subject_ids.tolist().index(samples.subject_ids[number])
    own = range(int(events.offsets[row]), int(events.offsets[row + 1]))
    return all(
        event in own and events.times[event] <= samples.prediction_times[number] for event in _visible(samples, number)
    )


@given(subjects, st.data())
def test_what_is_refused_is_what_a_naive_oracle_refuses(records, data):
    events, _ = make_events(records)
    n_events, n = len(events.times), data.draw(st.integers(1, 5))
    ends = st.lists(st.integers(0, n_events), min_size=4, max_size=4).map(sorted)
    ranges = np.array([data.draw(ends) for _ in range(n)])
    rows = np.array(data.draw(st.lists(st.integers(0, len(records) - 1), min_size=n, max_size=n)))
    if data.draw(st.booleans()):  # within the subject's own record, so that time alone decides
        ranges = np.clip(ranges, events.offsets[rows][:, None], events.offsets[rows + 1][:, None])
    times = np.array(
        data.draw(st.lists(st.sampled_from([STATIC_TIME, *events.times.tolist()]), min_size=n, max_size=n))
    )
    samples = Samples(events.subject_ids[rows], times, np.full(n, STATIC_TIME), *ranges.T, labels=np.zeros(n, np.int64))
    if all(_is_honest(events, samples, number) for number in range(n)):
        check_boundary(events, samples)
    else:
        with pytest.raises(UserError, match=r"of \d+ samples (reach past|hold events)"):
            check_boundary(events, samples)


@given(subjects, st.integers(3, 9), st.integers(0, 3))
def test_all_samples_of_the_package_pass(records, max_length, seed):
    events, _ = make_events(records)
    rng = np.random.default_rng(seed)
    check_boundary(events, packed_samples(events, max_length=max_length, rng=rng)[0])
    if any(n_static + len(days) >= 2 and days for n_static, days in records):
        check_boundary(events, window_samples(events, max_length=max_length, which="all", rng=rng))


def test_batches_of_checked_samples_are_not_read_once_more():
    """Reading them back would make the host wait for a GPU in each step."""

    class Own(BatchDataset):
        pass

    class Shows(BatchDataset):
        def __getitem__(self, index):
            return replace(super().__getitem__(index), days=-torch.ones(len(index), 8))

    class Moves(BatchDataset):
        def on(self, device):
            return Shows(self.events, self.samples)

    events, _ = make_events([(1, [0, 1, 2])])
    samples = build_samples(events, label_frame(events, [0], [1.0]), np.zeros(1, np.int64), max_length=9)
    own = Own(events, samples)
    assert checked_dataset(own, where="own") is own
    for held in (checked_dataset(Shows(events, samples), where="own"),
                 checked_dataset(Moves(events, samples), where="own").on(torch.device("cpu"))):  # fmt: skip
        with refused("own: a batch shows events up to 1 days"):
            held[np.zeros(1, np.int64)]


def test_reversed_ranges_are_refused():
    events, _ = make_events([(1, [0, 1, 2])])
    samples = build_samples(events, label_frame(events, [0], [1.0]), np.zeros(1, np.int64), max_length=9)
    with refused("1 of 1 samples"):
        BatchDataset(events, replace(samples, start=samples.stop + 1))


@pytest.mark.parametrize("method", ["setup", "dataset", "records"])
def test_nobody_sets_a_task_up_or_takes_its_dataset_without_the_check(method):
    """`task.setup(...)` and its like stand in `tasks/set_up.py` alone; a task may call that of its own base class."""
    paths = [*(ROOT / "ehr_embed").rglob("*.py"), *ROOT.glob("*.py")]
    if method == "setup":
        paths += (ROOT / "benchmarks").rglob("*.py")
    calls = {path.relative_to(ROOT).as_posix() for path in paths if _calls(method, path.read_text(encoding="utf-8"))}
    assert calls == {"ehr_embed/tasks/set_up.py"}
    assert _calls(method, f"t = f()\nt.{method}(1)")
    assert not _calls(method, f"super().{method}(1)")


def _calls(method: str, code: str) -> bool:
    tree = ast.parse(code)
    # A task that hands its own method on to one inside it was itself checked, by whoever called it.
    own = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == method]
    inside = {id(node) for function in own for node in ast.walk(function)}
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
            owner = node.func.value
            named = owner.func if isinstance(owner, ast.Call) else owner
            if not (isinstance(named, ast.Name) and named.id in ("super", "self")):
                return True
    return False
