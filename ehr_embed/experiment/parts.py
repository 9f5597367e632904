"""The parts that a stage hands on from step to step: its plan, its inputs, what was built of them, and what was fitted."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from ehr_embed.calibration.protocol import Calibration
from ehr_embed.core.errors import UserError
from ehr_embed.embedding.aligning import AlignmentSettings
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.embedding.match_table import Alignment
from ehr_embed.embedding.prepare import Prepared
from ehr_embed.models.gbm import GBM
from ehr_embed.run_folder.checkpoints import Continuation, read_checkpoint
from ehr_embed.run_folder.origin import Origin
from ehr_embed.search.trial import TrialHandle
from ehr_embed.sources.protocol import Source
from ehr_embed.tasks.protocol import Outputs, TakesSizes, Task
from ehr_embed.trackers.protocol import Tracker
from ehr_embed.training.processes import Processes
from ehr_embed.training.settings import TrainerSettings
from ehr_embed.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The request to a stage: its configuration, folder, first weights and processes.

    Attributes:
        cfg: the composed configuration.
        config: the same as plain values, as config.yaml and every checkpoint keep it.
        run_dir: the folder in which the stage leaves everything.
        init_from: a run or checkpoint that the weights start from; None = the model's own start.
        trial: the search's trial, which is told the monitored metric of each epoch.
        settings: how to train.
        processes: those that train together.
        task: before `setup`.
        alignment: whether and how codes that the run of `init_from` never saw are aligned with its own.
        calibration: how the outputs are calibrated after training.
        began: `time.perf_counter()` at the start of the stage.
    """

    cfg: DictConfig
    config: dict[str, Any]
    run_dir: Path
    init_from: str | Path | None
    trial: TrialHandle
    settings: TrainerSettings
    processes: Processes
    task: Task
    alignment: AlignmentSettings
    calibration: Calibration
    began: float

    @property
    def pools_codes(self) -> bool:
        """Return whether codes of pooled datasets are read as each other's; only data=pooled has the key."""
        return self.cfg.data.get("pool_codes", "own") == "aligned"

    @property
    def is_trained(self) -> bool:
        """Return whether this stage fits anything; otherwise it only evaluates the model of `init_from`."""
        return self.task.is_trained and self.settings.epochs > 0


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The data that a stage reads; at most one of `aligned` and `pooled` is there.

    Attributes:
        source: where the events come from.
        prepared: the event store and the embedding table; of an aligned dataset the events whose codes have a match, and the
            vectors of the codes that they match.
        aligned: the run that the weights start from and the match table; None = codes are read as they are.
        pooled: the match table of pooled datasets with each other; None = codes are read as they are.
        audited: findings of the leakage audit; None where the audit is off.
    """

    source: Source
    prepared: Prepared
    aligned: tuple[Origin, Alignment] | None
    pooled: Alignment | None
    audited: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Built:
    """The objects that a stage trains with.

    Attributes:
        model, embedding: with the weights that they start from.
        trainer: the training loop.
        tracker: not yet entered.
        teacher: the unfitted model behind `trainer.teacher`; None = there is none.
        start: the checkpoint of an earlier start to go on from; None = from the beginning.
        made_from: digests of the run's inputs, for its manifest.
        is_aligned: whether codes are read as those of the run that the weights start from.
        predicted: the splits that are predicted for.
    """

    model: nn.Module
    embedding: EventEmbedding
    trainer: Trainer
    tracker: Tracker
    teacher: GBM | None
    start: Continuation | None
    made_from: dict[str, Any]
    is_aligned: bool
    predicted: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The outputs of the best checkpoint, and the facts of its training.

    Attributes:
        facts: of the training, for metrics.json.
        history: one row of metrics per epoch.
        outputs: the task's outputs (n, n_outputs) of each evaluated split, and of train where nothing was trained on it.
    """

    facts: dict[str, Any]
    history: list[dict[str, Any]]
    outputs: dict[str, Outputs]


@dataclass(frozen=True, kw_only=True)
class EpochLog:
    """Tells the tracker, the user and the search how an epoch went."""

    tracker: Tracker
    trial: TrialHandle
    monitor: str
    is_first: bool

    def __call__(self, row: dict[str, float], epoch: int) -> None:
        """Tell one epoch's row of metrics.

        Raises:
            optuna.TrialPruned: the search ends this trial.
        """
        value = row[f"tuning/{self.monitor}"]
        if self.is_first:
            self.tracker.log(row, step=epoch)
            log.info(
                "epoch %d: train loss %.4f, tuning loss %.4f%s, %s events/s",
                row["epoch"], row["train/loss"], row["tuning/loss"],
                # A task that is monitored by its loss would say it twice.
                "" if self.monitor == "loss" and value == row["tuning/loss"] else f", tuning {self.monitor} {value:.4f}",
                f"{row['train/events_per_s']:,.0f}",
            )  # fmt: skip
        self.trial.report(value, step=epoch)


def give_sizes(task: TakesSizes, init_from: str | Path | None, prepared: Prepared) -> None:
    """Give a task the sizes of the run that the weights come from.

    Raises:
        UserError: that run has another vocabulary, whose token ids its sizes mean, or cannot be asked.
    """
    assert init_from is not None, "a task that trains nothing is refused without a run to start from"
    path, checkpoint = read_checkpoint(init_from)
    theirs, ours = checkpoint["identity"]["vocab_sha256"], prepared.identity["vocab_sha256"]
    if theirs != ours:
        raise UserError(
            f"{path} has the vocabulary {theirs[:12]} and this dataset {ours[:12]}: the rates of its events would be those of "
            f"others. Type: python -m ehr_embed.ask run={init_from} data.root=DIR, which reads new codes by their texts"
        )
    task.take_sizes(checkpoint["sizes"], path)
