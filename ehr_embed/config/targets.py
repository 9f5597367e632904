"""Judge what a `_target_` names before it is called: building it would run its code.

Only names of allowed packages are looked up, and a name is that of a module and of an object defined in it. Therefore neither an
import nor a walk along attributes reaches `os` or a module that lies in the current folder.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any, get_args, get_origin, get_type_hints

import hydra.utils

from ehr_embed.core.errors import UserError
from ehr_embed.core.moved import new_name

PACKAGE = "ehr_embed"
LIBRARIES = {
    "torch.nn": "Module",
    "torch.optim": "Optimizer",
    "torch.optim.lr_scheduler": "LRScheduler",
    "optuna.samplers": "BaseSampler",
    "optuna.samplers.nsgaii": "BaseCrossover",
    "optuna.pruners": "BasePruner",
}
"""Namespaces whose classes one's own configuration may name, each with the base class that they must have."""
PUBLIC_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)+", re.ASCII)
MAX_DEPTH = 40
"""The greatest depth of a configuration that is read; a deeper one would end in Python's recursion limit."""


@dataclass(frozen=True)
class Group:
    """A group of a stored configuration.

    Attributes:
        node: the key of its configuration.
        package: where its members are defined.
        protocol: the class of `package.protocol` whose methods a member has.
    """

    node: str
    package: str
    protocol: str


STORED = {
    "model": Group("model", "ehr_embed.models", "Model"),
    "task": Group("task", "ehr_embed.tasks", "Task"),
    "embedder": Group("embedder", "ehr_embed.embedders", "Embedder"),
    "source": Group("data.source", "ehr_embed.sources", "Source"),
    "calibration": Group("calibration", "ehr_embed.calibration", "Calibration"),
}
"""The groups that are built from a configuration that came with a checkpoint."""


def looked_up_name(target: object) -> str:
    """Return the name under which a target is looked up: today's, for a name of an earlier version.

    Raises:
        UserError: the target is no dotted public name.

    >>> looked_up_name("ehr_embed.trainer.TrainerSettings")
    'ehr_embed.training.settings.TrainerSettings'
    """
    if not isinstance(target, str) or not PUBLIC_NAME.fullmatch(target):
        raise UserError(
            f"_target_={_shown(target)} is outside the trusted packages: expected the public dotted name of a class, such as "
            "ehr_embed.models.encoder.Encoder. A name with another form could reach code that no YAML of this package names."
        )
    return new_name(target)


def check_own(config: Any, trusted: Sequence[str] = ()) -> Any:
    """Return a plain configuration of one's own with the names under which its targets are looked up.

    Args:
        config: plain values, resolved, since an interpolation may bring a target with it.
        trusted: further packages that the user declares.

    Raises:
        UserError: a target is neither a member of this package, nor a class of `LIBRARIES`, nor of a trusted package; or an
            interpolation is left.
    """
    if hidden := [text for text in _strings(config) if "${" in text]:
        raise UserError(
            f"{_shown(hidden[0])} would be resolved after its _target_ was looked for, and may bring another one. Write the "
            "value itself."
        )
    return _own(config, tuple(trusted))


