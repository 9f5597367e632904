"""What training changes: written to checkpoints, and put back where a run continues."""

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
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import link_file
from ehr_embed.data.batches import Batch
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.run_folder.checkpoints import Continuation, write_latest
from ehr_embed.run_folder.layout import BEST, LATEST, epoch_checkpoint
from ehr_embed.training.ema import Ema
from ehr_embed.training.processes import Processes
from ehr_embed.training.sharding import load_optimizer, load_weights, whole


@dataclass
class Progress:
    """Where a training run stands; part of every checkpoint.

    Attributes:
        epoch: the last one begun.
        batch: its batches that were trained on; 0 = it is over.
        step: optimizer steps of all epochs.
        loss_sum, loss_count: of the epoch as far as it is: the sum of the losses, and how many events or samples they are of.
        n_events, n_padded, n_pairs, seconds: likewise.
        total_events, total_padded, total_pairs, total_seconds: of the epochs that are over.
        n_processes: that these figures and `batch` are of one of, on average.
        history: a row of metrics for each of those.
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

        A checkpoint of an earlier version has the sum of its batches' mean losses and no count: then each batch of the epoch it
        stopped in counts as one event or sample.

        >>> Progress.of({"epoch": 3, "batch": 2, "loss_sum": 1.5}).loss
        0.75
        """
        return cls(**{"loss_count": float(saved["batch"]), **saved})

    @property
    def loss(self) -> float:
        """Return the mean loss of the epoch as far as it is; 0 where nothing was counted."""
        return self.loss_sum / self.loss_count if self.loss_count else 0.0

    def count(self, batch: Batch) -> None:
        """Add a batch to what the epoch has seen."""
        self.n_events += batch.n_events
        self.n_padded += batch.is_event.numel()
        self.n_pairs += batch.n_pairs

    def average(self, losses: Sequence[float], processes: Processes) -> None:
        """Take the mean over the processes of what each has counted in this epoch; `losses` are its `loss_sum` and `loss_count`."""
        counted = (*losses, self.n_events, self.n_padded, self.n_pairs)
        self.loss_sum, self.loss_count, self.n_events, self.n_padded, self.n_pairs = processes.means(counted)

    def spread(self, n: int) -> None:
        """Count as one of `n` processes: a run goes on with another number of them near the batch where it was."""
        self.batch = math.ceil(self.batch * self.n_processes / n)
        counts = ("loss_sum", "loss_count", "n_events", "n_padded", "n_pairs")
        for name in (*counts, "total_events", "total_padded", "total_pairs"):
            setattr(self, name, getattr(self, name) * self.n_processes / n)
        self.n_processes = n

    def end_epoch(self, row: dict[str, Any], value: float, *, is_higher_better: bool, keeps_last: bool = False) -> None:
        """Add the epoch to the totals, and judge it by its monitored metric; with `keeps_last` it counts as the best so far."""
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
    """All that a step or an epoch changes.

    Attributes:
        precision: Fabric's plugin, which has a state where it scales gradients.
        about: what else a checkpoint says: configuration, identity, sizes, classes, digest of the samples.
        processes: that train together; all must ask to save or restore, and rank 0 writes.
        ema: averages of the weights that the run predicts with, and which a checkpoint's `model_state_dict` then holds; those
            that learn are beside them.
    """

    model: nn.Module
    embedding: EventEmbedding
    optimizer: Any
    scheduler: Any
    plateau: ReduceLROnPlateau | None
    precision: Any
    about: dict[str, Any]
    processes: Processes
    progress: Progress = field(default_factory=Progress)
    ema: Ema | None = None

    def __post_init__(self) -> None:
        self.progress.n_processes = self.processes.size

    def averaged(self) -> AbstractContextManager[None]:
        """Put the averages where the weights are, as long as something is predicted; without `ema` nothing changes."""
        return nullcontext() if self.ema is None else self.ema.in_place()

    def save(self, run_dir: Path, rng: dict[str, Any] | None = None) -> None:
        """Write `latest_checkpoint.pt`; `rng` where the generators have moved on since the state to be saved."""
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
        if others:
            rest["other_rng_states"] = others
        write_latest(run_dir, weights, dict(vars(self.progress)), self.about | rest, rng)

    def keep(self, run_dir: Path, *, save_every: int) -> None:
        """Keep the latest checkpoint, of an epoch that is over, as the best one or that epoch's, if it is.

        After the latest is written, and again where a run continues: a kill may have come between the two.
        """
        epoch, names = self.progress.epoch, []
        if self.progress.best_epoch == epoch:
            names.append(BEST)
        if epoch % save_every == 0:
            names.append(epoch_checkpoint(epoch))
        for name in names:
            link_file(run_dir / LATEST, run_dir / name)

    def restore(self, run: Continuation) -> dict[str, Any] | None:
        """Take over everything of a checkpoint but the random generators.

        Returns:
            State of this process's generators, for `set_rng_state`; None where another number of processes saved them.

        Raises:
            UserError: its weights or its optimizer are not of this model's shape.
        """
        saved = run.checkpoint
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
            if monitors[0] != monitors[1]:  # values of two metrics cannot be compared
                self.progress.best_value, self.progress.epochs_without_improvement = None, 0
                schedules = {name: schedule for name, schedule in schedules.items() if name != "plateau"}
            self._schedule_anew(groups, saved["optimizer_state_dict"]["param_groups"], schedules)
            return own
        self.scheduler.load_state_dict(schedules["scheduler"])
        if self.plateau is not None:
            self.plateau.load_state_dict(schedules["plateau"])
        return own

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


def rng_state() -> dict[str, Any]:
    """State of torch's generators; dropout and masks draw from no others, and the order of the batches from none."""
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_rng_state(state: dict[str, Any]) -> None:
    """Set torch's generators; on a machine with other GPUs, the CPU's alone."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_of_rank(seed: int, rank: int) -> int:
    """A seed for what a process draws by itself; of 32 bits, as torch's generator for CPUs leaves out the others.

    >>> len({seed_of_rank(0, 1), seed_of_rank(0, 2), seed_of_rank(1, 1)})
    3
    """
    return int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
