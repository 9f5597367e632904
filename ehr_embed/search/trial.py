"""The trial a job belongs to: told the monitored metric every evaluation, it stops the job when the pruner says so."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import optuna
from hydra.core.hydra_config import HydraConfig

from ehr_embed.config.instantiate import instantiate
from ehr_embed.search.storage import open_storage, storage_url

TRIAL_VARIABLE = "EHR_EMBED_TRIAL"
"""Environment variable with the trial's number, set by the sweeper for jobs whose reports count."""


class TrialHandle(Protocol):
    """What the training loop sees of a search."""

    def report(self, value: float, *, step: int) -> None:
        """Tell the monitored metric after evaluation `step`.

        Raises:
            optuna.TrialPruned: the trial is to stop; on every rank of a distributed run.
        """


class NoTrial:
    """Outside a search nothing is reported."""

    def report(self, value: float, *, step: int) -> None:
        """Nothing to do."""


class StudyTrial:
    """A trial of a stored study.

    Args:
        load: opens the trial, with the study's pruner; called on rank 0 only, at the first report.
    """

    def __init__(self, load: Callable[[], optuna.Trial]) -> None:
        self._load = load

    @cached_property
    def _trial(self) -> optuna.Trial:
        return self._load()

    def report(self, value: float, *, step: int) -> None:
        # Not imported: where nobody has loaded it, there is no process group.
        distributed: Any = sys.modules.get("torch.distributed")
        is_distributed = distributed is not None and distributed.is_available() and distributed.is_initialized()
        is_over = [False]
        if not is_distributed or distributed.get_rank() == 0:
            self._trial.report(value, step)
            is_over = [self._trial.should_prune()]
        if is_distributed:
            # All ranks leave the loop together: one that went on would wait for the others for ever.
            distributed.broadcast_object_list(is_over, src=0)
        if is_over[0]:
            raise optuna.TrialPruned(f"pruned at step {step}")


def current_trial(trusted: Sequence[str] = ()) -> TrialHandle:
    """The handle of the job that runs in this process.

    Args:
        trusted: further packages a pruner's `_target_` may come from.
    """
    number = os.environ.get(TRIAL_VARIABLE)
    if number is None or not HydraConfig.initialized():
        return NoTrial()
    hydra = HydraConfig.get()
    url = storage_url(hydra.sweeper.storage, Path(hydra.runtime.cwd) / hydra.sweep.dir)
    name, pruner_config = hydra.sweeper.study_name, hydra.sweeper.pruner

    def load() -> optuna.Trial:
        storage = open_storage(url).storage
        # The pruner is no part of what is stored: without it the study would fall back to Optuna's default.
        study = optuna.load_study(study_name=name, storage=storage, pruner=instantiate(pruner_config, trusted=trusted))
        study_id = storage.get_study_id_from_name(name)
        return optuna.Trial(study, storage.get_trial_id_from_study_id_trial_number(study_id, int(number)))

    return StudyTrial(load)
