"""Tell in which keys a configuration differs from the options that it was composed from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ehr_embed.core.moved import renamed
from ehr_embed.core.programs import shipped

NOT_TOLD = ("run_dir", "cache_dir", "hydra", "defaults", "sweeps")
"""Keys that differ from run to run without a choice of the user."""
SELECTED = re.compile(r"\$\{oc\.select:[^,}]+,([^}]*)\}")
"""An interpolation with a default, which is what the option usually has."""


class Difference(NamedTuple):
    """A key of a configuration with another value than its option has; `usual` is None where the option lacks the key."""

    key: str
    here: Any
    usual: Any


def differences_from_options(config: Mapping[str, Any], choices: Sequence[str]) -> list[Difference] | None:
    """Return the keys in which a resolved configuration differs from the options that were chosen.

    Args:
        config: as config.yaml of a run holds it.
        choices: the options of the config groups as `group=option`. What an experiment or a pipeline sets counts as a difference.

    Returns:
        The differences; None where an option is not among those of this version, with which to compare.

    >>> differences_from_options({"seed": 3, "run_dir": "runs/a"}, [])[0]
    Difference(key='seed', here=3, usual=0)
    """
    options = tuple(choice for choice in choices if choice.split("=")[0] not in ("experiment", "pipeline", "sweeps"))
    usual = _composed(options)
    if usual is None:
        return None
    here = dict(_flat(renamed(dict(config))))
    return [
        Difference(key, value, usual.get(key))
        for key, value in here.items()
        if key.split(".")[0] not in NOT_TOLD and not _is_same(value, usual.get(key))
    ]


@lru_cache(64)
def _composed(options: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the values of conf/train.yaml with these options, by dotted key; an interpolation is returned as its text.

    The result is None if an option is the user's own, or of another version, so that nothing is known of its values.
    """
    running = GlobalHydra.instance()
    application, running.hydra = (
        running.hydra,
        None,
    )  # Hydra initialises once at a time, and a run is inside an application
    try:
        with initialize_config_dir(str(shipped("conf")), version_base="1.3"):
            values = OmegaConf.to_container(compose("train", overrides=list(options)), resolve=False)
    except (HydraException, OmegaConfBaseException):
        return None
    finally:
        GlobalHydra.instance().hydra = application
    assert isinstance(values, dict)
    return dict(_flat(renamed(values)))


def _is_same(value: Any, usual: Any) -> bool:
    """Return whether a value is the usual one; an interpolation stands for any value, unless it has a default.

    >>> _is_same(1, 1.0), _is_same("cache/demo", "${cache_dir}/demo"), _is_same(None, {})
    (True, True, True)
    >>> _is_same(True, "${oc.select:event_vectors.whiten,false}"), _is_same(0.1, "${oc.select:a.b,0.1}")
    (False, True)
    """
    if isinstance(usual, str) and (found := SELECTED.fullmatch(usual)):
        usual = yaml.safe_load(found[1])
    if isinstance(usual, str) and "${" in usual:
        return True
    return bool(value == usual) or (not value and not usual and value is not False and value != 0)


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
