"""Hydra's `instantiate`, for trusted targets only: a `_target_` in a config is code that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, get_type_hints

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError
from torch import nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.moved import new_name, renamed
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.models.protocol import ReadsVocabulary

ALLOWED_PREFIXES = ("ehr_embed.", "torch.nn.", "torch.optim.", "optuna.samplers.", "optuna.pruners.")
"""Not all of torch: `torch.load` and `torch.hub.load` run what they are given."""
STORED_PREFIXES = {
    "model": ("ehr_embed.models.", "torch.nn."),
    "task": ("ehr_embed.tasks.",),
    "embedder": ("ehr_embed.embedders.",),
    "source": ("ehr_embed.sources.",),
}
"""What the groups of a configuration that came with a checkpoint may build: less than one's own command line."""


def targets(config: Any) -> Iterator[str]:
    """Every `_target_` in a config, at any depth.

    >>> list(targets({"_target_": "a.B", "inner": [{"_target_": "c.D"}]}))
    ['a.B', 'c.D']
    """
    if isinstance(config, DictConfig | ListConfig):
        config = OmegaConf.to_container(config, resolve=False)
    if isinstance(config, dict):
        if "_target_" in config:
            yield str(config["_target_"])
        for value in config.values():
            yield from targets(value)
    elif isinstance(config, list):
        for value in config:
            yield from targets(value)


def check_targets(config: Any, allowed: Sequence[str]) -> None:
    """Refuse targets that are not of an allowed package, by their name or by where what they name is defined.

    `ehr_embed.core.files.os.system` begins with an allowed prefix, and is defined elsewhere.

    Args:
        config: resolved, since an interpolation may bring a target with it.
        allowed: prefixes that end with a dot.

    Raises:
        UserError: naming the first such target.
    """
    if hidden := [text for text in _strings(config) if "${" in text]:
        raise UserError(
            f"{hidden[0]!r} would be resolved after its _target_ was looked for, and may bring another one. Write the value itself."
        )
    for target in targets(config):
        if target.startswith(tuple(allowed)) and _is_defined_in(target, tuple(allowed)):
            continue
        raise UserError(
            f"_target_={target} is outside the trusted packages ({', '.join(allowed)}), and building it would run its "
            "code. If it is yours, type: trusted_packages=[PACKAGE]"
        )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _is_defined_in(target: str, allowed: tuple[str, ...]) -> bool:
    try:
        found = hydra.utils.get_object(target)
    except (ImportError, ValueError) as error:
        raise _not_found(target, error) from error
    return callable(found) and f"{getattr(found, '__module__', '')}.".startswith(allowed)


def check_stored(config: Mapping[str, Any], group: str, trusted: Sequence[str] = ()) -> DictConfig:
    """A group of a configuration that came with a checkpoint, once it is known to name members of that group only.

    Its own `trusted_packages` are the word of whoever wrote it, and count for nothing.

    Args:
        config: all of it.
        group: model, task, embedder or source.
        trusted: further packages that the user who opens it trusts.

    Raises:
        UserError: as `check_targets`.
    """
    stored = OmegaConf.create(dict(config))
    node: DictConfig = stored.data.source if group == "source" else stored[group]
    check_targets(OmegaConf.to_container(node, resolve=True), STORED_PREFIXES[group] + _prefixes(trusted))
    return node


def _prefixes(packages: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{package.rstrip('.')}." for package in packages)


def instantiate(config: DictConfig, /, *, trusted: Sequence[str] = (), **sizes: Any) -> Any:
    """Build what `config._target_` names with its keys and the sizes that the data dictate.

    Args:
        config: a group's config.
        trusted: further packages a user declares in `trusted_packages`.
        sizes: build-time arguments (embedding_dim, num_classes, ...).

    Raises:
        UserError: a target outside the allowed prefixes, or arguments the target does not take or of the wrong type.
    """
    allowed = ALLOWED_PREFIXES + _prefixes(trusted)
    plain = renamed(OmegaConf.to_container(config, resolve=True))
    check_targets(plain, allowed)
    _check_types(config)
    # What was checked is what is built. Sizes are given to the target itself: merged into the config, a dict among them would be
    # instantiated too.
    try:
        build = hydra.utils.instantiate(OmegaConf.create(plain), _partial_=True, _convert_="all")
    except InstantiationException as error:
        raise _not_found(config.get("_target_"), error) from error
    try:
        return build(**sizes)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise UserError(
            f"cannot build {config.get('_target_')}: {error}. Check the keys of its YAML under conf/."
        ) from error


def builder(cfg: DictConfig) -> Callable[..., Any]:
    """Return `instantiate` for the nodes of a configuration, with the packages that the configuration trusts."""
    return partial(instantiate, trusted=tuple(cfg.trusted_packages))


def trainable_of(embedder: Mapping[Any, Any]) -> str:
    """What training does with the vectors of an embedder's config: its key `trainable`, `frozen` where it has none.

    >>> trainable_of(OmegaConf.create({"_target_": "a.B", "trainable": "full"})), trainable_of(OmegaConf.create({}))
    ('full', 'frozen')
    """
    return str(embedder.get("trainable", "frozen"))


def instantiate_embedder(config: DictConfig, /, *, trusted: Sequence[str] = ()) -> Any:
    """`instantiate` for an embedder, which makes vectors and knows nothing of `trainable`; nor does one inside it.

    Raises:
        UserError: as `instantiate`.
    """
    config = config.copy()
    for node in (config, config.get("inner")):
        if isinstance(node, DictConfig):
            with open_dict(node):
                node.pop("trainable", None)
    return instantiate(config, trusted=trusted)


def _check_types(config: DictConfig) -> None:
    """Compare the keys of a config with the annotations of its target, before the target trips over them.

    Raises:
        UserError: naming the first key whose value has another type.
    """
    try:
        hints = get_type_hints(_constructor(hydra.utils.get_object(new_name(str(config.get("_target_"))))))
    except (ImportError, ValueError) as error:
        raise _not_found(config.get("_target_"), error) from error
    except (NameError, TypeError):  # annotations of a foreign target that cannot be resolved here
        return
    for key, value in OmegaConf.to_container(config, resolve=True).items():  # type: ignore[union-attr]
        if key not in hints or (isinstance(value, dict) and "_target_" in value):
            continue
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=not isinstance(value, list))
        except PydanticSchemaGenerationError:
            continue
        except ValidationError as error:
            name = config._get_full_key(key)
            expected = str(getattr(hints[key], "__name__", hints[key]) if isinstance(hints[key], type) else hints[key])
            raise UserError(f"{name}={value}: expected {expected}, got {type(value).__name__}.") from error


def _constructor(target: Any) -> Any:
    return target.__init__ if isinstance(target, type) else target  # type: ignore[misc]


def _not_found(target: object, error: Exception) -> UserError:
    cause = error.__cause__ or error
    if isinstance(cause, ModuleNotFoundError) and cause.name and (now := new_name(cause.name)) != cause.name:
        return UserError(
            f"{target} imports {cause.name}, which is now {now}. Import what it needs from ehr_embed.api, whose names stay."
        )
    return UserError(f"cannot find {target}: {error.__cause__ or error}. Check _target_.")


def build_model(
    config: DictConfig, vocabulary: Vocabulary, *, trusted: tuple[str, ...] = (), sizes: dict[str, Any]
) -> nn.Module:
    """The model of a configuration, for events of `vocabulary`.

    Raises:
        UserError: as `instantiate`.
    """
    model: nn.Module = instantiate(config, trusted=trusted, **sizes)
    if isinstance(model, ReadsVocabulary):
        model.set_vocabulary(vocabulary)
    return model
