"""The state that training changes: it is saved in checkpoints and restored when a run continues."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import link_file
from ehr_embed.core.moved import ADAMW
from ehr_embed.data.batches import Batch
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.run_folder.checkpoints import Continuation, write_latest
from ehr_embed.run_folder.layout import BEST, LATEST, epoch_checkpoint
from ehr_embed.training.anchor import Anchor
from ehr_embed.training.ema import Ema
from ehr_embed.training.processes import Processes
from ehr_embed.training.sharding import load_optimizer, load_weights, whole


@dataclass
class Progress:
    """Progress of a training run; part of every checkpoint.

    The counts are those of one of `n_processes` processes, on average.

    Attributes:
        epoch: the epoch that was begun last.
        batch: number of batches of this epoch that were trained on; 0 = the epoch is over.
        step: number of optimizer steps in all epochs.
        loss_sum, loss_count: sum of the losses in this epoch so far, and the number of events or samples in the sum.
        n_events, n_padded, n_pairs, seconds: events, events with padding, pairs of events and seconds in this epoch so
            far.
        total_events, total_padded, total_pairs, total_seconds: the same numbers for all finished epochs.
        best_value: best value of the monitored metric; None before the first evaluation.
        best_epoch: epoch of the best value.
        epochs_without_improvement: number of epochs since the best value.
        history: one row of metrics per finished epoch.
        n_processes: number of processes that train together.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    loss_count: float = 0.0
    n_events: float = 0
    n_padded: float = 0
    n_pairs: float = 0
    seconds: float = 0.0
    total_events: float = 0
    total_padded: float = 0
    total_pairs: float = 0
    total_seconds: float = 0.0
    best_value: float | None = None
    best_epoch: int = 0
    epochs_without_improvement: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    n_processes: int = 1

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Progress:
        """Return the progress that a checkpoint holds.

        A checkpoint without a count holds the sum of its batches' mean losses; each batch then counts as one event or
        sample.

        >>> Progress.of({"epoch": 3, "batch": 2, "loss_sum": 1.5}).loss
        0.75
        """
        return cls(**{"loss_count": float(saved["batch"]), **saved})

    @property
    def loss(self) -> float:
        """Return the mean loss of the epoch so far; 0 if nothing was counted."""
        return self.loss_sum / self.loss_count if self.loss_count else 0.0

    def count(self, batch: Batch) -> None:
        """Add a batch to the counts of the epoch."""
        self.n_events += batch.n_events
        self.n_padded += batch.is_event.numel()
        self.n_pairs += batch.n_pairs

    def average(self, losses: Sequence[float], processes: Processes) -> None:
        """Replace the counts of this epoch by their means over the processes.

        Args:
            losses: `loss_sum` and `loss_count` of this process.
            processes: processes that train together.
        """
        counted = (*losses, self.n_events, self.n_padded, self.n_pairs)
        self.loss_sum, self.loss_count, self.n_events, self.n_padded, self.n_pairs = processes.means(counted)

    def spread(self, n: int) -> None:
        """Convert the counts to those of one of `n` processes.

        A run that continues with another number of processes thus starts near the batch at which it stopped.
        """
        self.batch = math.ceil(self.batch * self.n_processes / n)
        counts = ("loss_sum", "loss_count", "n_events", "n_padded", "n_pairs")
        for name in (*counts, "total_events", "total_padded", "total_pairs"):
            setattr(self, name, getattr(self, name) * self.n_processes / n)
        self.n_processes = n

    def end_epoch(self, row: dict[str, Any], value: float, *, is_higher_better: bool, keeps_last: bool = False) -> None:
        """Add the epoch to the totals, and update the best epoch by `value`, the monitored metric; with `keeps_last` the epoch
        counts as the best so far."""
        self.total_events += self.n_events
        self.total_padded += self.n_padded
        self.total_pairs += self.n_pairs
        self.total_seconds += self.seconds
        self.batch, self.loss_sum, self.loss_count, self.seconds = 0, 0.0, 0.0, 0.0
        self.n_events, self.n_padded, self.n_pairs = 0, 0, 0
        self.history.append(row)
        sign = 1 if is_higher_better else -1
        if keeps_last or self.best_value is None or sign * value > sign * self.best_value:
            self.best_value, self.best_epoch, self.epochs_without_improvement = value, self.epoch, 0
        else:
            self.epochs_without_improvement += 1


