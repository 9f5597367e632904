"""The gradient of a step is that of the mean over all its samples or events, however they fall into batches and processes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import seed_everything
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.data.store import EventStore
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.decoder import Decoder
from ehr_embed.models.encoder import Encoder
from ehr_embed.tasks.classification import Classification
from ehr_embed.tasks.masked_event import MaskedEvent
from ehr_embed.tasks.multilabel import Multilabel
from ehr_embed.tasks.next_event import NextEvent
from ehr_embed.tasks.protocol import run_step
from ehr_embed.training.processes import run_ranks
from ehr_embed.training.settings import TrainerSettings
from ehr_embed.training.sharding import whole_tensor
from ehr_embed.training.trainer import Trainer
from tests.helpers.planted import planted
from tests.helpers.planted_events import planted as rounds
from tests.helpers.ranks import quick_ranks

__all__ = ["planted", "quick_ranks", "rounds"]  # the fixtures
WIDTH = 12


class Uneven(Classification):
    """A loss of one's own: that of samples of the second class counts three times."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits, labels) * (1 + 2 * labels)


TASKS: dict[str, Any] = {
    "classes": partial(Classification, monitor="auroc"),
    "weighted classes": partial(Classification, monitor="auroc", class_weights="balanced", label_smoothing=0.1),
    "a loss of one's own": partial(Uneven, monitor="auroc"),
    "next events": partial(NextEvent, time_weight=0.5, value_weight=0.3),
    "packed next events": partial(NextEvent, windows="packed"),
}


def built(store: EventStore, labels_dir: Path, run_dir: Path, task: Any, **settings: Any) -> tuple[Any, ...]:
    """A trainer with a model and learned vectors, always the same ones."""
    seed_everything(0, verbose=False)
    task.setup(store, labels_dir, 64)  # longer than any record, so that an epoch's windows are the whole records
    kind: Any = Decoder if isinstance(task, NextEvent) else Encoder
    sizes = {"embedding_dim": WIDTH, "has_values": store.manifest["has_values"], **task.sizes}
    model = kind(**sizes, model_dim=16, n_heads=2, n_layers=2, dropout=0.0, max_length=64)
    embedding = EventEmbedding(torch.randn(len(store.vocabulary), WIDTH), "residual")
    chosen = TrainerSettings(
        epochs=1,
        clip_norm=0.0,
        precision="32-true",
        warmup_steps=0,
        accelerator="cpu",
        checkpoint_every=None,
        **settings,
    )
    trainer = Trainer(
        chosen,
        chosen.launch(),
        task=task,
        run_dir=run_dir,
        config={},
        identity={"embedder": "none", "vocab_sha256": store.manifest["vocab_sha256"]},
        sizes=sizes,
        seed=0,
        log=lambda row, epoch: None,
    )
    return trainer, model, embedding


def gradients(model: nn.Module, embedding: EventEmbedding) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters()), **dict(embedding.named_parameters())}
    return {name: whole_tensor(p.grad).clone() for name, p in named.items() if p.grad is not None}


def of_steps(
    place: tuple[Any, ...], run_dir: Path, name: str, **settings: Any
) -> tuple[list[dict[str, Tensor]], float]:
    """The gradients that each step of an epoch hands to the optimizer, and the epoch's mean loss."""
    run_dir.mkdir(exist_ok=True)
    trainer, model, embedding = built(*place, run_dir, TASKS[name](), **settings)
    found, step = [], torch.optim.AdamW.step

    def kept(self: Any, *arguments: Any, **options: Any) -> Any:
        found.append(gradients(model, embedding))
        for group in self.param_groups:  # the epoch's loss is that of one set of weights
            group["lr"] = 0.0
        return step(self, *arguments, **options)

    torch.optim.AdamW.step = kept  # type: ignore[method-assign]
    try:
        history = trainer.fit(model, embedding)["history"]
    finally:
        torch.optim.AdamW.step = step  # type: ignore[method-assign]
    return found, history[0]["train/loss"]


def of_mean(place: tuple[Any, ...], run_dir: Path, name: str) -> tuple[dict[str, Tensor], float]:
    """The gradient of the mean loss over all of train as one batch, and that loss."""
    trainer, model, embedding = built(*place, run_dir, TASKS[name]())
    dataset = trainer.task.dataset("train", np.random.default_rng([0, 1]))
    result = trainer.task.step(model.train(), embedding, dataset[np.arange(len(dataset))])
    mean = result.loss_sum / result.count
    mean.backward()
    return gradients(model, embedding), mean.item()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(("batch_size", "batch_tokens"), [(60, 4096), (7, 4096), (None, 64)])
def test_a_step_over_all_batches_has_the_gradient_of_the_mean(
    planted, rounds, tmp_path, name, batch_size, batch_tokens
):
    place = (rounds[0], rounds[1] / "labels") if "events" in name else planted
    expected, mean = of_mean(place, tmp_path, name)
    found, loss = of_steps(place, tmp_path, name, batch_size=batch_size, batch_tokens=batch_tokens, accumulate=1000)
    assert len(found) == 1
    same(found[0], expected)
    assert loss == pytest.approx(mean, rel=1e-5)


