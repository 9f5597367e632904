"""What Hydra calls around the jobs of a multirun: each leaves its outcome, and the end leaves a summary."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

log = logging.getLogger(__name__)
STUDY_SWEEPER = "ehr_embed.search.sweeper.StudySweeper"


class SearchCallback(Callback):
    """Leaves `outcome.json` in every job's folder and, after the jobs of any sweeper, the summary of all."""

    def __init__(self) -> None:
        self._began = 0.0

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Forget what an earlier job left in this folder."""
        self._began = time.perf_counter()
        if config.hydra.mode == RunMode.MULTIRUN:
            from ehr_embed.run_folder.layout import OUTCOME

            (Path(config.hydra.runtime.output_dir) / OUTCOME).unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Leave how the job ended, in the process that ran it, whichever launcher started it."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        # Not needed by single runs.
        from optuna import TrialPruned

        from ehr_embed.comparison.outcome import outcome_of, write_outcome

        returned = job_return._return_value
        is_trial = config.hydra.sweeper.get("_target_") == STUDY_SWEEPER
        if is_trial and job_return.status == JobStatus.FAILED and not isinstance(returned, TrialPruned):
            # Other sweepers raise it again; a study goes on, and this is the last that sees where it came from.
            log.error("the job failed", exc_info=returned)
        folder = Path(config.hydra.runtime.output_dir)
        seconds = time.perf_counter() - self._began
        write_outcome(folder, outcome_of(returned, seconds=seconds, overrides=job_return.overrides or []))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Summarise the jobs; a study's sweeper has done so itself, as it does when it is interrupted."""
        if config.hydra.sweeper.get("_target_") == STUDY_SWEEPER:
            return
        from ehr_embed.comparison.report import report_folder

        report_folder(Path(config.hydra.sweep.dir))
