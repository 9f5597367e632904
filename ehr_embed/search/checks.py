"""What is checked before the first trial: that every job composes, and which way is better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import CategoricalDistribution

from ehr_embed.config.instantiate import instantiate
from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.files import digest
from ehr_embed.core.fingerprints import known_fingerprints, without_content
from ehr_embed.search.space import Space
from ehr_embed.sources.meds import MedsSource

MEDS_SOURCE = "ehr_embed.sources.meds.MedsSource"


def check_jobs(space: Space, fixed: Sequence[str], loader: ConfigLoader, config: DictConfig) -> list[DictConfig]:
    """Compose a job for every choice of every parameter, so that an unknown key or option ends the search at once.

    Returns:
        The configurations, one or more.

    Raises:
        HydraException: as for a single run.
    """
    return [loader.load_sweep_config(config, [*fixed, *overrides]) for overrides in example_overrides(space)]


def example_overrides(space: Space) -> Iterator[list[str]]:
    """Overrides such that every choice, and each other parameter's first value, occurs at least once."""
    seen: set[str] = set()
    for parameter in space.parameters:
        values = parameter.values() or [getattr(parameter.distribution, "low", None)]
        is_choice = isinstance(parameter.distribution, CategoricalDistribution)
        for value in values if is_choice else values[:1]:
            overrides = space.overrides(space.point_with(parameter, value))
            if (key := " ".join(overrides)) not in seen:
                seen.add(key)
                yield overrides


def data_identity(example: DictConfig) -> str | None:
    """What tells a study's dataset from another one, wherever each host keeps it: a digest of its files, after the one that earlier
    versions kept.

    None for data that are made or imported: there the overrides say what they are.
    """
    root = OmegaConf.select(example, "data.root")
    if root is None or OmegaConf.select(example, "data.source._target_") != MEDS_SOURCE:
        return None
    with known_fingerprints(Path(OmegaConf.select(example, "cache_dir", default="cache"))):
        found = MedsSource(root=root).fingerprint()
    return f"{digest({file: without_content(value) for file, value in found.items()})}:{digest(found)}"


def chosen_directions(direction: Any, objectives: Sequence[str], examples: Sequence[DictConfig]) -> list[str]:
    """Return `maximize` or `minimize` for each objective; by default what the tasks of `examples` declare.

    Args:
        direction: `hydra.sweeper.direction`.
        objectives: `hydra.sweeper.objectives`; empty = the monitored metric.
        examples: composed jobs, among them every choice of the search.

    Raises:
        UserError: an objective on held_out, an unknown direction, another number of directions than of objectives, one that
            contradicts the metric, or tasks that disagree.
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
            f"hydra.sweeper.objectives={objective}: a search that selects by held_out has seen it, and its best trial can no "
            f"longer be judged there. Type: hydra.sweeper.objectives=[tuning.{rest}]; held_out of every trial is in summary.csv"
        )


def _tasks(examples: Sequence[DictConfig]) -> list[Any]:
    """Build each different task of the examples, which needs no data."""
    built: dict[str, Any] = {}
    for example in examples:
        if OmegaConf.select(example, "task._target_") is None:
            continue
        key = str(OmegaConf.to_container(example.task, resolve=True))
        if key not in built:
            built[key] = instantiate(example.task, trusted=list(example.get("trusted_packages") or []))
    return list(built.values())


def _declared(tasks: Sequence[Any], objective: str | None) -> str | None:
    """Which way an objective is better, the monitored metric for None; None where no task declares it.

    Raises:
        UserError: the tasks disagree, as AUROC and perplexity do.
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