def test_each_of_several_steps_has_that_of_its_own_mean(planted, tmp_path):
    """Two steps of which the second has one batch less, and a smaller one: together, weighted by their samples, the mean."""
    expected, _ = of_mean(planted, tmp_path, "classes")
    found, _ = of_steps(planted, tmp_path, "classes", batch_size=8, accumulate=5)
    trainer, *_ = built(*planted, tmp_path, TASKS["classes"](), batch_size=8)
    sizes = [len(rows) for rows in trainer.loader("train", 1).sampler]
    counts = sum(sizes[:5]), sum(sizes[5:])
    assert len(found) == 2
    assert sum(counts) == 60
    together = {name: (counts[0] * g + counts[1] * found[1][name]) / 60 for name, g in found[0].items()}
    same(together, expected)


def on_rank(place: tuple[Any, ...], run_dir: Path, name: str, **settings: Any) -> Any:
    (found,), loss = of_steps(place, run_dir, name, devices=2, accumulate=4, **settings)
    return {key: gradient.numpy() for key, gradient in found.items()}, loss


@pytest.mark.parametrize(
    ("name", "batch_size", "n_batches", "strategy"), [("weighted classes", 8, 8, "ddp"), ("next events", 7, 6, "fsdp")]
)
def test_two_processes_have_the_gradient_of_the_mean_over_both(
    planted, rounds, quick_ranks, tmp_path, name, batch_size, n_batches, strategy
):
    place = (rounds[0], rounds[1] / "labels") if "events" in name else planted
    trainer, *_ = built(*place, tmp_path, TASKS[name](), batch_size=batch_size)
    assert len(trainer.loader("train", 1).sampler) == n_batches  # an even number, so that none is dropped
    expected, mean = of_mean(place, tmp_path, name)
    found, loss = run_ranks(partial(on_rank, place, tmp_path, name, batch_size=batch_size, strategy=strategy), 2)
    same({key: torch.from_numpy(gradient) for key, gradient in found.items()}, expected)
    assert loss == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [64, 4096])
@pytest.mark.parametrize("kind", [NextEvent, MaskedEvent])
def test_the_loss_of_a_split_is_the_mean_over_its_events(rounds, tmp_path, kind, batch_tokens):
    store, root = rounds
    task = kind()
    task.needs_causal = None
    trainer, model, embedding = built(
        store, root / "labels", tmp_path, task, batch_size=None, batch_tokens=batch_tokens
    )
    loss, outputs = trainer.evaluate(model, embedding, "tuning")
    metrics = task.evaluate("tuning", outputs, n_bootstrap=0)
    terms = [metrics[name]["value"] for name in ("loss", "time_loss", "value_loss")]
    assert loss == pytest.approx(terms[0] + 0.1 * terms[1] + 0.1 * terms[2], rel=1e-5)


def test_balanced_classes_have_equal_shares_of_the_loss():
    """At a prevalence of 1 %, over any batches: the mean of batch means gave the positives 0.21."""
    labels = np.zeros(3200, np.int64)
    labels[:32] = 1
    for weights in ("balanced", [1, 99]):
        for smoothing in (0.0, 0.2):
            task = Classification(class_weights=weights, label_smoothing=smoothing)
            task.class_names = ["false", "true"]
            task._weights = task._fit_weights(labels)
            logits, known = torch.zeros(len(labels), 2), torch.from_numpy(labels)
            loss_B = task.loss(logits, known)
            assert float(loss_B[:32].sum() / loss_B.sum()) == pytest.approx(0.5, abs=1e-5)
            assert float(loss_B.mean()) == pytest.approx(np.log(2), abs=1e-5)  # the weights' mean is one


def test_labels_weigh_the_same_and_unknown_ones_nothing():
    rng = np.random.default_rng(0)
    known = (rng.random((4000, 3)) < [0.01, 0.3, 0.5]).astype(np.float32)
    labels = np.where(rng.random(known.shape) < [0.0, 0.2, 0.9], np.nan, known)
    task = Multilabel(class_weights="balanced")
    task.samples["train"] = type("Some", (), {"labels": labels})  # type: ignore[assignment]
    task._weights = task._fit_weights()
    loss_BL = task.loss(torch.zeros(labels.shape), torch.from_numpy(labels))
    assert not loss_BL[torch.from_numpy(np.isnan(labels))].any()
    of_positive = (loss_BL * torch.from_numpy(known)).sum(0) / loss_BL.sum(0)
    np.testing.assert_allclose(of_positive, 0.5, atol=1e-5)
    np.testing.assert_allclose(loss_BL.sum(0).numpy() / (~np.isnan(labels)).sum(0), np.log(2), rtol=1e-5)


def test_a_mean_in_place_of_a_sum_is_refused(planted, tmp_path):
    class MeanLoss(Classification):
        def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
            return super().loss(logits, labels).mean()

    class MeanStep(Classification):
        def step(self, model: Any, embedding: Any, batch: Any) -> Any:
            result = super().step(model, embedding, batch)
            return result.loss_sum / result.count, result.outputs

    for kind, message in (
        (MeanLoss, r"MeanLoss.loss .*\(\), expected \(60,\)"),
        (MeanStep, r"MeanStep.step returned a tuple, .*StepResult\(loss_sum, count, outputs\)"),
    ):
        trainer, model, embedding = built(*planted, tmp_path, kind(monitor="auroc"))
        batch = trainer.task.dataset("train")[np.arange(60)]
        with pytest.raises(UserError, match=message):
            run_step(trainer.task, model, embedding, batch)
