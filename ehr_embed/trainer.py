"""The only training loop, on Lightning Fabric."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau, SequentialLR
from tqdm import tqdm

from ehr_embed.batches import BucketSampler, batch_loader
from ehr_embed.errors import UserError, unknown_name
from ehr_embed.event_embedding import EventEmbedding
from ehr_embed.files import atomic_path
from ehr_embed.memory import peak_memory_mib
from ehr_embed.optimizer import body_of, parameter_groups
from ehr_embed.precision import choose_precision, make_fabric
from ehr_embed.tasks.protocol import Outputs, Task

SCHEDULES = ("plateau", "cosine", "constant")
PROGRESS_EVERY = 20
"""Steps between progress updates; each waits for the device."""


@dataclass(frozen=True)
class TrainerSettings:
    """How to train; conf/trainer/default.yaml says what each key means."""

    epochs: int = 50
    batch_size: int = 32
    batch_tokens: int = 16_384
    accumulate: int = 1
    learning_rate: float = 1e-4
    min_learning_rate: float = 1e-6
    weight_decay: float = 0.01
    warmup_steps: int = 100
    schedule: str = "plateau"
    scheduler_patience: int = 3
    clip_norm: float = 1.0
    patience: int = 10
    save_every: int = 10
    n_bootstrap: int = 1000
    num_workers: int = 0
    accelerator: str = "auto"
    precision: str = "auto"
    freeze: str | None = None
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown_name("trainer.schedule", self.schedule, SCHEDULES)
        choose_precision(self.precision, self.accelerator)
        if self.freeze not in (None, "body"):
            raise unknown_name("trainer.freeze", self.freeze, ["null", "body"])
        if not 0 < self.layer_decay <= 1:
            raise UserError(
                f"trainer.layer_decay={self.layer_decay}: expected a factor in (0, 1]; 1 = one rate for all."
            )
        if self.warmup_steps < 0:
            raise UserError(f"trainer.warmup_steps={self.warmup_steps}: expected 0 or more.")
        for name in ("epochs", "batch_size", "batch_tokens", "accumulate", "patience", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"trainer.{name}={getattr(self, name)}: expected 1 or more.")


@dataclass
class Progress:
    """Where a training run stands; part of every checkpoint."""

    epoch: int = 0
    step: int = 0
    best_value: float | None = None
    best_epoch: int = 0
    epochs_without_improvement: int = 0


class Trainer:
    """Trains a model on a task's train samples and keeps the checkpoint that is best on tuning.

    Args:
        settings: how to train.
        task: after `setup`.
        run_dir: where checkpoints go.
        config: the resolved configuration, stored in every checkpoint.
        identity: digests of the embedder and the vocabulary, which the weights depend on; stored too.
        sizes: what the model was built with beside its configuration; stored too.
        seed: order of the batches, and what a task draws.
        log: called with a row of metrics and the epoch after every epoch.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        task: Task,
        run_dir: Path,
        config: dict[str, Any],
        identity: dict[str, str],
        sizes: dict[str, Any],
        seed: int,
        log: Callable[[dict[str, float], int], None],
    ) -> None:
        self.settings, self.task, self.run_dir, self.seed, self.log = settings, task, run_dir, seed, log
        self.about = {"config": config, "identity": identity, "sizes": sizes}
        self.precision = choose_precision(settings.precision, settings.accelerator)
        self.fabric = make_fabric(settings.accelerator, self.precision)
        self.fabric.launch()

    def fit(self, model: nn.Module, embedding: EventEmbedding) -> dict[str, Any]:
        """Train until `epochs`, or until the monitored metric has not improved for `patience` epochs.

        Model and embedding end with the best epoch's weights.

        Returns:
            Facts of the run: epochs, steps (of the optimizer), best_epoch, seconds, events_per_s (real events, without
            padding), padding_share, history (a row an epoch), and those of `facts`.

        Raises:
            UserError: the loss became NaN or infinite.
        """
        settings, progress = self.settings, Progress()
        embedding.to(self.fabric.device)
        if settings.freeze == "body":
            body_of(model).requires_grad_(False)
            embedding.requires_grad_(False)  # what the body reads is part of what it learned
        groups = parameter_groups(
            model,
            embedding,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay,
        )
        optimizer = torch.optim.AdamW(groups, fused=self.precision != "16-mixed")  # which clips outside
        wrapped, optimizer = self.fabric.setup(model, optimizer)
        steps_per_epoch = -(-len(self._loader("train", 1).sampler) // settings.accumulate)
        scheduler, plateau = self._schedules(optimizer, steps_per_epoch * settings.epochs)
        n_events, n_padded, train_seconds, history = 0, 0, 0.0, []
        state = {"model": model, "embedding": embedding, "optimizer": optimizer}
        state |= {"scheduler": scheduler, "plateau": plateau}

        for epoch in range(1, settings.epochs + 1):
            progress.epoch = epoch
            began = time.perf_counter()
            loss, events, padded = self._train_epoch(wrapped, embedding, optimizer, scheduler, progress)
            seconds = time.perf_counter() - began
            n_events, n_padded, train_seconds = n_events + events, n_padded + padded, train_seconds + seconds
            tuning_loss, outputs = self._predict(wrapped, embedding, "tuning")
            self.task.fit_thresholds(outputs)
            tuning = self.task.evaluate("tuning", outputs, n_bootstrap=0)
            value = float(tuning[self.task.monitor]["value"])
            if plateau is not None and progress.step >= settings.warmup_steps:
                plateau.step(value)
            row = {
                "epoch": epoch,
                "step": progress.step,
                "train/loss": loss,
                "train/learning_rate": optimizer.param_groups[0]["lr"],
                "train/events_per_s": events / seconds,
                "tuning/loss": tuning_loss,
            }
            row |= {f"tuning/{name}": m["value"] for name, m in tuning.items() if isinstance(m, dict) and "value" in m}
            history.append(row)
            self._judge(progress, value)
            self._save(state, progress)
            self.log(row, epoch)
            if progress.epochs_without_improvement >= settings.patience:
                break

        self.fabric.barrier()
        best = torch.load(self.run_dir / "best_checkpoint.pt", map_location=self.fabric.device, weights_only=True)
        model.load_state_dict(best["model_state_dict"])
        embedding.load_state_dict(best.get("embedding_state_dict", {}))
        return self.facts(model, embedding) | {
            "n": len(self.task.dataset("train")),
            "epochs": progress.epoch,
            "steps": progress.step,
            "best_epoch": progress.best_epoch,
            "seconds": train_seconds,
            "events_per_s": n_events / train_seconds,
            "padding_share": 1 - n_events / n_padded,
            "history": history,
        }

    def facts(self, model: nn.Module, embedding: EventEmbedding) -> dict[str, Any]:
        """What can be said of a model that is not trained here: n_parameters, n_trained of them, peak_memory_mib so far (of the
        GPU, else of this process), precision, and an empty history."""
        parameters = [*model.parameters(), *embedding.parameters()]
        return {
            "n_parameters": sum(p.numel() for p in parameters),
            "n_trained": sum(p.numel() for p in parameters if p.requires_grad),
            "peak_memory_mib": peak_memory_mib(self.fabric.device),
            "precision": self.precision,
            "history": [],
        }

    def predict(self, model: nn.Module, embedding: EventEmbedding, split: str) -> Outputs:
        """The task's outputs of all samples of a split, in sample order."""
        embedding.to(self.fabric.device)
        return self._predict(model.to(self.fabric.device), embedding, split)[1]

    def _train_epoch(
        self, model: Any, embedding: EventEmbedding, optimizer: Any, scheduler: Any, progress: Progress
    ) -> tuple[float, int, int]:
        """One pass over train: mean loss, real events and padded events of this process."""
        model.train()
        settings = self.settings
        if settings.freeze == "body":
            body_of(model.module).eval()
        loader = self._loader("train", progress.epoch)
        n_batches = len(loader.sampler)
        total, n_events, n_padded, began = torch.zeros((), device=self.fabric.device), 0, 0, time.perf_counter()
        bar = tqdm(loader, total=n_batches, desc=f"epoch {progress.epoch}", leave=False, disable=None, unit="batch")
        for number, batch in enumerate(bar):
            n_events, n_padded = n_events + int(batch.is_event.sum()), n_padded + batch.is_event.numel()
            # The last group of an epoch may be smaller; its gradient is still a mean.
            group = min(settings.accumulate, n_batches - number // settings.accumulate * settings.accumulate)
            steps = (number + 1) % settings.accumulate == 0 or number + 1 == n_batches
            with self.fabric.no_backward_sync(model, enabled=not steps):
                loss = self.task.step(model, embedding, batch.to(self.fabric.device))[0]
                self.fabric.backward(loss / group)
            total += loss.detach()
            if steps:
                self._synchronise(embedding)
                if settings.clip_norm > 0:
                    self.fabric.clip_gradients(model, optimizer, max_norm=settings.clip_norm, error_if_nonfinite=False)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                progress.step += 1
            if number % PROGRESS_EVERY == 0 and not bar.disable:
                rate = n_events / (time.perf_counter() - began)
                bar.set_postfix(loss=f"{float(loss):.4f}", events_per_s=f"{rate:,.0f}")
        mean = float(self._reduce(total / n_batches, "mean"))
        if not np.isfinite(mean):
            raise UserError(
                f"the training loss became {mean} in epoch {progress.epoch}, so nothing can be learned from here on. "
                "Type: trainer.learning_rate=LOWER, or trainer.precision=32-true"
            )
        return mean, n_events, n_padded

    @torch.inference_mode()
    def _predict(self, model: nn.Module, embedding: EventEmbedding, split: str) -> tuple[float, Outputs]:
        """Mean loss and outputs (n, n_outputs) of a split, in sample order, whatever the batches were."""
        model.eval()
        loader = self._loader(split)
        n = len(loader.dataset)
        result = torch.zeros(n, self.task.n_outputs, dtype=torch.float64, device=self.fabric.device)
        loss_sum = torch.zeros((), device=self.fabric.device)
        for batch in loader:
            moved = batch.to(self.fabric.device)
            with self.fabric.autocast():
                loss, result[moved.sample] = self.task.step(model, embedding, moved)
            loss_sum += loss * len(moved.sample)
        result = self._reduce(result, "sum")
        loss_sum = self._reduce(loss_sum, "sum")
        return float(loss_sum) / n, result.cpu().numpy()

    def _synchronise(self, embedding: EventEmbedding) -> None:
        """Give every process the mean gradient of the embedding, which Fabric's wrapper of the model does not see."""
        if self.fabric.world_size > 1:
            for parameter in embedding.parameters():
                if parameter.grad is not None:
                    parameter.grad = self._reduce(parameter.grad, "mean")

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        reduced = self.fabric.all_reduce(x, reduce_op=how)
        assert isinstance(reduced, Tensor)
        return reduced

    def _loader(self, split: str, epoch: int | None = None) -> Any:
        """Batches of a split: in random order in an epoch of training, else in order of length."""
        settings = self.settings
        dataset = self.task.dataset(split, None if epoch is None else np.random.default_rng([self.seed, epoch]))
        sampler = BucketSampler(
            dataset.lengths,
            batch_size=settings.batch_size,
            batch_tokens=settings.batch_tokens,
            shuffle=epoch is not None,
            seed=self.seed,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
        )
        sampler.set_epoch(epoch or 0)
        pin = self.fabric.device.type == "cuda"
        return batch_loader(dataset, sampler, num_workers=settings.num_workers, pin_memory=pin)

    def _schedules(self, optimizer: Any, total_steps: int) -> tuple[Any, ReduceLROnPlateau | None]:
        """A scheduler to step every step (warm-up, then cosine or constant), and one to step every epoch or None."""
        settings = self.settings
        warmup = LinearLR(optimizer, start_factor=1 / (settings.warmup_steps + 1), total_iters=settings.warmup_steps)
        if settings.schedule == "plateau":
            mode = "max" if self.task.is_higher_better else "min"
            plateau = ReduceLROnPlateau(
                optimizer,
                mode=mode,  # type: ignore[arg-type]
                factor=0.5,
                patience=settings.scheduler_patience,
                min_lr=settings.min_learning_rate,
            )
            return warmup, plateau
        if settings.schedule == "constant":
            return warmup, None
        after = CosineAnnealingLR(
            optimizer, T_max=max(1, total_steps - settings.warmup_steps), eta_min=settings.min_learning_rate
        )
        return SequentialLR(optimizer, [warmup, after], milestones=[settings.warmup_steps]), None

    def _judge(self, progress: Progress, value: float) -> None:
        sign = 1 if self.task.is_higher_better else -1
        if progress.best_value is None or sign * value > sign * progress.best_value:
            progress.best_value, progress.best_epoch, progress.epochs_without_improvement = value, progress.epoch, 0
        else:
            progress.epochs_without_improvement += 1

    def _save(self, state: dict[str, Any], progress: Progress) -> None:
        if not self.fabric.is_global_zero:
            return
        checkpoint = {
            "model_state_dict": state["model"].state_dict(),
            "optimizer_state_dict": state["optimizer"].state_dict(),
            "scheduler_state_dict": {
                name: state[name].state_dict() for name in ("scheduler", "plateau") if state[name] is not None
            },
            **self.about,
            "class_names": self.task.class_names,
            "epoch": progress.epoch,
            "progress": dict(progress.__dict__),
            "rng_state": {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
        }
        if learned := state["embedding"].state_dict():
            checkpoint["embedding_state_dict"] = learned
        names = ["latest_checkpoint.pt"]
        if progress.best_epoch == progress.epoch:
            names.append("best_checkpoint.pt")
        if progress.epoch % self.settings.save_every == 0:
            names.append(f"checkpoint_epoch_{progress.epoch}.pt")
        for name in names:
            with atomic_path(self.run_dir / name) as path:
                torch.save(checkpoint, path)
