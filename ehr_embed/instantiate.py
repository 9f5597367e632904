"""Hydra's `instantiate`, for trusted targets only: a `_target_` in a config is code that runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_type_hints

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from ehr_embed.errors import UserError

ALLOWED_PREFIXES = ("ehr_embed.", "torch.", "sentence_transformers.", "optuna.")


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


def instantiate(config: DictConfig, /, *, trusted: Sequence[str] = (), **sizes: Any) -> Any:
    """Build what `config._target_` names with its keys and the sizes that the data dictate.

    Args:
        config: a group's config.
        trusted: further packages a user declares in `trusted_packages`.
        sizes: build-time arguments (embedding_dim, num_classes, ...).

    Raises:
        UserError: a target outside the allowed prefixes, or arguments the target does not take or of the wrong type.
    """
    allowed = (*ALLOWED_PREFIXES, *(f"{package.rstrip('.')}." for package in trusted))
    for target in targets(config):
        if not target.startswith(allowed):
            raise UserError(
                f"_target_={target} is outside the trusted packages ({', '.join(allowed)}), and building it would run its "
                "code. If it is yours, type: trusted_packages=[PACKAGE]"
            )
    _check_types(config)
    # Sizes are given to the target itself: merged into the config, a dict among them would be instantiated too.
    try:
        build = hydra.utils.instantiate(config, _partial_=True, _convert_="all")
    except InstantiationException as error:
        raise _not_found(config, error) from error
    try:
        return build(**sizes)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise UserError(
            f"cannot build {config.get('_target_')}: {error}. Check the keys of its YAML under conf/."
        ) from error


def trainable_of(embedder: DictConfig) -> str:
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
        hints = get_type_hints(_constructor(hydra.utils.get_object(str(config.get("_target_")))))
    except (ImportError, ValueError) as error:
        raise _not_found(config, error) from error
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


def _not_found(config: DictConfig, error: Exception) -> UserError:
    return UserError(f"cannot find {config.get('_target_')}: {error.__cause__ or error}. Check _target_.")
