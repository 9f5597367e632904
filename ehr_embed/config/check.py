"""Check a composed configuration before anything is opened or built.

No rule stands here. A setting's type, range and choices are the annotation of the parameter that takes it
(`ehr_embed.core.settings`): of the constructor or function that a `_target_` names, or, for keys that belong to no `_target_`, of
the entry point's `Keys`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from importlib import import_module
from types import NoneType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from ehr_embed.config.targets import is_instruction, looked_up_name, own_object
from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.settings import check_setting, check_settings, names_of, on_one_line

Result = TypeVar("Result")
ONE_KEY = re.compile(r"\$\{([\w.]+)\}")
"""A value that stands under another key."""


class Keys:
    """Base class of the keys that an entry point or a config group has beside those of its `_target_`: annotations, no values."""

    needed: ClassVar[tuple[str, ...]] = ()
    """Keys that a configuration must have."""
    has_only_these: ClassVar[bool] = False
    """True = other keys are refused."""
    expected: ClassVar[str] = ""
    """The valid values in words; empty = a mapping of these keys."""


class Built(Keys):
    """A node of the configuration with a `_target_`, which names the class or function that builds it."""


def check_config(cfg: DictConfig, keys: type[Keys]) -> None:
    """Refuse a configuration with a key that is missing or unknown, or with a value of another type or out of its range.

    Keys that `cfg` does not have are not asked for: old configurations lack the newer ones.

    Args:
        cfg: the composed configuration.
        keys: the keys of the entry point that belong to no `_target_`.

    Raises:
        UserError: names the first such key.
        OmegaConfBaseException: an interpolation that leads nowhere.
    """
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(
            f"{missing[0]} is not set ({len(missing)} such keys): ??? stands for a value that must be given. "
            f"Type: {missing[0]}=VALUE"
        )
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    for where, value in _leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(
                f"{where}={value}: expected a finite number. Nothing here has a meaning without one, and a run whose "
                f"settings equal nothing, not even themselves, could not be continued. Type: {where}=NUMBER"
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"{where}={value}: expected a number of at most 64 bits. Type: {where}=NUMBER")
    _check_keys(config, keys)
    raw = OmegaConf.to_container(cfg, resolve=False)
    check_targets(config, tuple(config.get("trusted_packages", ())), keys=keys, raw=raw)


def checks_config(keys: str) -> Callable[[Callable[[DictConfig], Result]], Callable[[DictConfig], Result]]:
    """Return a decorator for the work of an entry point: its configuration is checked before anything else.

    Args:
        keys: name of the entry point's class in `ehr_embed.config.keys`, which is imported at the call, since it loads torch.
    """

    def decorate(function: Callable[[DictConfig], Result]) -> Callable[[DictConfig], Result]:
        @wraps(function)
        def checked(cfg: DictConfig) -> Result:
            check_config(cfg, getattr(import_module("ehr_embed.config.keys"), keys))
            return function(cfg)

        return checked

    return decorate


def hints_of(keys: Any) -> dict[str, Any]:
    """Return the annotations of an entry point's keys, by name."""
    hints = get_type_hints(keys, include_extras=True)
    return {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}


def keys_of(hint: Any) -> type[Keys] | None:
    """Return the class of the keys of a node, or of each node of a mapping, None where the annotation is of a value."""
    kinds = [part for part in (hint, *get_args(hint)) if isinstance(part, type) and issubclass(part, Keys)]
    return kinds[0] if kinds else None


def _check_keys(config: Mapping[str, Any], keys: type[Keys], where: str = "") -> None:
    """Check the keys of a node, and of the nodes below it, that belong to no `_target_`."""
    for name, hint in hints_of(keys).items():
        if name not in config:
            continue
        key, value = f"{where}.{name}" if where else name, config[name]
        below = keys_of(hint)
        if below is None:
            check_setting(key, value, hint)
        elif get_origin(hint) is Mapping:
            check_setting(key, value, dict[str, Any])
            for own, node in value.items():
                check_setting(f"name in {key}", own, get_args(hint)[0])
                _check_node(f"{key}.{own}", node, below)
        elif not (value is None and NoneType in get_args(hint)):
            _check_node(key, value, below)