@dataclass
class TrainingState:
    """Everything that a step or an epoch changes, with methods to save and restore it.

    Attributes:
        model: the model in training.
        embedding: token vectors, which may be learned.
        optimizer: the optimizer.
        scheduler: learning-rate schedule that is stepped after every step.
        warmup: the warm-up inside it.
        plateau: learning-rate schedule that is stepped after every epoch, if there is one.
        precision: Fabric's precision plugin, which has a state if it scales gradients.
        about: other contents of a checkpoint: configuration, identity, sizes, classes and digest of the samples.
        processes: processes that train together; all must call `save` and `restore`, and rank 0 writes.
        ema: averages of the weights, with which the run predicts; None = there are none. A checkpoint's `model_state_dict` holds
            the averages, and the learned weights are beside them.
        anchor: the weights of the start, towards which those of the run are drawn; None = they are not.
        progress: progress of the run.
    """

    model: nn.Module
    embedding: EventEmbedding
    optimizer: Any
    scheduler: Any
    warmup: LinearLR
    plateau: ReduceLROnPlateau | None
    precision: Any
    about: dict[str, Any]
    processes: Processes
    progress: Progress = field(default_factory=Progress)
    ema: Ema | None = None
    anchor: Anchor | None = None

    def __post_init__(self) -> None:
        self.progress.n_processes = self.processes.size

    def averaged(self) -> AbstractContextManager[None]:
        """Use the averages in place of the weights while inside, for predictions; without `ema` nothing changes."""
        return nullcontext() if self.ema is None else self.ema.in_place()

    def save(self, run_dir: Path, rng: dict[str, Any] | None = None) -> None:
        """Write `latest_checkpoint.pt`.

        Args:
            run_dir: folder of the run.
            rng: state of the random generators to save; None = their state now.
        """
        is_first = self.processes.is_first
        with self.averaged():
            weights = whole(self.model.state_dict(), is_kept=is_first)
            vectors = self.embedding.state_dict()
        moments = whole(self.optimizer.state_dict(), is_kept=is_first)
        rng, *others = self.processes.gather(rng or rng_state())
        if not is_first:
            return
        rest: dict[str, Any] = {
            "optimizer_state_dict": moments,
            "scheduler_state_dict": {
                name: schedule.state_dict()
                for name, schedule in (("scheduler", self.scheduler), ("plateau", self.plateau))
                if schedule is not None
            },
            "precision_state": self.precision.state_dict(),
        }
        if vectors:
            rest["embedding_state_dict"] = vectors
        if self.ema is not None:
            rest["learning_state_dict"] = self.model.state_dict()
            rest["learning_embedding_state_dict"] = self.embedding.state_dict()
        if self.anchor is not None:
            rest["anchor"] = self.anchor.start
        if others:
            rest["other_rng_states"] = others
        write_latest(run_dir, weights, dict(vars(self.progress)), self.about | rest, rng)

    def keep(self, run_dir: Path, *, save_every: int) -> None:
        """Link the latest checkpoint, that of a finished epoch, as the best one and as that of its epoch, if due.

        The method is called after the latest checkpoint is written, and again when a run continues, because the process
        may have been killed between the two.
        """
        epoch, names = self.progress.epoch, []
        if self.progress.best_epoch == epoch:
            names.append(BEST)
        if epoch % save_every == 0:
            names.append(epoch_checkpoint(epoch))
        for name in names:
            link_file(run_dir / LATEST, run_dir / name)

    def restore(self, run: Continuation) -> dict[str, Any] | None:
        """Restore everything in a checkpoint except the random generators.

        Returns:
            The state of this process's generators, for `set_rng_state`; None if another number of processes saved them.

        Raises:
            UserError: the weights or the optimizer state do not fit this model.
        """
        saved = run.checkpoint
        names = [optimizer_of(config) for config in (saved["config"], self.about["config"])]
        if names[0] != names[1]:  # torch would load the state of another optimizer, and miss its own at the next step
            raise UserError(
                f"{run.path} holds the state of {names[0]}, from which {names[1]} cannot continue. "
                "Type: run_dir=ANOTHER, or resume=overwrite to start again here"
            )
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            load_weights(self.model, saved["model_state_dict"])
            self.embedding.load_state_dict(saved.get("embedding_state_dict", {}))
            if self.ema is not None and "learning_state_dict" in saved:
                self.ema.take()
                load_weights(self.model, saved["learning_state_dict"])
                self.embedding.load_state_dict(saved["learning_embedding_state_dict"])
            elif self.ema is not None:  # a run that had none until now
                self.ema.take()
            load_optimizer(self.optimizer, saved["optimizer_state_dict"])
            if self.anchor is not None:
                if "anchor" in saved:
                    for start, kept in zip(self.anchor.start, saved["anchor"], strict=True):
                        start.copy_(kept)
                else:  # a run that had none until now is drawn to where it is
                    self.anchor = Anchor(self.anchor.parameters, self.anchor.pull)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{run.path} does not fit this model or its optimizer ({str(error).splitlines()[-1].strip()}), so resume=force "
                "cannot go on from it. Type: run_dir=ANOTHER, or resume=overwrite to start again here"
            ) from error
        self.progress = Progress.of(saved["progress"])
        self.progress.spread(self.processes.size)
        generators = [saved["rng_state"], *saved.get("other_rng_states", ())]
        own = generators[self.processes.rank] if len(generators) == self.processes.size else None
        if saved["precision_state"]:
            self.precision.load_state_dict(saved["precision_state"])
        schedules = saved["scheduler_state_dict"]
        if run.is_changed:
            monitors = [config.get("task", {}).get("monitor") for config in (saved["config"], self.about["config"])]
            if monitors[0] != monitors[1]:  # values of different metrics cannot be compared
                self.progress.best_value, self.progress.epochs_without_improvement = None, 0
                schedules = {name: schedule for name, schedule in schedules.items() if name != "plateau"}
            self._schedule_anew(groups, saved["optimizer_state_dict"]["param_groups"], schedules)
            return own
        self.scheduler.load_state_dict(schedules["scheduler"])
        if self.plateau is not None:
            self.plateau.load_state_dict(schedules["plateau"])
        return own

    def _schedule_anew(self, groups: list[dict], saved_groups: list[dict], schedules: dict[str, Any]) -> None:
        """Set the learning rates of the new settings at this step; reductions by the plateau schedule stay."""
        for group, own in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(own)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before", UserWarning)
            for _ in range(self.progress.step):
                self.scheduler.step()
        if self.plateau is None or "plateau" not in schedules:
            return
        judged = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
        self.plateau.load_state_dict({name: schedules["plateau"][name] for name in judged})
        if self.plateau.last_epoch:
            for group, saved in zip(self.optimizer.param_groups, saved_groups, strict=True):
                group["lr"] *= saved["lr"] / saved["initial_lr"]


def optimizer_of(config: dict[str, Any]) -> str:
    """Return the dotted name of the optimizer of a configuration; before it could be chosen it was AdamW.

    >>> optimizer_of({"trainer": {"epochs": 3}}), optimizer_of({"trainer": {"optimizer": {"_target_": "my.lion.Lion"}}})
    ('torch.optim.AdamW', 'my.lion.Lion')
    """
    return str(config.get("trainer", {}).get("optimizer", {}).get("_target_", ADAMW))


def rng_state() -> dict[str, Any]:
    """Return the state of torch's random generators, from which dropout and masks draw.

    The order of the batches depends on the seed and the epoch, and not on these generators.
    """
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_rng_state(state: dict[str, Any]) -> None:
    """Set the state of torch's random generators; with another number of GPUs, that of the CPU's generator alone."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_of_rank(seed: int, rank: int) -> int:
    """Return the seed of a process's own random numbers, of 32 bits because torch's generator for CPUs uses no more.

    >>> len({seed_of_rank(0, 1), seed_of_rank(0, 2), seed_of_rank(1, 1)})
    3
    """
    return int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
