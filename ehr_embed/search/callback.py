"""Hydra callback of a multirun: write the outcome of every job into its folder, and a summary of all jobs at the end."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from ehr_embed.core.outcome import OUTCOME, outcome_of, write_outcome
from ehr_embed.search.application import application

log = logging.getLogger(__name__)
STUDY_SWEEPER = "ehr_embed.search.sweeper.StudySweeper"


class SearchCallback(Callback):
    """Hydra callback that writes `outcome.json` into the folder of every job and, after the last job, a summary of all jobs."""

    def __init__(self) -> None:
        self._began = 0.0

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remove the outcome that an earlier job left in this folder, and start the clock."""
        self._began = time.perf_counter()
        if config.hydra.mode == RunMode.MULTIRUN:
            (Path(config.hydra.runtime.output_dir) / OUTCOME).unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Write how the job ended; this runs in the process of the job, whichever launcher started it."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        # Imported here because single runs do not need Optuna.
        from optuna import TrialPruned

        returned = job_return._return_value
        is_trial = config.hydra.sweeper.get("_target_") == STUDY_SWEEPER
        if is_trial and job_return.status == JobStatus.FAILED and not isinstance(returned, TrialPruned):
            # Other sweepers raise the exception again. A study goes on, so the traceback must be logged here or is lost.
            log.error("the job failed", exc_info=returned)
        folder = Path(config.hydra.runtime.output_dir)
        seconds = time.perf_counter() - self._began
        write_outcome(folder, outcome_of(returned, seconds=seconds, overrides=job_return.overrides or []))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the summary of the jobs; the study sweeper writes its own, also when the search is interrupted."""
        if config.hydra.sweeper.get("_target_") == STUDY_SWEEPER:
            return
        application().report_folder(Path(config.hydra.sweep.dir))
