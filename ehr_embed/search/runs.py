"""A trial as one job, or one job a seed, and how their outcomes become the trial's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import optuna

from ehr_embed.errors import UserError, unknown_name
from ehr_embed.files import read_json
from ehr_embed.search.jobs import Job
from ehr_embed.search.outcome import Outcome, message_of
from ehr_embed.search.results import read_results


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


def with_results(outcome: Outcome, folder: Path, objectives: Sequence[str], n_objectives: int) -> Outcome:
    """Add what the job measured, take the objectives from it if they are named, and refuse a wrong number of them."""
    if outcome.state == "failed":
        return outcome
    try:
        outcome.results = read_results(folder)
        if outcome.state == "finished" and objectives:
            metrics = read_json(folder / "metrics.json")
            outcome.values = [objective_of(metrics, name) for name in objectives]
    except (UserError, OSError) as error:
        return Outcome("failed", error=message_of(error), seconds=outcome.seconds, overrides=outcome.overrides)
    n_values = len(outcome.values or [])
    if outcome.state == "finished" and n_values != n_objectives:
        outcome.state = "failed"
        outcome.error = f"the job yields {n_values} values, but the study has {n_objectives} directions"
    return outcome


def objective_of(metrics: dict[str, Any], name: str) -> float:
    """A number of `metrics.json` by its dotted name; a metric's value stands for the metric.

    Raises:
        UserError: there is none of this name.

    >>> objective_of({"tuning": {"auroc": {"value": 0.8, "low": 0.7, "high": 0.9}}}, "tuning.auroc")
    0.8
    """
    node: Any = metrics
    for part in name.split("."):
        if not isinstance(node, dict) or part not in node:
            valid = node if isinstance(node, dict) else []
            raise unknown_name(f"part of hydra.sweeper.objectives={name}:", part, valid)
        node = node[part]
    value = node["value"] if isinstance(node, dict) and "value" in node else node
    if not isinstance(value, int | float):
        raise UserError(f"hydra.sweeper.objectives={name}: expected the name of a number in metrics.json.")
    return float(value)


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
