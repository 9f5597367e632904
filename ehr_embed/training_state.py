"""What training changes: written to checkpoints, and put back where a run continues."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ehr_embed.batches import Batch
from ehr_embed.checkpoints import BEST
from ehr_embed.errors import UserError
from ehr_embed.event_embedding import EventEmbedding
from ehr_embed.files import atomic_path, link_file

LATEST = "latest_checkpoint.pt"


@dataclass
class Progress:
    """Where a training run stands; part of every checkpoint.

    Attributes:
        epoch: the last one begun.
        batch: its batches that were trained on; 0 = it is over.
        step: optimizer steps of all epochs.
        loss_sum, n_events, n_padded, n_pairs, seconds: of the epoch as far as it is.
        total_events, total_padded, total_pairs, total_seconds: of the epochs that are over.
        history: a row of metrics for each of those.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    n_events: int = 0
    n_padded: int = 0
    n_pairs: int = 0
    seconds: float = 0.0
    total_events: int = 0
    total_padded: int = 0
    total_pairs: int = 0
    total_seconds: float = 0.0
    best_value: float | None = None
    best_epoch: int = 0
    epochs_without_improvement: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def count(self, batch: Batch) -> None:
        """Add a batch to what the epoch has seen."""
        self.n_events += batch.n_events
        self.n_padded += batch.is_event.numel()
        self.n_pairs += batch.n_pairs

    def end_epoch(self, row: dict[str, Any], value: float, *, is_higher_better: bool) -> None:
        """Add the epoch to the totals, and judge it by its monitored metric."""
        self.total_events += self.n_events
        self.total_padded += self.n_padded
        self.total_pairs += self.n_pairs
        self.total_seconds += self.seconds
        self.batch, self.loss_sum, self.seconds = 0, 0.0, 0.0
        self.n_events, self.n_padded, self.n_pairs = 0, 0, 0
        self.history.append(row)
        sign = 1 if is_higher_better else -1
        if self.best_value is None or sign * value > sign * self.best_value:
            self.best_value, self.best_epoch, self.epochs_without_improvement = value, self.epoch, 0
        else:
            self.epochs_without_improvement += 1


@dataclass
class Continuation:
    """A run to go on with.

    Attributes:
        path: of its latest checkpoint.
        checkpoint: what that holds.
        is_changed: whether this start has other settings; then learning rates and schedule are the new ones, at its step.
    """

    path: Path
    checkpoint: dict[str, Any]
    is_changed: bool = False

    @property
    def seconds(self) -> float:
        """Spent on training up to the checkpoint."""
        progress = self.checkpoint["progress"]
        return float(progress["total_seconds"] + progress["seconds"])


@dataclass
class TrainingState:
    """All that a step or an epoch changes.

    Attributes:
        precision: Fabric's plugin, which has a state where it scales gradients.
        about: what else a checkpoint says: configuration, identity, sizes, classes, digest of the samples.
    """

    model: nn.Module
    embedding: EventEmbedding
    optimizer: Any
    scheduler: Any
    plateau: ReduceLROnPlateau | None
    precision: Any
    about: dict[str, Any]
    progress: Progress = field(default_factory=Progress)

    def save(self, run_dir: Path, rng: dict[str, Any] | None = None) -> None:
        """Write `latest_checkpoint.pt`; `rng` where the generators have moved on since the state to be saved."""
        rest: dict[str, Any] = {
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": {
                name: schedule.state_dict()
                for name, schedule in (("scheduler", self.scheduler), ("plateau", self.plateau))
                if schedule is not None
            },
            "precision_state": self.precision.state_dict(),
        }
        if learned := self.embedding.state_dict():
            rest["embedding_state_dict"] = learned
        write_latest(run_dir, self.model, self.progress, self.about | rest, rng)

    def keep(self, run_dir: Path, *, save_every: int) -> None:
        """Keep the latest checkpoint, of an epoch that is over, as the best one or that epoch's, if it is.

        After the latest is written, and again where a run continues: a kill may have come between the two.
        """
        epoch, names = self.progress.epoch, []
        if self.progress.best_epoch == epoch:
            names.append(BEST)
        if epoch % save_every == 0:
            names.append(f"checkpoint_epoch_{epoch}.pt")
        for name in names:
            link_file(run_dir / LATEST, run_dir / name)

    def restore(self, run: Continuation) -> None:
        """Take over everything of a checkpoint but the random generators, for which see `set_rng_state`.

        Raises:
            UserError: its weights or its optimizer are not of this model's shape.
        """
        saved = run.checkpoint
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            self.model.load_state_dict(saved["model_state_dict"])
            self.embedding.load_state_dict(saved.get("embedding_state_dict", {}))
            self.optimizer.load_state_dict(saved["optimizer_state_dict"])
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{run.path} does not fit this model or its optimizer ({str(error).splitlines()[-1].strip()}), so resume=force "
                "cannot go on from it. Type: run_dir=ANOTHER, or resume=overwrite to start again here"
            ) from error
        self.progress = Progress(**saved["progress"])
        if saved["precision_state"]:
            self.precision.load_state_dict(saved["precision_state"])
        schedules = saved["scheduler_state_dict"]
        if run.is_changed:
            monitors = [config.get("task", {}).get("monitor") for config in (saved["config"], self.about["config"])]
            if monitors[0] != monitors[1]:  # values of two metrics cannot be compared
                self.progress.best_value, self.progress.epochs_without_improvement = None, 0
                schedules = {name: schedule for name, schedule in schedules.items() if name != "plateau"}
            self._schedule_anew(groups, saved["optimizer_state_dict"]["param_groups"], schedules)
            return
        self.scheduler.load_state_dict(schedules["scheduler"])
        if self.plateau is not None:
            self.plateau.load_state_dict(schedules["plateau"])

    def _schedule_anew(self, groups: list[dict], saved_groups: list[dict], schedules: dict[str, Any]) -> None:
        """Rates of the new settings, as if they had been the settings up to this step; halvings of a plateau stay."""
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


def write_latest(
    run_dir: Path, model: nn.Module, progress: Progress, rest: dict[str, Any], rng: dict[str, Any] | None = None
) -> None:
    """Write `latest_checkpoint.pt`: the model's weights, where training stands, the random generators, and `rest`."""
    checkpoint = {
        "model_state_dict": model.state_dict(),
        **rest,
        "epoch": progress.epoch,
        "progress": dict(progress.__dict__),
        "rng_state": rng or rng_state(),
    }
    with atomic_path(run_dir / LATEST) as path:
        torch.save(checkpoint, path)


def rng_state() -> dict[str, Any]:
    """State of torch's generators; dropout and masks draw from no others, and the order of the batches from none."""
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_rng_state(state: dict[str, Any]) -> None:
    """Set torch's generators; on a machine with other GPUs, the CPU's alone."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
