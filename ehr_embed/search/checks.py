"""What is checked before the first trial: that every job composes, and which way is better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import CategoricalDistribution

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.files import digest
from ehr_embed.core.fingerprints import known_fingerprints, without_content
from ehr_embed.evaluation.directions import LOWER_IS_BETTER
from ehr_embed.search.space import Space
from ehr_embed.sources.meds import MedsSource

MEDS_SOURCE = "ehr_embed.sources.meds.MedsSource"


def check_jobs(space: Space, fixed: Sequence[str], loader: ConfigLoader, config: DictConfig) -> DictConfig:
    """Compose a job for every choice of every parameter, so that an unknown key or option ends the search at once.

    Returns:
        The configuration of the first.

    Raises:
        HydraException: as for a single run.
    """
    first: DictConfig | None = None
    for overrides in example_overrides(space):
        composed = loader.load_sweep_config(config, [*fixed, *overrides])
        first = composed if first is None else first
    assert first is not None
    return first


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


def chosen_directions(direction: Any, objectives: Sequence[str], example: DictConfig) -> list[str]:
    """`maximize` or `minimize` for each objective; by default that of the task's monitored metric.

    Raises:
        UserError: an unknown direction, as many as there are not objectives, or one that contradicts the metric.
    """
    monitor = OmegaConf.select(example, "task.monitor")
    natural = None if monitor is None else "minimize" if monitor in LOWER_IS_BETTER else "maximize"
    if direction is None:
        if objectives or natural is None:
            raise UserError(
                "hydra.sweeper.direction is not set, and without a task.monitor nothing says which way is better. "
                "Type: hydra.sweeper.direction=maximize, or [maximize,minimize] for two objectives"
            )
        return [natural]
    directions = [direction] if isinstance(direction, str) else list(direction)
    for name in directions:
        if name not in ("maximize", "minimize"):
            raise unknown_name("hydra.sweeper.direction", name, ("maximize", "minimize"))
    if objectives and len(objectives) != len(directions):
        raise UserError(
            f"hydra.sweeper: {len(objectives)} objectives ({', '.join(objectives)}) and {len(directions)} directions; "
            "expected one direction an objective."
        )
    if not objectives and len(directions) == 1 and natural is not None and directions[0] != natural:
        raise UserError(
            f"hydra.sweeper.direction={directions[0]}, but task.monitor={monitor} is better {natural}d: "
            f"the search would look for the worst model. Type: hydra.sweeper.direction={natural}"
        )
    return directions
