"""A study that many processes share: open it or refuse it, take its trials one at a time, give back those of dead processes."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ehr_embed.core.errors import UserError
from ehr_embed.core.fingerprints import is_same
from ehr_embed.core.outcome import Outcome, read_outcome
from ehr_embed.core.secrets import masked
from ehr_embed.search.application import application
from ehr_embed.search.grid import GridSampler
from ehr_embed.search.space import Space, point_key
from ehr_embed.search.storage import StudyStorage

log = logging.getLogger(__name__)
DISCARDED = "discarded"
"""User attribute of a trial that counts as no result: `interrupted`, or `repetition` of another trial's point."""
CONTINUES = "continues"
"""User attribute of a trial that repeats an interrupted one: the folder of that trial, from which its job resumes."""
HOST_KEYS = ("cache_dir", "run_dir", "data.root", "tracker", "trainer.accelerator")
"""Fixed overrides that may differ between the hosts of one study."""


@dataclass(frozen=True)
class Owner:
    """The process that runs a trial.

    Attributes:
        host: host name.
        pid: process id on that host.
        started: start time of the process, which distinguishes it from a later process with the same id.
    """

    host: str
    pid: int
    started: str

    @classmethod
    def this_process(cls) -> Owner:
        """Return the present process as an owner."""
        return cls(socket.gethostname(), os.getpid(), _start_time(os.getpid()))

    @classmethod
    def of(cls, trial: FrozenTrial) -> Owner | None:
        """Return the owner that a trial stores; None if it stores none."""
        stored = trial.user_attrs.get("owner")
        return cls(**stored) if stored else None

    def is_dead(self, dead_hosts: Sequence[str]) -> bool:
        """Return whether the process has ended; a process on another host counts as dead only if `dead_hosts` names it."""
        if self.host in dead_hosts:
            return True
        return self.host == socket.gethostname() and _start_time(self.pid) != self.started


def _start_time(pid: int) -> str:
    """Return the clock ticks from boot to the start of a process; empty if there is no such process."""
    try:
        # The second field, the command in parentheses, may itself contain spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return ""
    if os.name != "posix":  # Windows would take signal 0 for Ctrl-C
        return "unknown"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "unknown"


