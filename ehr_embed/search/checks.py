"""Checks before the first trial: compose a job for every choice, and find the direction of each objective."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import CategoricalDistribution

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.search.application import application
from ehr_embed.search.space import Space


def check_jobs(space: Space, fixed: Sequence[str], loader: ConfigLoader, config: DictConfig) -> list[DictConfig]:
    """Compose a job for every choice of every parameter, so that an unknown key or option ends the search at once.

    Returns:
        One composed configuration per combination of overrides that was tried, at least one.

    Raises:
        HydraException: an override that a single run would refuse too.
    """
    return [loader.load_sweep_config(config, [*fixed, *overrides]) for overrides in example_overrides(space)]


def example_overrides(space: Space) -> Iterator[list[str]]:
    """Yield lists of overrides in which every choice occurs at least once, and every range or interval with its first value."""
    seen: set[str] = set()
    for parameter in space.parameters:
        values = parameter.values() or [getattr(parameter.distribution, "low", None)]
        is_choice = isinstance(parameter.distribution, CategoricalDistribution)
        for value in values if is_choice else values[:1]:
            overrides = space.overrides(space.point_with(parameter, value))
            if (key := " ".join(overrides)) not in seen:
                seen.add(key)
                yield overrides


def chosen_directions(direction: Any, objectives: Sequence[str], examples: Sequence[DictConfig]) -> list[str]:
    """Return `maximize` or `minimize` for each objective; by default the direction that the tasks of `examples` declare.

    Args:
        direction: `hydra.sweeper.direction`.
        objectives: `hydra.sweeper.objectives`; empty = the monitored metric.
        examples: composed jobs in which every choice of the search occurs.

    Raises:
        UserError: an objective is measured on held_out, a direction is unknown or contradicts its metric, the numbers of
            directions and objectives differ, or the tasks disagree about a direction.
    """
    for name in objectives:
        _refuse_held_out(name)
    tasks = _tasks(examples)
    declared = [_declared(tasks, name) for name in objectives] or [_declared(tasks, None)]
    if direction is None:
        if unknown := [
            str(name) for name, way in zip(objectives or ["task.monitor"], declared, strict=True) if way is None
        ]:
            example = "maximize" if len(declared) == 1 else f"[{','.join(way or 'minimize' for way in declared)}]"
            raise UserError(
                f"hydra.sweeper.direction is not set, and no task declares which way {unknown[0]} is better. "
                f"Type: hydra.sweeper.direction={example}"
            )
        return [str(way) for way in declared]
    directions = [direction] if isinstance(direction, str) else list(direction)
    for name in directions:
        if name not in ("maximize", "minimize"):
            raise unknown_name("hydra.sweeper.direction", name, ("maximize", "minimize"))
    if objectives and len(objectives) != len(directions):
        raise UserError(
            f"hydra.sweeper: {len(objectives)} objectives ({', '.join(objectives)}) and {len(directions)} directions; "
            "expected one direction per objective."
        )
    if len(declared) == len(directions):  # without objectives, a job may return several values of its own
        for name, way, chosen in zip(objectives or ["task.monitor"], declared, directions, strict=True):
            if way not in (None, chosen):
                told = name if objectives else f"task.monitor={next(iter(tasks)).monitor}"
                raise UserError(
                    f"hydra.sweeper.direction={chosen}, but {told} is better {way}d: the search would look for the worst model. "
                    f"Type: hydra.sweeper.direction={way if len(directions) == 1 else '[' + ','.join(map(str, declared)) + ']'}"
                )
    return directions


def _refuse_held_out(objective: str) -> None:
    split, _, rest = objective.partition(".")
    if split == "held_out":
        raise UserError(
            f"hydra.sweeper.objectives={objective}: a search that selects its best trial by held_out can no longer judge that "
            f"trial on held_out. Type: hydra.sweeper.objectives=[tuning.{rest}]; summary.csv lists held_out of every trial"
        )


def _tasks(examples: Sequence[DictConfig]) -> list[Any]:
    """Build each distinct task of the examples; building a task needs no data."""
    built: dict[str, Any] = {}
    for example in examples:
        if OmegaConf.select(example, "task._target_") is None:
            continue
        key = str(OmegaConf.to_container(example.task, resolve=True))
        if key not in built:
            built[key] = application().build(example.task, trusted=list(example.get("trusted_packages") or []))
    return list(built.values())


def _declared(tasks: Sequence[Any], objective: str | None) -> str | None:
    """Return the direction that the tasks declare for an objective (None = the monitored metric), or None if none does.

    Raises:
        UserError: the tasks declare opposite directions, for example one monitors AUROC and another perplexity.
    """
    ways = {}
    for task in tasks:
        split, _, name = ("tuning", "", task.monitor) if objective is None else objective.partition(".")
        by_name = {metric.name: metric.is_higher_better for metric in getattr(task, "metrics", ())}
        is_higher_better = by_name.get(name.removesuffix(".value")) if split == "tuning" else None
        if objective is None and is_higher_better is None:
            is_higher_better = task.is_higher_better  # a task that declares no metrics
        if is_higher_better is not None:
            ways[f"{type(task).__name__} {name}"] = "maximize" if is_higher_better else "minimize"
    if len(set(ways.values())) > 1:
        raise UserError(
            f"the search compares {' and '.join(f'{name} ({way})' for name, way in ways.items())}: numbers that are better in "
            "opposite directions have no best. Search them one after another"
        )
    return next(iter(ways.values()), None)
