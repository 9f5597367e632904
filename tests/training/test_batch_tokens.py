"""`trainer.batch_tokens=auto` takes the largest batch whose step fits, changes nothing else, and is kept as a number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.experiment import stage
from ehr_embed.experiment.run import run
from ehr_embed.models.encoder import Encoder
from ehr_embed.run_folder.resume import find_run
from ehr_embed.tasks.classification import Classification
from ehr_embed.training import batch_tokens
from ehr_embed.training.batch_tokens import SHARE, STATE_BYTES, largest_that_fits, with_batch_tokens
from ehr_embed.training.settings import N_BATCH_TOKENS, TrainerSettings
from tests.helpers.planted import planted  # noqa: F401 (fixtures)
from tests.helpers.refusals import refused
from tests.helpers.stopped_runs import dataset, settings, what_is_left  # noqa: F401 (fixtures)


class CountedMemory:
    """A memory of so many free bytes, in which a step takes what it keeps for its backward pass."""

    def __init__(self, free: float) -> None:
        self._free = free
        self.taken: list[int] = []

    def free(self) -> int:
        return int(self._free)

    def peak_of(self, work: Callable[[], None]) -> int:
        kept: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            work()
        self.taken.append(sum(kept.values()))
        return self.taken[-1]


@pytest.fixture
def parts(planted) -> dict[str, Any]:
    store, labels_dir = planted
    task = Classification(monitor="auroc")
    task.setup(store, labels_dir, 16)
    torch.manual_seed(0)
    model = Encoder(embedding_dim=12, num_classes=2, model_dim=8, n_heads=2, n_layers=1, max_length=16)
    return {
        "task": task,
        "model": model,
        "embedding": EventEmbedding(torch.randn(len(store.vocabulary), 12)),
        "seed": 0,
    }


def chosen(parts: dict[str, Any], memory: CountedMemory | None, **own: Any) -> int | str:
    given: dict[str, Any] = {"batch_size": None, "batch_tokens": "auto", "precision": "32-true", "accelerator": "cpu"}
    found = TrainerSettings(**given | own)
    return with_batch_tokens(found, found.launch(), **parts, memory=memory).batch_tokens


def test_the_largest_batch_that_fits_is_chosen_and_nothing_is_changed(parts):
    model: nn.Module = parts["model"].eval()
    weights, random = [p.clone() for p in model.parameters()], torch.get_rng_state()
    state = STATE_BYTES * sum(p.numel() for p in model.parameters())
    small = CountedMemory(free=0)
    assert chosen(parts, small) == 4096, "the least, where not even that fits"
    (least,) = small.taken
    larger = CountedMemory(free=2.5 * least / SHARE + state)
    assert chosen(parts, larger) == 8192, "twice as much fits, and four times does not"
    assert larger.taken == [least, pytest.approx(2 * least, rel=0.05)]
    assert chosen(parts, CountedMemory(free=3.5 * least / SHARE + state)) == 12_288
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), weights, strict=True))
    assert torch.equal(torch.get_rng_state(), random), "training draws the same numbers as without"
    assert not any(p.grad is not None for p in model.parameters())
    assert not model.training


def test_no_step_is_tried_that_could_run_out_of_memory():
    for budget in (1e5, 5e5, 3e6, 1e9):
        tried: list[int] = []

        def peak_of(n: int, tried: list[int] = tried) -> int:
            tried.append(100 * n)
            return tried[-1]

        n, _ = largest_that_fits(peak_of, budget=budget, first=512)
        assert max(tried) <= budget
        assert 100 * n <= budget
        assert n == 262_144 or 100 * n > budget / 2, "no smaller than need be"


def test_memory_that_another_process_takes_meanwhile_ends_the_search_at_what_fitted():
    def peak_of(n: int) -> int:
        if n > 2048:
            raise torch.OutOfMemoryError
        return n

    assert largest_that_fits(peak_of, budget=1e9, first=512) == (2048, 2048)
    with pytest.raises(torch.OutOfMemoryError):
        largest_that_fits(peak_of, budget=1e9, first=4096)


def test_a_step_is_tried_in_evaluation_too_and_a_frozen_body_takes_no_gradients(parts, monkeypatch):
    tried: list[tuple[bool, int]] = []
    step = batch_tokens.run_step

    def watched(task: Any, model: nn.Module, *rest: Any) -> Any:
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        tried.append((model.training, learned))
        return step(task, model, *rest)

    monkeypatch.setattr(batch_tokens, "run_step", watched)
    model: nn.Module = parts["model"]
    n_all = sum(p.numel() for p in model.parameters())
    chosen(parts, CountedMemory(free=0), freeze="body")
    assert [is_training for is_training, _ in tried] == [True, False] * 2
    assert all(0 < learned < n_all for _, learned in tried)
    assert all(p.requires_grad for p in model.parameters())


def test_a_number_that_was_chosen_before_stays_and_on_a_cpu_it_is_fixed(parts):
    memory = CountedMemory(free=1e9)
    assert (
        with_batch_tokens(
            TrainerSettings(batch_tokens=512), TrainerSettings(accelerator="cpu").launch(), **parts, memory=memory
        ).batch_tokens
        == 512
    )
    assert chosen({**parts, "kept": 777}, memory) == 777
    assert not memory.taken
    assert chosen(parts, None) == N_BATCH_TOKENS == 16_384
    with refused("trainer.strategy=fsdp", f"trainer.batch_tokens={N_BATCH_TOKENS}"):
        TrainerSettings(batch_tokens="auto", strategy="fsdp")
    with refused("trainer.batch_tokens=many", "auto"):
        TrainerSettings(batch_tokens="many")


def test_the_number_is_in_the_files_of_the_run_which_goes_on_with_it(dataset, tmp_path):
    cfg = settings(dataset, tmp_path / "run", "trainer.batch_tokens=auto", "trainer.epochs=1")
    run(cfg)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["trainer"]["batch_tokens"] == N_BATCH_TOKENS
    assert find_run(
        tmp_path / "run", {**config, "trainer": config["trainer"] | {"batch_tokens": "auto"}}, how="auto"
    ).is_finished
    longer = {**config, "trainer": config["trainer"] | {"batch_tokens": "auto", "epochs": 2}}
    assert find_run(tmp_path / "run", longer, how="force").batch_tokens == N_BATCH_TOKENS
    with refused("trainer.batch_tokens was 16384, now 99"):
        find_run(tmp_path / "run", {**config, "trainer": config["trainer"] | {"batch_tokens": 99}}, how="auto")
    assert _checkpoint(tmp_path / "run")["trainer"]["batch_tokens"] == N_BATCH_TOKENS


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [("model=code_tab",), ("task=next_event", "task.windows=packed", "model=decoder_small"), ("task=masked_event",)],
    ids=" ".join,
)
def test_steps_of_other_models_and_tasks_can_be_tried(kind, dataset, tmp_path, monkeypatch):
    """They are tried before the model is adapted to train's records; the run then trains as with the number alone."""
    chosen_before, memory = stage.with_batch_tokens, CountedMemory(free=3e7)
    monkeypatch.setattr(batch_tokens, "FEWEST", 64)

    def with_memory(*args: Any, **options: Any) -> TrainerSettings:
        return chosen_before(*args, **options, memory=memory)

    monkeypatch.setattr(stage, "with_batch_tokens", with_memory)
    more = ("trainer.epochs=1", "trainer.batch_size=null")
    run(settings(dataset, tmp_path / "auto", *kind, *more, "trainer.batch_tokens=auto"))
    number = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["trainer"]["batch_tokens"]
    assert len(memory.taken) > 1, "steps of several sizes were tried"
    assert number > 64
    run(settings(dataset, tmp_path / "number", *kind, *more, f"trainer.batch_tokens={number}"))
    assert what_is_left(tmp_path / "auto") == what_is_left(tmp_path / "number")


def _checkpoint(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run_dir / "best_checkpoint.pt", weights_only=True)["config"]
    return found