@dataclass
class SharedStudy:
    """An Optuna study together with the space, the number of trials and the lock that its processes share.

    Args:
        study: the Optuna study, with its sampler and pruner.
        storage: storage of the study.
        space: search space.
        n_trials: total number of trials, over all processes and all runs of the command.
        objectives: dotted names in `metrics.json`; empty = the values that the job returns.
    """

    study: optuna.Study
    storage: StudyStorage
    space: Space
    n_trials: int
    objectives: Sequence[str] = ()

    def ask(self) -> optuna.Trial | None:
        """Take the next trial, at an untried point; return None if the total is reached or no point is left."""
        with self.storage.lock(self.study.study_name):
            trials = self.study.get_trials(deepcopy=False)
            if sum(is_counted(trial) for trial in trials) >= self.n_trials:
                return None
            tried = {point_key(trial.params) for trial in trials if is_counted(trial)}
            waiting = [t.system_attrs.get("fixed_params", {}) for t in trials if t.state == TrialState.WAITING]
            if isinstance(self.study.sampler, GridSampler) and not waiting and not self._enqueue_next(tried):
                return None
            trial = self._take()
            point = self.space.suggest(trial)
            if point_key(point) not in tried:
                return trial
            tried |= {point_key(params) for params in waiting}
            self._discard(trial.number, "repetition", "another trial has this point; a new one was drawn")
            fresh = self.space.fresh_point(tried)
            if fresh is None:
                return None
            self.study.enqueue_trial(fresh)
            trial = self._take()
            self.space.suggest(trial)
            return trial

    def finish(self, number: int, outcome: Outcome) -> None:
        """Store how a trial ended."""
        states = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        self._note(number, seconds=outcome.seconds, results=outcome.results, error=outcome.error)
        values = outcome.values if outcome.state == "finished" else None
        self.study.tell(number, values, state=states[outcome.state])

    def end_running(self, is_gone: Callable[[Owner | None], bool]) -> None:
        """End the running trials whose owner is gone: with the outcome that their job wrote, or by giving their point back.

        Args:
            is_gone: returns whether the owner of a trial is gone. Owners are set under the lock, so a trial without an
                owner belongs to a process that died while it held the lock.
        """
        with self.storage.lock(self.study.study_name):
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if not is_gone(Owner.of(trial)):
                    continue
                outcome = self._left_outcome(trial)
                if outcome is not None:
                    log.info("trial %d had ended (%s) before its search was stopped", trial.number, outcome.state)
                    self.finish(trial.number, outcome)
                else:
                    log.info("trial %d was interrupted; its point is run again", trial.number)
                    self._give_back(trial)

    def is_over(self) -> bool:
        """Return whether no trial is running or waiting in any process."""
        states = (TrialState.RUNNING, TrialState.WAITING)
        return not self.study.get_trials(deepcopy=False, states=states)

    def _left_outcome(self, trial: FrozenTrial) -> Outcome | None:
        if "folder" not in trial.user_attrs:
            return None
        folder = Path(trial.user_attrs["folder"])
        outcome = read_outcome(folder)
        return outcome and application().with_results(outcome, folder, self.objectives, len(self.study.directions))

    def _give_back(self, trial: FrozenTrial) -> None:
        """Mark a trial as interrupted, and put its point back into the queue."""
        self._discard(trial.number, "interrupted", "its process was stopped; its point waits to be run again")
        # A trial whose process died before it had drawn its point leaves nothing to run again.
        if trial.params.keys() >= {p.name for p in self.space.parameters if not p.conditions}:
            continues = {CONTINUES: trial.user_attrs["folder"]} if "folder" in trial.user_attrs else {}
            self.study.enqueue_trial(trial.params, user_attrs=continues)

    def _enqueue_next(self, tried: set[str]) -> bool:
        points = self.space.points() or []
        untried = next((point for point in points if point_key(point) not in tried), None)
        if untried is not None:
            self.study.enqueue_trial(untried)
        return untried is not None

    def _take(self) -> optuna.Trial:
        trial = self.study.ask()
        trial.set_user_attr("owner", vars(Owner.this_process()))
        return trial

    def _discard(self, number: int, why: str, message: str) -> None:
        self._note(number, **{DISCARDED: why, "error": message})
        self.study.tell(number, state=TrialState.FAIL)

    def _note(self, number: int, **attributes: Any) -> None:
        """Set the non-empty user attributes of a running trial, which may belong to another process."""
        storage = self.storage.storage
        study_id = storage.get_study_id_from_name(self.study.study_name)
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
        for name, value in attributes.items():
            if value:
                storage.set_trial_user_attr(trial_id, name, value)


def is_counted(trial: FrozenTrial) -> bool:
    """Return whether a trial counts towards the total, as all but waiting, interrupted and repeated trials do."""
    return trial.state != TrialState.WAITING and DISCARDED not in trial.user_attrs


