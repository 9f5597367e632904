"""A trial as one job, or one job a seed, and how their outcomes become the trial's."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import optuna

from ehr_embed.comparison.outcome import Outcome
from ehr_embed.comparison.results import with_results
from ehr_embed.search.jobs import Job


class TrialRun:
    """A trial while it runs.

    Args:
        trial: Optuna's.
        jobs: its jobs, in order; several = one a seed.
        objectives: dotted names in `metrics.json`; empty = what the job returns.
        n_objectives: values a job must yield.
    """

    def __init__(
        self, trial: optuna.Trial, jobs: Sequence[Job], *, objectives: Sequence[str], n_objectives: int
    ) -> None:
        self.trial, self.number, self.jobs = trial, trial.number, list(jobs)
        self._objectives, self._n_objectives = list(objectives), n_objectives
        self._outcomes: list[Outcome] = []
        self._is_pruned = False

    def next_job(self) -> Job:
        return self.jobs[len(self._outcomes)]

    def add(self, outcome: Outcome) -> None:
        """Take the outcome of the next job. With several, each value is a step that the pruner judges."""
        outcome = with_results(outcome, self.next_job().folder, self._objectives, self._n_objectives)
        self._outcomes.append(outcome)
        if len(self.jobs) > 1 and self._n_objectives == 1 and outcome.state == "finished":
            assert outcome.values is not None
            self.trial.report(outcome.values[0], len(self._outcomes) - 1)
            self._is_pruned = len(self._outcomes) < len(self.jobs) and self.trial.should_prune()

    def is_over(self) -> bool:
        """Whether no further job of this trial is to run: all have, one failed, or the pruner has seen enough."""
        if not self._outcomes:
            return False
        return len(self._outcomes) == len(self.jobs) or self._is_pruned or self._outcomes[-1].state != "finished"

    def outcome(self) -> Outcome:
        """That of the only job, or over the seeds."""
        return combine(self._outcomes, n_jobs=len(self.jobs))


def combine(outcomes: Sequence[Outcome], *, n_jobs: int) -> Outcome:
    """One outcome of all: the first that failed, pruned if any was cut short, else means over the seeds.

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
        # The interval of a mean over seeds is not the mean of their intervals.
        if all(isinstance(item, int | float) for item in column) and not name.endswith(("/low", "/high")):
            results[name] = fmean(column)
    state = "finished" if len(outcomes) == n_jobs else "pruned"
    return Outcome("finished" if state == "finished" else "pruned", means, seconds=seconds, results=results)