def _check_node(key: str, node: Any, keys: type[Keys]) -> None:
    is_built = issubclass(keys, Built)
    if not isinstance(node, dict) or (is_built and not isinstance(node.get("_target_"), str)):
        group = "data" if key.startswith("data") else key.rpartition(".")[2]
        what = "a mapping with _target_, which names what is built," if is_built else "a mapping of its keys,"
        expected = keys.expected or f"{what} as the files of conf/{group}/ are. Type: {group}=OPTION"
        raise UserError(f"{key}={on_one_line(node)}: expected {expected}")
    if unknown := [name for name in node if keys.has_only_these and name not in hints_of(keys)]:
        raise unknown_name(f"key of {key}", unknown[0], hints_of(keys))
    for name in keys.needed:
        if name not in node:
            raise UserError(
                f"{key}.{name} is missing: every option of {key} has it. Add it to the option's YAML, or type: "
                f"+{key}.{name}=VALUE"
            )
    _check_keys(node, keys, key)


def check_targets(node: Any, trusted: tuple[str, ...], *, keys: Any = None, raw: Any = None, where: str = "") -> None:
    """Check the keys of every node that has a `_target_`, at any depth, by the annotations of what it names.

    Args:
        node: plain values.
        trusted: further packages that the user declares.
        keys: the keys that the node, and nodes below it, have beside those of their targets.
        raw: the node before its interpolations were resolved: where a value is taken from another key, the message
            names the key that a user types.
        where: full name of the node; empty = it stands by itself.

    Raises:
        UserError: as `check_keys_of_target`, or a target may not be named.
    """
    if isinstance(node, list):
        for number, item in enumerate(node):
            check_targets(item, trusted, where=f"{where}[{number}]")
    if not isinstance(node, dict):
        return
    raw = raw if isinstance(raw, dict) else {}
    beside = {} if keys is None else hints_of(keys)
    if "_target_" in node:
        target = own_object(looked_up_name(node["_target_"]), trusted)
        full_names = {name: found.group(1) for name, value in raw.items() if (found := ONE_KEY.fullmatch(str(value)))}
        check_keys_of_target(node, target, where, beside=tuple(beside), full_names=full_names)
    for name, value in node.items():
        below, inner = keys_of(beside.get(name)), f"{where}.{name}" if where else str(name)
        if below is not None and get_origin(beside[name]) is Mapping:
            for own, item in value.items():
                check_targets(item, trusted, keys=below, where=f"{inner}.{own}")
        else:
            check_targets(value, trusted, keys=below, raw=raw.get(name), where=inner)


def check_keys_of_target(
    node: Mapping[str, Any],
    target: Any,
    where: str,
    *,
    beside: Sequence[str] = (),
    full_names: Mapping[str, str] | None = None,
) -> None:
    """Compare the keys of a node with the names and annotations of its target's parameters.

    Args:
        node: plain values; nodes below it with a `_target_` of their own are not checked.
        target: the class or function.
        where: full name of the node; empty = it stands by itself.
        beside: further keys that the node may have, which the target does not get.
        full_names: as for `check_settings`.

    Raises:
        UserError: a key is unknown, or its value is of another type or out of range.
    """
    own = {name: value for name, value in node.items() if name not in beside and not is_instruction(name)}
    if (valid := names_of(target)) is not None and (unknown := [name for name in own if name not in valid]):
        raise unknown_name(f"key of {where or node['_target_']}", unknown[0], {*valid, *beside})
    values = {name: value for name, value in own.items() if not _names_target(value)}
    check_settings(target, values, where, full_names=full_names)


def _names_target(node: Any) -> bool:
    """Return whether a node, or a node of a list, has a `_target_`, so that its own type is not that of the built object."""
    return any(map(_names_target, node)) if isinstance(node, list) else isinstance(node, dict) and "_target_" in node


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _leaves(value, f"{key}[{number}]")
    else:
        yield key, node