def _own(value: Any, trusted: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        copy = {key: _own(item, trusted) for key, item in value.items() if key != "_target_"}
        if "_target_" in value:
            copy["_target_"] = looked_up_name(value["_target_"])
            if _is_optimizer(own_object(copy["_target_"], trusted)):
                copy.setdefault("_partial_", True)  # its parameters are known only when the model is built
        return copy
    return [_own(item, trusted) for item in value] if isinstance(value, list) else value


def _is_optimizer(found: Any) -> bool:
    """Return whether an object is an optimizer class of torch or a subclass (torch may not be loaded)."""
    bases = found.__mro__ if isinstance(found, type) else ()
    return any((base.__module__, base.__name__) == ("torch.optim.optimizer", "Optimizer") for base in bases)


def own_object(target: str, trusted: Sequence[str] = ()) -> Any:
    """Return the class or function that a target of one's own configuration names.

    Raises:
        UserError: as `check_own`, or there is no such object.
    """
    if _is_below(target, trusted):
        return _trusted_object(target, (*trusted, PACKAGE))
    namespace, _, name = target.rpartition(".")
    if namespace in LIBRARIES:
        module = import_module(namespace)
        found = vars(module).get(name)
        if isinstance(found, type) and issubclass(found, getattr(module, LIBRARIES[namespace])):
            return found
    elif _is_below(target, (PACKAGE,)):
        found = _object_of(target)
        if isinstance(found, type | FunctionType) and _is_below(f"{found.__module__}.", (PACKAGE,)):
            return found
    raise UserError(
        f"_target_={target} is outside the trusted packages: expected a class of {PACKAGE}, or a public one of "
        "torch.nn (modules), torch.optim (optimizers), optuna.samplers or optuna.pruners. Building anything else would run its "
        f"code.{_if_yours(target)}"
    )


def _if_yours(target: str) -> str:
    """Return the remedy for a class of a package that is not trusted yet; empty for Python's own modules.

    >>> _if_yours("my.conv.Conv"), _if_yours("os.system")
    (' Only if you know the code of my, type: trusted_packages=[my]', '')
    """
    package = target.partition(".")[0]
    if package in sys.stdlib_module_names or package in {PACKAGE, *(name.partition(".")[0] for name in LIBRARIES)}:
        return ""
    return f" Only if you know the code of {package}, type: trusted_packages=[{package}]"


def check_stored_node(node: Any, group: str, trusted: Sequence[str] = ()) -> dict[str, Any]:
    """Return a group of a configuration that came with a checkpoint, once it is known to name a member of that group only.

    A further `_target_` may stand only where the member's constructor takes a member of a group, such as the `inner` embedder of
    `ShuffledTextEmbedder` or the `members` of `Ensemble`, or where it names a class of a trusted package.

    Args:
        node: plain values without interpolations.
        group: model, task, embedder or source.
        trusted: further packages that the user who opens the run trusts.

    Raises:
        UserError: another target, or an instruction to Hydra such as `_args_`.
    """
    where = STORED[group].node
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UserError(
            f"{where}={_shown(node)} of the stored configuration: expected a mapping with _target_, as a run of train.py leaves "
            "it. The checkpoint is damaged or was not written by this package. Train again, or use another."
        )
    target = looked_up_name(node["_target_"])
    places = _places_for_members(stored_object(target, group, trusted))
    checked: dict[str, Any] = {"_target_": target}
    for key, value in node.items():
        if key == "_target_":
            continue
        if is_instruction(key):
            raise _instruction(where, key)
        of, is_several = places.get(key, ("", False))
        if of and is_several and isinstance(value, list):
            checked[key] = [check_stored_node(member, of, trusted) for member in value]
        elif of and not is_several and isinstance(value, Mapping):
            checked[key] = check_stored_node(value, of, trusted)
        else:
            checked[key] = _stored_value(value, f"{where}.{key}", tuple(trusted))
    return checked


def _stored_value(value: Any, where: str, trusted: tuple[str, ...]) -> Any:
    if isinstance(value, list):
        return [_stored_value(item, where, trusted) for item in value]
    if not isinstance(value, Mapping):
        return value
    copy = {}
    if "_target_" in value:
        target = copy["_target_"] = looked_up_name(value["_target_"])
        if not _is_below(target, trusted):
            raise UserError(
                f"{where}._target_={target} is outside the trusted packages: a stored configuration names one class a group, and "
                f"takes no other where its constructor expects a value.{_if_yours(target)}"
            )
        _trusted_object(target, trusted)
    for key, item in value.items():
        if key == "_target_":
            continue
        if is_instruction(key):
            raise _instruction(where, key)
        copy[key] = _stored_value(item, f"{where}.{key}", trusted)
    return copy


def stored_object(target: str, group: str, trusted: Sequence[str] = ()) -> Any:
    """Return the member of a group that a stored configuration names; of the group `source`, one that only reads.

    Raises:
        UserError: the target is another class, a function, or a source that writes.
    """
    found = _member(target, STORED[group], trusted)
    if group == "source" and getattr(found, "writes", True):
        raise UserError(
            f"data.source._target_={target} of the stored configuration may write files (it does not say `writes = False`), and "
            "whoever wrote the configuration chose where. Name the dataset that you mean. Type: data.root=DIR"
        )
    return found


def source_writes(target: object, trusted: Sequence[str] = ()) -> bool:
    """Return whether a source of a stored configuration may write, as a source that imports a corpus does.

    Raises:
        UserError: the target is no source of this package or of a trusted one.
    """
    return bool(getattr(_member(looked_up_name(target), STORED["source"], trusted), "writes", True))


def _member(target: str, group: Group, trusted: Sequence[str]) -> Any:
    if _is_below(target, trusted):
        return _trusted_object(target, trusted)
    if _is_below(target, (group.package,)):
        found, (module, _, name) = _object_of(target), target.rpartition(".")
        is_defined_there = isinstance(found, type | FunctionType) and (found.__module__, found.__qualname__) == (
            module,
            name,
        )
        # A source may be a function that imports a corpus: the caller is told that it writes.
        if is_defined_there and (_offers(found, group) or (group.node == "data.source" and _makes_source(found))):
            return found
    raise UserError(
        f"{group.node}._target_={target} is outside the trusted packages: the configuration came with a checkpoint, so it may name "
        f"a class of {group.package} with the methods of {group.package}.protocol.{group.protocol}, and nothing "
        f"else.{_if_yours(target)}"
    )


def _offers(found: Any, group: Group) -> bool:
    """Return whether an object is a class with the methods of its group's protocol, and not a protocol itself."""
    if not isinstance(found, type) or getattr(found, "_is_protocol", False):
        return False
    protocol = getattr(import_module(f"{group.package}.protocol"), group.protocol)
    methods = [name for name, value in vars(protocol).items() if isinstance(value, FunctionType) and name[0] != "_"]
    return all(callable(getattr(found, name, None)) for name in methods)


def _makes_source(found: Any) -> bool:
    made = _hints(found).get("return") if isinstance(found, FunctionType) else None
    return isinstance(made, type) and _offers(made, STORED["source"])


def _places_for_members(found: Any) -> dict[str, tuple[str, bool]]:
    """Return the parameters of a constructor that take members of a group, by the protocol that annotates them: the group, and
    whether several are taken."""
    by_protocol = {(f"{group.package}.protocol", group.protocol): name for name, group in STORED.items()}
    places = {}
    for key, hint in _hints(found.__init__ if isinstance(found, type) else found).items():  # type: ignore[misc]
        for kind in (hint, *get_args(hint)):
            name = by_protocol.get((getattr(kind, "__module__", ""), getattr(kind, "__qualname__", "")))
            if name is not None and key != "return":
                places[key] = name, get_origin(hint) in (list, tuple, Sequence)
    return places


def _hints(found: Any) -> dict[str, Any]:
    try:
        return get_type_hints(found)
    except (NameError, TypeError):  # annotations that cannot be resolved here
        return {}


def _object_of(target: str) -> Any:
    """Return an object of a module of this package, None where the module has none of this name."""
    module_name, _, name = target.rpartition(".")
    try:
        found = vars(import_module(module_name)).get(name)
    except ImportError as error:
        raise not_found(target, error) from error
    if found is None:
        raise not_found(target, f"{module_name} has no {name}")
    return found


def _trusted_object(target: str, packages: Sequence[str]) -> Any:
    """Return an object that a trusted package defines; what a package only imports is not its own."""
    _find_here(target.partition(".")[0])
    try:
        found = hydra.utils.get_object(target)
    except (ImportError, ValueError) as error:
        raise not_found(target, error) from error
    if callable(found) and _is_below(f"{getattr(found, '__module__', '')}.", packages):
        return found
    raise UserError(
        f"_target_={target} is outside the trusted packages: {', '.join(packages)} only imports it from "
        f"{getattr(found, '__module__', 'elsewhere')}. Name a class that your package defines, or type: "
        "trusted_packages=[PACKAGE] with the package that does."
    )


def _find_here(package: str) -> None:
    """Let a trusted package that lies in the current folder be imported from there, as `python train.py` in that folder would.

    The program `ehr-embed` does not have the current folder on its path, and an installed package of that name comes first.
    """
    here = Path.cwd()
    if ((here / package).is_dir() or (here / f"{package}.py").is_file()) and find_spec(package) is None:
        sys.path.append(str(here))


def check_plain(config: Any, where: str = "the stored configuration") -> dict[str, Any]:
    """Return a configuration that came with a checkpoint, if it holds plain values and no interpolation.

    `train.py` stores resolved values. An interpolation that somebody put there would read this machine's environment, and an
    embedder could ask the hub for a model of that name.

    Raises:
        UserError: it holds something else.
    """

    def check(value: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise UserError(f"{where} is nested more than {MAX_DEPTH} deep, which no configuration of train.py is.")
        if isinstance(value, dict):
            for key, item in value.items():
                check(key, depth + 1)
                check(item, depth + 1)
        elif isinstance(value, list | tuple):
            for item in value:
                check(item, depth + 1)
        elif not isinstance(value, str | int | float | None):
            raise UserError(
                f"{where} holds a {type(value).__name__}: expected text, numbers, lists and mappings, as train.py stores them."
            )
        elif isinstance(value, str) and "${" in value:
            raise UserError(
                f"{where} holds {_shown(value)}: expected values, since train.py resolves every ${{...}} before it stores them. "
                "It would read this machine's settings for whoever wrote it. Train again, or use another run."
            )

    check(config, 0)
    if not isinstance(config, dict):
        raise UserError(f"{where} is a {type(config).__name__}: expected a mapping of groups. Train again.")
    return config


def not_found(target: object, error: object) -> UserError:
    """Return the error for a name that leads nowhere."""
    cause = getattr(error, "__cause__", None) or error
    if isinstance(cause, ModuleNotFoundError) and cause.name and (now := new_name(cause.name)) != cause.name:
        return UserError(
            f"{target} imports {cause.name}, which is now {now}. Import what it needs from ehr_embed.api, whose names stay."
        )
    first = str(target).partition(".")[0]
    if isinstance(cause, ModuleNotFoundError) and cause.name == first:
        return UserError(
            f"cannot find {_shown(target)}: no package {first} is installed or lies where Python looks. If it is a "
            f"folder of yours, type before the command: PYTHONPATH=FOLDER, the folder that {first}/ lies in; else check _target_."
        )
    return UserError(f"cannot find {_shown(target)}: {cause}. Check _target_.")


def _is_below(name: str, packages: Sequence[str]) -> bool:
    """Return whether a dotted name lies in one of the packages.

    >>> _is_below("torch.nn.Linear", ["torch.nn"]), _is_below("torchvision.X", ["torch"]), _is_below("x.Y", [""])
    (True, False, False)
    """
    return any(package.rstrip(".") and name.startswith(f"{package.rstrip('.')}.") for package in packages)


def is_instruction(key: Any) -> bool:
    """Return whether a key tells Hydra how to build an object, as `_args_` and `_partial_` do."""
    return isinstance(key, str) and key.startswith("_") and key.endswith("_")


def _instruction(where: str, key: object) -> UserError:
    return UserError(
        f"{where} has {_shown(key)}, an instruction to Hydra: a stored configuration holds the arguments of its class and nothing "
        "that changes how it is built, outside the trusted packages as within them. Train again, or use another run."
    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _shown(value: object) -> str:
    """Return a foreign value on one line, without characters that a terminal would obey.

    >>> print(_shown("a\\x1b[2Jb"), len(_shown("x" * 999)))
    a\\x1b[2Jb 80
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
    return text if len(text) <= 80 else f"{text[:77]}..."
