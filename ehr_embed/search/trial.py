"""The trial of the running job: report the monitored metric after every evaluation, and stop the job if the pruner asks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import optuna
from hydra.core.hydra_config import HydraConfig

from ehr_embed.search.storage import open_storage, storage_url

TRIAL_VARIABLE = "EHR_EMBED_TRIAL"
"""Environment variable with the trial's number; the sweeper sets it for jobs whose reports the pruner uses."""


class TrialHandle(Protocol):
    """Interface through which the training loop reports to a search."""

    def report(self, value: float, *, step: int) -> None:
        """Report the monitored metric after evaluation number `step`.

        Raises:
            optuna.TrialPruned: the pruner stops the trial; raised on every rank of a distributed run.
        """


class NoTrial:
    """Handle for a run outside a search: reports nothing."""

    def report(self, value: float, *, step: int) -> None:
        """Do nothing."""


class StudyTrial:
    """Handle for a trial of a stored study.

    Args:
        load: opens the trial with the study's pruner; called on rank 0 only, at the first report.
    """

    def __init__(self, load: Callable[[], optuna.Trial]) -> None:
        self._load = load

    @cached_property
    def _trial(self) -> optuna.Trial:
        return self._load()

    def report(self, value: float, *, step: int) -> None:
        """Report the metric from rank 0, and raise `optuna.TrialPruned` on every rank if the pruner stops the trial."""
        # Looked up, not imported: if torch.distributed is not loaded, there is no process group, and torch stays unloaded.
        distributed: Any = sys.modules.get("torch.distributed")
        is_distributed = distributed is not None and distributed.is_available() and distributed.is_initialized()
        is_over = [False]
        if not is_distributed or distributed.get_rank() == 0:
            self._trial.report(value, step)
            is_over = [self._trial.should_prune()]
        if is_distributed:
            # All ranks must leave the training loop together: a rank that went on would wait for the others forever.
            distributed.broadcast_object_list(is_over, src=0)
        if is_over[0]:
            raise optuna.TrialPruned(f"pruned at step {step}")


def current_trial(build: Callable[..., Any], trusted: Sequence[str] = ()) -> TrialHandle:
    """Return the trial handle of the job that runs in this process; a `NoTrial` outside a search.

    Args:
        build: builds the pruner that a configuration names, as `Application.build` does.
        trusted: further packages from which a pruner's `_target_` may come.
    """
    number = os.environ.get(TRIAL_VARIABLE)
    if number is None or not HydraConfig.initialized():
        return NoTrial()
    hydra = HydraConfig.get()
    url = storage_url(hydra.sweeper.storage, Path(hydra.runtime.cwd) / hydra.sweep.dir)
    name, pruner_config = hydra.sweeper.study_name, hydra.sweeper.pruner

    def load() -> optuna.Trial:
        storage = open_storage(url).storage
        # A storage does not hold the pruner; without this argument Optuna would use its default pruner.
        study = optuna.load_study(study_name=name, storage=storage, pruner=build(pruner_config, trusted=trusted))
        study_id = storage.get_study_id_from_name(name)
        return optuna.Trial(study, storage.get_trial_id_from_study_id_trial_number(study_id, int(number)))

    return StudyTrial(load)
