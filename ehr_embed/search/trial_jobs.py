"""Run a trial as one job, or as one job per seed, and combine the outcomes of its jobs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import optuna

from ehr_embed.core.outcome import Outcome
from ehr_embed.search.application import application
from ehr_embed.search.jobs import Job


class TrialRun:
    """State of a running trial: its jobs, and the outcomes of those that ended.

    Args:
        trial: the Optuna trial.
        jobs: jobs of the trial in order: a single one, or one per seed.
        objectives: dotted names in `metrics.json`; empty = the values that the job returns.
        n_objectives: number of values that each job must yield.
    """

    def __init__(
        self, trial: optuna.Trial, jobs: Sequence[Job], *, objectives: Sequence[str], n_objectives: int
    ) -> None:
        self.trial, self.number, self.jobs = trial, trial.number, list(jobs)
        self._objectives, self._n_objectives = list(objectives), n_objectives
        self._outcomes: list[Outcome] = []
        self._is_pruned = False

    def next_job(self) -> Job:
        """Return the first job that has no outcome yet."""
        return self.jobs[len(self._outcomes)]

    def add(self, outcome: Outcome) -> None:
        """Add the outcome of the next job. With several jobs, report its value to the pruner as one step of the trial."""
        outcome = application().with_results(outcome, self.next_job().folder, self._objectives, self._n_objectives)
        self._outcomes.append(outcome)
        if len(self.jobs) > 1 and self._n_objectives == 1 and outcome.state == "finished":
            assert outcome.values is not None
            self.trial.report(outcome.values[0], len(self._outcomes) - 1)
            self._is_pruned = len(self._outcomes) < len(self.jobs) and self.trial.should_prune()

    def is_over(self) -> bool:
        """Return whether no further job of this trial is to run: all have run, one failed, or the pruner stops the trial."""
        if not self._outcomes:
            return False
        return len(self._outcomes) == len(self.jobs) or self._is_pruned or self._outcomes[-1].state != "finished"

    def outcome(self) -> Outcome:
        """Return the outcome of the only job, or the combined outcome over the seeds."""
        return combine(self._outcomes, n_jobs=len(self.jobs))


def combine(outcomes: Sequence[Outcome], *, n_jobs: int) -> Outcome:
    """Combine the outcomes of all seeds: the first failed or pruned one if there is one, else the means over the seeds.

    The result is pruned, with means over the seeds that ran, if fewer than `n_jobs` seeds ran.

    >>> both = combine([Outcome("finished", [0.5], seconds=1.0), Outcome("finished", [0.7], seconds=2.0)], n_jobs=2)
    >>> both.values, both.seconds, round(both.results["objective_sd"], 3)
    ([0.6], 3.0, 0.141)
    """
    if n_jobs == 1:
        return outcomes[0]
    seconds = sum(outcome.seconds or 0.0 for outcome in outcomes)
    ended = next((outcome for outcome in outcomes if outcome.state != "finished"), None)
    if ended is not None:
        return Outcome(ended.state, error=ended.error, seconds=seconds, results=ended.results)
    values = [outcome.values or [] for outcome in outcomes]
    means = [fmean(column) for column in zip(*values, strict=True)]
    results: dict[str, Any] = {"n_seeds": len(outcomes)}
    if len(outcomes) > 1:
        results["objective_sd"] = stdev(column[0] for column in values)
    for name in outcomes[0].results:
        column: list[Any] = [outcome.results.get(name) for outcome in outcomes]
        # The mean of confidence limits over seeds is not a confidence limit of the mean, so these columns are left out.
        if all(isinstance(item, int | float) for item in column) and not name.endswith(("/low", "/high")):
            results[name] = fmean(column)
    state = "finished" if len(outcomes) == n_jobs else "pruned"
    return Outcome("finished" if state == "finished" else "pruned", means, seconds=seconds, results=results)