def open_study(
    storage: StudyStorage,
    *,
    name: str,
    space: Space,
    fixed: Sequence[str],
    directions: Sequence[str],
    facts: Mapping[str, Any],
    n_trials: int | None,
    sampler: optuna.samplers.BaseSampler,
    pruner: optuna.pruners.BasePruner,
) -> SharedStudy:
    """Create the study, or join the stored study of this name if it has the same settings.

    Args:
        storage: storage of the study.
        name: name of the study.
        space: search space.
        fixed: overrides common to all trials.
        directions: `maximize` or `minimize`, one per objective.
        facts: further settings that must not change, such as seeds and objectives.
        n_trials: total number of trials; None = all points of a finite space.
        sampler: Optuna sampler, which draws the points.
        pruner: Optuna pruner, which stops trials early.

    Raises:
        UserError: the stored study has other directions, another space or other settings.
    """
    points = space.points()
    if n_trials is None and points is None:
        raise UserError(
            "hydra.sweeper.n_trials is not set, and the space has infinitely or too many points to try them all. "
            "Type: hydra.sweeper.n_trials=20"
        )
    if isinstance(sampler, GridSampler) and points is None:
        raise UserError(
            "a grid needs a finite space: replace interval() by range() or choices, or take another sampler."
        )
    if isinstance(sampler, optuna.samplers.GridSampler | optuna.samplers.BruteForceSampler):
        raise UserError(
            f"optuna's {type(sampler).__name__} ends a study from within Study.optimize, which is not used here. "
            "Type: hydra/sweeper/sampler=grid"
        )
    total = min(n_trials or len(points or []), len(points) if points is not None else n_trials or 0)
    settings = {
        "space": space.describe(),
        "fixed": sorted(line for line in fixed if not line.lstrip("+~").startswith(HOST_KEYS)),
        **facts,
    }
    with storage.lock(name):
        names = {summary.study_name for summary in optuna.get_all_study_summaries(storage.storage, False)}
        if name in names:
            study = optuna.load_study(study_name=name, storage=storage.storage, sampler=sampler, pruner=pruner)
            _refuse_another_search(study, storage.url, list(directions), settings)
            # A seeded sampler would repeat the points that the first process of the study drew.
            study.sampler.reseed_rng()
        else:
            study = optuna.create_study(
                storage=storage.storage,
                study_name=name,
                directions=list(directions),  # type: ignore[arg-type]
                sampler=sampler,
                pruner=pruner,
            )
            study.set_user_attr("settings", settings)
            study.set_user_attr("fixed", list(fixed))
    return SharedStudy(study, storage, space, total, list(facts.get("objectives", ())))


def _refuse_another_search(study: optuna.Study, url: str, directions: list[str], settings: dict[str, Any]) -> None:
    remedy = (
        "Its trials would not be comparable with those to come. "
        f"Type: hydra.sweeper.study_name=NAME for a new study, or go back to the settings of {study.study_name!r} "
        f"({masked(url)})."
    )
    stored_directions = ["maximize" if d == StudyDirection.MAXIMIZE else "minimize" for d in study.directions]
    if stored_directions != directions:
        raise UserError(
            f"direction: the stored study has {', '.join(stored_directions)}, this command {', '.join(directions)}. {remedy}"
        )
    stored = study.user_attrs.get("settings")
    if stored is None:
        raise UserError(f"study {study.study_name!r} was not made by this sweeper, so its space is not known. {remedy}")
    # The stored settings went through JSON, which turns tuples into lists; the new ones must do the same to be compared.
    wanted = json.loads(json.dumps(settings))
    for key in sorted(stored["space"].keys() | wanted["space"].keys()):
        old, new = stored["space"].get(key), wanted["space"].get(key)
        if old != new:
            raise UserError(f"{key}: the stored study searches {_shown(old)}, this command {_shown(new)}. {remedy}")
    for key in sorted((stored.keys() | wanted.keys()) - {"space"}):
        is_kept = is_same(wanted.get(key), stored.get(key)) if key == "data" else wanted.get(key) == stored.get(key)
        if not is_kept:
            raise UserError(f"{key}: the stored study has {stored.get(key)}, this command {wanted.get(key)}. {remedy}")


def _shown(described: dict[str, Any] | None) -> str:
    """Return a parameter of `Space.describe` as a short text.

    >>> _shown({"distribution": {"attributes": {"choices": ["a", "b"]}}, "conditions": []}), _shown(None)
    ('a, b', 'not at all')
    """
    if described is None:
        return "not at all"
    attributes = described["distribution"]["attributes"]
    if "choices" in attributes:
        text = ", ".join(attributes["choices"])
    else:
        text = f"{attributes['low']} to {attributes['high']}"
        text += f" in steps of {attributes['step']}" if attributes.get("step") else ""
        text += " (log)" if attributes.get("log") else ""
    return text + "".join(f" if {name}={value}" for name, value in described["conditions"])
