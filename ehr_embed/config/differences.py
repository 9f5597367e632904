"""Tell in which keys a configuration differs from the options that it was composed from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ehr_embed.core.moved import renamed
from ehr_embed.core.programs import shipped

NOT_TOLD = ("run_dir", "cache_dir", "hydra", "defaults", "sweeps")
"""Keys that differ from run to run without a choice of the user."""


class Difference(NamedTuple):
    """A key of a configuration with another value than its option has; `usual` is None where the option lacks the key."""

    key: str
    here: Any
    usual: Any


def differences_from_options(config: Mapping[str, Any], choices: Sequence[str]) -> list[Difference]:
    """Return the keys in which a resolved configuration differs from the options that were chosen.

    Args:
        config: as config.yaml of a run holds it.
        choices: the options of the config groups as `group=option`; options that this version does not have are left out, and
            the groups of an experiment or a pipeline are compared with the options alone.

    >>> differences_from_options({"seed": 3, "run_dir": "runs/a"}, [])[0]
    Difference(key='seed', here=3, usual=0)
    """
    options = tuple(choice for choice in choices if choice.split("=")[0] not in ("experiment", "pipeline", "sweeps"))
    usual = _composed(options)
    here = dict(_flat(renamed(dict(config))))
    found = [
        Difference(key, value, usual.get(key))
        for key, value in here.items()
        if key.split(".")[0] not in NOT_TOLD and not _is_same(value, usual.get(key))
    ]
    return found


@lru_cache(64)
def _composed(options: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of conf/train.yaml with these options, by dotted key; of interpolations the text."""
    for chosen in (options, ()):
        try:
            with initialize_config_dir(str(shipped("conf")), version_base="1.3"):
                cfg = compose("train", overrides=list(chosen))
        except (HydraException, OmegaConfBaseException):  # an option of the user's own, or of another version
            continue
        values = OmegaConf.to_container(cfg, resolve=False)
        assert isinstance(values, dict)
        return dict(_flat(renamed(values)))
    return {}


def _is_same(value: Any, usual: Any) -> bool:
    """Return whether a value is the usual one; an interpolation stands for any value.

    >>> _is_same(1, 1.0), _is_same("cache/demo", "${cache_dir}/demo"), _is_same(None, {})
    (True, True, True)
    """
    if isinstance(usual, str) and "${" in usual:
        return True
    return bool(value == usual) or (not value and not usual and value is not False and value != 0)


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
