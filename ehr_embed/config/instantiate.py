"""Hydra's `instantiate`, for trusted targets only: a `_target_` in a config is code that runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict

from ehr_embed.config.check import check_targets
from ehr_embed.config.targets import (
    STORED,
    check_own,
    check_plain,
    check_stored_node,
    not_found,
    source_writes,
)
from ehr_embed.core.errors import UserError
from ehr_embed.embedders.protocol import FRAMEWORK_KEYS

MEDS = "ehr_embed.sources.meds.MedsSource"
"""The source that reads the MEDS dataset which an import has written."""


def check_stored(config: Mapping[str, Any], group: str, trusted: Sequence[str] = ()) -> DictConfig:
    """Return a group of a configuration that came with a checkpoint, once it is known to name members of that group only.

    The configuration's own `trusted_packages` are ignored, since whoever wrote it may have chosen them.

    Args:
        config: the whole configuration.
        group: model, task, embedder or source.
        trusted: further packages that the user who opens it trusts.

    Raises:
        UserError: as `check_stored_node`.
    """
    # Build from the checked copy, not from the original.
    return OmegaConf.create(check_stored_node(stored_node(config, group), group, tuple(trusted)))


def stored_node(config: Mapping[str, Any], group: str) -> Any:
    """Return the plain values of a group of a stored configuration, None where it has none.

    Raises:
        UserError: the group holds something else than plain values.
    """
    node: Any = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    for part in STORED[group].node.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return check_plain({group: node})[group]


def instantiate_stored_source(config: Mapping[str, Any], trusted: Sequence[str] = ()) -> Any:
    """Return the source of a configuration that came with a checkpoint, opened for reading.

    A source that imports a corpus could write where the configuration says. In its place the MEDS dataset at its `root` is read,
    where there is one.

    Raises:
        UserError: the configuration names no source of this package or of `trusted`, or one that writes and whose dataset is not
            at its `root`.
    """
    node = stored_node(config, "source")
    if isinstance(node, Mapping) and "_target_" in node and source_writes(node["_target_"], tuple(trusted)):
        root = node.get("root")
        if not isinstance(root, str) or not (Path(root).expanduser() / "data").is_dir():
            raise UserError(
                f"this run's source, {node['_target_']}, imports a corpus, and a stored configuration may not write. Where its "
                "MEDS dataset lies now is not known. Type: data.root=DIR"
            )
        kept = {key: node[key] for key in ("root", "splits", "split_column") if key in node}
        return instantiate(OmegaConf.create({"_target_": MEDS, **kept}))
    return instantiate(check_stored(config, "source", trusted), trusted=trusted)


def instantiate(config: DictConfig, /, *, trusted: Sequence[str] = (), **sizes: Any) -> Any:
    """Build what `config._target_` names with its keys and the sizes that the data dictate.

    Args:
        config: a group's config.
        trusted: further packages a user declares in `trusted_packages`.
        sizes: build-time arguments (embedding_dim, num_classes, ...).

    Raises:
        UserError: a target that is not allowed, or arguments the target does not take or of the wrong type.
    """
    resolved = OmegaConf.to_container(config, resolve=True)
    if not isinstance(resolved, dict) or "_target_" not in resolved:
        raise UserError(f"{config}: expected a mapping with _target_, which names what is built.")
    plain = check_own(resolved, tuple(trusted))
    check_targets(plain, tuple(trusted), where=config._get_full_key(""))
    # The values that were checked, and no others, are built. Sizes are given to the target itself: a dict among them that was
    # merged into the config would be instantiated too.
    try:
        build = hydra.utils.instantiate(OmegaConf.create(plain), _partial_=True, _convert_="all")
    except InstantiationException as error:  # of a member inside, such as the trainer's schedule
        if isinstance(cause := error.__cause__, UserError):
            raise cause from error
        if isinstance(cause, TypeError) and "argument" in str(cause):
            raise _wrong_keys(str(cause).partition("(")[0].removesuffix(".__init__"), cause) from error
        raise not_found(config.get("_target_"), error) from error
    try:
        return build(**sizes)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise _wrong_keys(config.get("_target_"), error) from error


def _wrong_keys(target: object, error: object) -> UserError:
    return UserError(f"cannot build {target}: {error}. Check the keys of its YAML under conf/.")


def builder(cfg: DictConfig) -> Callable[..., Any]:
    """Return `instantiate` for the nodes of a configuration, with the packages that the configuration trusts."""
    return partial(instantiate, trusted=tuple(cfg.trusted_packages))


def instantiate_embedder(config: DictConfig, /, *, trusted: Sequence[str] = ()) -> Any:
    """Build an embedder; neither the embedder nor an embedder inside it gets the keys that are the framework's (`FRAMEWORK_KEYS`).

    Raises:
        UserError: as `instantiate`.
    """
    config = config.copy()
    for node in (config, config.get("inner")):
        if isinstance(node, DictConfig):
            with open_dict(node):
                for key in FRAMEWORK_KEYS:
                    node.pop(key, None)
    return instantiate(config, trusted=trusted)
