"""`hydra/sweeper=study`: run Hydra's jobs as trials of an Optuna study."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from ehr_embed.core.errors import UserError
from ehr_embed.core.outcome import Outcome, message_of, read_outcome, split_overrides
from ehr_embed.core.programs import command_line
from ehr_embed.search.application import application
from ehr_embed.search.checks import check_jobs, chosen_directions
from ehr_embed.search.jobs import Job, JobProcess, JobRunner, end_all
from ehr_embed.search.space import parse_space
from ehr_embed.search.storage import open_storage, storage_url
from ehr_embed.search.study import CONTINUES, Owner, open_study
from ehr_embed.search.tracking import tracker_overrides
from ehr_embed.search.trial import TRIAL_VARIABLE
from ehr_embed.search.trial_jobs import TrialRun

log = logging.getLogger(__name__)
POLL_S = 0.1
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


class StudySweeper(Sweeper):
    """Hydra sweeper that takes trials from a shared study and runs them until the study's total is reached.

    With Hydra's basic launcher, `n_jobs` trials run at the same time, each in a process of its own, and a new trial starts
    when one ends. Any other launcher gets the trials in batches of `n_jobs`. conf/hydra/sweeper/study.yaml explains the
    arguments.
    """

    def __init__(
        self,
        *,
        study_name: str,
        storage: str | None,
        n_trials: int | None,
        n_jobs: int,
        direction: str | Sequence[str] | None,
        objectives: Sequence[str] | None,
        seeds: Sequence[int] | None,
        max_failure_rate: float,
        dead_hosts: Sequence[str],
        sampler: DictConfig,
        pruner: DictConfig,
        has_plots: bool,
        table: Sequence[str] | None,
        params: DictConfig | None,
    ) -> None:
        if n_jobs < 1 or (n_trials is not None and n_trials < 1):
            raise UserError(f"hydra.sweeper: n_jobs={n_jobs}, n_trials={n_trials}: expected 1 or more.")
        if not 0 <= max_failure_rate <= 1:
            raise UserError(f"hydra.sweeper.max_failure_rate={max_failure_rate}: expected a share from 0 to 1.")
        self.study_name, self.storage, self.n_trials, self.n_jobs = study_name, storage, n_trials, n_jobs
        self.direction, self.objectives, self.seeds = direction, list(objectives or []), list(seeds or [])
        self.max_failure_rate, self.dead_hosts = max_failure_rate, list(dead_hosts)
        self.sampler_config, self.pruner_config, self.has_plots = sampler, pruner, has_plots
        self.columns = list(table or [])
        self.params: dict[str, Any] = dict(OmegaConf.to_container(params) or {}) if params is not None else {}  # type: ignore[arg-type]
        self.fixed: list[str] = []

    # Hydra's base class declares these two as optional, since only `setup` sets them.
    hydra_context: HydraContext
    config: DictConfig

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take over the context, the job function and the configuration from Hydra, and build a launcher if one is chosen."""
        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function
        self.launcher: Launcher | None = None
        if config.hydra.launcher._target_ != BASIC_LAUNCHER:
            self.launcher = Plugins.instance().instantiate_launcher(
                hydra_context=hydra_context, task_function=task_function, config=config
            )

    def sweep(self, arguments: list[str]) -> None:
        """Search until the study has all its trials, then write the report; an interrupted search writes the report too.

        Raises:
            UserError: the settings cannot work (raised before the first trial), or too many jobs failed.
        """
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        # This sweeper logs each trial itself, so Optuna's own messages would be a second line per trial.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder = Path(self.config.hydra.runtime.cwd, self.config.hydra.sweep.dir)
        self._prepare(arguments)
        self.shared.end_running(lambda owner: owner is None or owner.is_dead(self.dead_hosts))
        self.n_failed = 0
        try:
            with sigterm_as_exit():
                if self.launcher is None:
                    self._run_processes()
                else:
                    self._run_batches(self.launcher)
        finally:
            # Imported here, because pandas and the plots take a second to load, and a single run does not need them.
            from ehr_embed.search.study_report import report_study

            table = report_study(self.shared, self.folder, command=command_line(), has_plots=self.has_plots)
        if self.shared.is_over():
            from ehr_embed.search.tracking import log_search

            log_search(self.example, self.shared.study, self.folder, table)
            if self.columns:
                self._tabulate()

    def _tabulate(self) -> None:
        """Write and print the table with one row per trial, and means over the trial's seeds."""
        names = [parameter.name for parameter in self.shared.space.parameters]
        application().tabulate(self.folder, metrics=self.columns, by=names, stem=self.folder / self.study_name)

    def _prepare(self, arguments: list[str]) -> None:
        """Check all settings and open the study, before any job starts."""
        loader = self.hydra_context.config_loader
        space, self.fixed = parse_space(arguments, self.params, loader)
        examples = check_jobs(space, self.fixed, loader, self.config)
        self.example = examples[0]
        names = [parameter.name for parameter in space.parameters] + list(split_overrides(self.fixed))
        if self.seeds and "seed" in names:
            raise UserError("hydra.sweeper.seeds and an override of seed exclude each other: give one of them.")
        directions = chosen_directions(self.direction, self.objectives, examples)
        # The pruner may judge a trial after each epoch only if the trial is one job and its objective is the monitored metric.
        self.jobs_report = len(directions) == 1 and not self.seeds and not self.objectives
        trusted = list(self.example.get("trusted_packages") or [])
        self.shared = open_study(
            open_storage(storage_url(self.storage, self.folder)),
            name=self.study_name,
            space=space,
            fixed=self.fixed,
            directions=directions,
            facts={
                "objectives": self.objectives,
                "seeds": self.seeds,
                "data": application().data_identity(self.example),
            },
            n_trials=self.n_trials,
            sampler=application().build(self.sampler_config, trusted=trusted),
            pruner=application().build(self.pruner_config, trusted=trusted),
        )

    def _run_processes(self) -> None:
        """Keep `n_jobs` trials running; each slot runs the jobs of one trial, one after another."""
        runner = JobRunner(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=self.config,
            n_slots=self.n_jobs,
        )
        runs: dict[int, TrialRun] = {}
        processes: dict[int, JobProcess] = {}
        try:
            while True:
                for slot in range(self.n_jobs):
                    if slot not in runs and (run := self._ask()) is not None:
                        runs[slot] = run
                        processes[slot] = runner.start(run.next_job(), slot)
                if not runs:
                    return
                time.sleep(POLL_S)
                for slot in [slot for slot in runs if not processes[slot].is_running()]:
                    runs[slot].add(processes[slot].outcome())
                    if not runs[slot].is_over():
                        processes[slot] = runner.start(runs[slot].next_job(), slot)
                        continue
                    self._finish(runs[slot])
                    del runs[slot]
        finally:
            # Jobs are left here only if the search was stopped: by Ctrl-C, by SIGTERM, or after too many failures.
            end_all([processes[slot] for slot in runs if slot in processes])
            self._end_own()

    def _run_batches(self, launcher: Launcher) -> None:
        """Hand `n_jobs` trials at a time to a launcher, together with all their seeds."""
        runs: list[TrialRun] = []
        try:
            while True:
                while len(runs) < self.n_jobs and (run := self._ask()) is not None:
                    runs.append(run)
                if not runs:
                    return
                self._launch(launcher, [(run, job) for run in runs for job in run.jobs])
                while runs:
                    self._finish(runs[0])
                    del runs[0]
        finally:
            self._end_own()

    def _launch(self, launcher: Launcher, jobs: Sequence[tuple[TrialRun, Job]]) -> None:
        message = "the launcher left no outcome for this job"
        try:
            launcher.launch([job.overrides for _, job in jobs], initial_job_idx=jobs[0][1].number)
        except Exception as error:  # a launcher may raise anything: a job was killed, a queue refused it
            message = f"the launcher failed: {message_of(error)}"
            log.warning(message)
        for run, job in jobs:
            # A trial ends with its first failed seed; the outcomes of the later seeds are not used.
            if not run.is_over():
                run.add(read_outcome(job.folder) or Outcome("failed", error=message))

    def _ask(self) -> TrialRun | None:
        trial = self.shared.ask()
        if trial is None:
            return None
        overrides = [*self.fixed, *self.shared.space.overrides(trial.params)]
        trial.set_user_attr("overrides", overrides)
        # If this search is killed, a later one finds the files of the trial in this folder.
        folder = self.folder / str(trial.number)
        trial.set_user_attr("folder", str(folder))
        interrupted = Path(trial.user_attrs.get(CONTINUES, folder))
        if interrupted.parent == self.folder and interrupted.is_dir() and not folder.exists():
            interrupted.rename(folder)
        jobs = [self._job(trial.number, seed, overrides) for seed in (*self.seeds,) or (None,)]
        n_objectives = len(self.shared.study.directions)
        return TrialRun(trial, jobs, objectives=self.objectives, n_objectives=n_objectives)

    def _job(self, number: int, seed: int | None, overrides: Sequence[str]) -> Job:
        subfolder = str(number) if seed is None else f"{number}/seed_{seed}"
        own = [f"hydra.sweep.subdir={subfolder}", *tracker_overrides(self.example, self.study_name, number, seed)]
        if seed is not None:
            own.append(f"seed={seed}")
        if self.jobs_report:
            own.append(f"++hydra.job.env_set.{TRIAL_VARIABLE}='{number}'")
        return Job(number, [*overrides, *own], self.folder / subfolder)

    def _finish(self, run: TrialRun) -> None:
        outcome = run.outcome()
        self.shared.finish(run.number, outcome)
        shown = " ".join(self.shared.space.overrides(run.trial.params))
        told = ", ".join(f"{value:.4g}" for value in outcome.values or []) if outcome.state == "finished" else ""
        log.info("trial %d %s %s (%s) %s", run.number, outcome.state, told, shown, outcome.error or "")
        self.n_failed += outcome.state == "failed"
        if self.n_failed > self.max_failure_rate * self.shared.n_trials:
            raise UserError(
                f"{self.n_failed} of {self.shared.n_trials} trials failed, more than "
                f"hydra.sweeper.max_failure_rate={self.max_failure_rate} allows. Trial {run.number}: {outcome.error} "
                "Remove the cause and type the same command again for the remaining trials, or raise max_failure_rate."
            )

    def _end_own(self) -> None:
        """Give back all trials that this process has not finished, including one that it was just taking when interrupted."""
        me = Owner.this_process()
        self.shared.end_running(lambda owner: owner == me)


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Turn SIGTERM, which schedulers send, into SystemExit, so that the search ends its jobs and reports as after Ctrl-C.

    Python allows signal handlers in the main thread only; in other threads this context manager does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
