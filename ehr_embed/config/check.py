"""Check a composed configuration before anything is opened or built: the types and ranges of the keys that belong to
no `_target_` (the targets' own are compared with their annotations when they are built), and no value that cannot be meant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from ehr_embed.core.errors import UserError, unknown_name

Result = TypeVar("Result")
GROUPS = ("data", "embedder", "model", "task", "trainer", "tracker")
BUILT = ("data.source", "embedder", "model", "task", "trainer", "tracker")
"""Nodes that name what is built."""
Text = Annotated[str, StringConstraints(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Attributes:
        kind: its type, as pydantic reads it, strictly.
        expected: the same in words.
        example: a value to type.
    """

    kind: Any
    expected: str
    example: str


A_SEED = Key(Seed, "a whole number from 0 to 4294967295", "0")
KEYS = {
    "seed": A_SEED,
    "run_dir": Key(Text, "a folder", "runs/first"),
    "cache_dir": Key(Text, "a folder", "cache"),
    "resume": Key(str, "auto, force or overwrite", "auto"),
    "init_from": Key(Text | None, "a run's folder, a checkpoint, or null", "RUN_DIR"),
    "pretrain": Key(dict[str, Any] | None, "groups of a first stage, or null", "null"),
    "integrity": Key(str, "auto, full or size", "auto"),
    "audit": Key(str, "warn, error or off", "warn"),
    "trusted_packages": Key(list[Text], "a list of packages", "[PACKAGE]"),
    "overwrite": Key(bool, "true or false", "true"),
    "data.values": Key(str, "bins, continuous, both or none", "both"),
    "data.n_bins": Key(Annotated[int, Field(ge=2, le=10_000)], "2 to 10000 bins", "10"),
    "data.min_count": Key(Annotated[int, Field(ge=1)], "1 or more events", "5"),
    "data.lookups": Key(list[Text], "a list of CSV files", "[FILE.csv]"),
    "data.min_text_coverage": Key(Share, "a share in [0, 1]", "0.8"),
    "data.describe_unseen": Key(bool, "true or false", "true"),
    "data.hidden_codes": Key(Annotated[float, Field(ge=0, lt=1)], "a share in [0, 1)", "0"),
    "data.hidden_seed": A_SEED,
    "data.renamed": Key(Text | None, "a CSV file, a table that comes with the package, or null", "null"),
    "data.renamed_missing": Key(Literal["refuse", "keep"], "refuse or keep", "refuse"),
    "data.aligned_to": Key(Text, "auto, none, or the folder of the run of init_from", "auto"),
    "data.alignment_rules": Key(Text | None, "a YAML file of rules, or null", "null"),
    "data.alignment_pairs": Key(Text | None, "a CSV file with columns code,matched_code, or null", "null"),
    "data.alignment_texts": Key(Literal["own", "shuffled"], "own or shuffled", "own"),
    "data.root": Key(Text | None, "a folder, or null", "DIR"),
    "run": Key(Text, "the folder of a finished run", "RUN_DIR"),
    "output": Key(Text, "a file or folder to write", "OUT"),
    "device": Key(Text, "auto, cpu or cuda", "auto"),
    "split": Key(Text | None, "train, tuning, held_out, or null", "held_out"),
    "labels": Key(Text | None, "the name or path of a label set, or null", "NAME"),
    "target": Key(Text | None, "a class of the run, or null", "null"),
    "subject": Key(int | None, "a subject_id, or null", "SUBJECT_ID"),
    "prediction_time": Key(str | int | None, "a time such as 2020-01-31, or null", "null"),
    "max_samples": Key(int, "a whole number", "100"),
    "min_samples": Key(int, "a whole number", "5"),
    "n_steps": Key(int, "a whole number", "16"),
    "max_steps": Key(int, "a whole number", "2048"),
    "tolerance": Key(float, "a number above 0", "0.01"),
    "n_samples": Key(int, "a whole number", "20"),
    "horizon_days": Key(float, "a number of days", "365"),
    "max_new_events": Key(int, "a whole number", "128"),
    "prompt_length": Key(int | None, "a number of events, or null", "null"),
    "stop_codes": Key(list[Text], "a list of codes", "[MEDS_DEATH]"),
    "temperature": Key(float, "a number from 0 on", "1.0"),
    "top_k": Key(int | None, "a whole number, or null", "null"),
    "top_p": Key(float | None, "a share, or null", "null"),
    "use_cache": Key(bool, "true or false", "true"),
    "batch_size": Key(int, "a whole number", "32"),
    "model.max_length": Key(Annotated[int, Field(ge=1, lt=2**31)], "1 or more events", "512"),
}


def check_config(cfg: DictConfig) -> None:
    """Refuse a configuration of which something is missing, of another type, or out of its range.

    Keys that `cfg` does not have are not asked for: entry points differ in what they take.

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
    if "run" not in config:  # the commands for a finished run build what its checkpoint says
        for name in BUILT:
            _check_built(config, name)
    for name, key in KEYS.items():
        _check(config, name, key)
    _check_stage(config.get("pretrain"))


def checks_config(function: Callable[[DictConfig], Result]) -> Callable[[DictConfig], Result]:
    """Decorate what does the work of an entry point: its configuration is checked before anything else."""

    @wraps(function)
    def checked(cfg: DictConfig) -> Result:
        check_config(cfg)
        return function(cfg)

    return checked


def _check(config: dict[str, Any], name: str, key: Key) -> None:
    found, value = _select(config, name)
    if not found:
        return
    try:
        TypeAdapter(key.kind).validate_python(value, strict=True)
    except ValidationError as error:
        raise UserError(
            f"{name}={_shown(value)}: expected {key.expected}, got {type(value).__name__}. Nothing was read or written. "
            f"Type: {name}={key.example}"
        ) from error


def _check_built(config: dict[str, Any], name: str) -> None:
    found, node = _select(config, name)
    if not found:
        return
    group = name.split(".")[0]
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        raise UserError(
            f"{name}={_shown(node)}: expected a mapping with _target_, which names what is built, as the files of "
            f"conf/{group}/ are. Type: {group}=OPTION"
        )
    if name == "model" and "max_length" not in node:
        raise UserError(
            "model.max_length is missing: expected the longest sequence, in events. Type: +model.max_length=512"
        )


def _check_stage(stage: dict[str, Any] | None) -> None:
    for group, node in (stage or {}).items():
        if group not in GROUPS:
            raise unknown_name("key of pretrain", group, GROUPS)
        if not isinstance(node, dict):
            raise UserError(
                f"pretrain.{group}={_shown(node)}: expected the group's keys. See conf/experiment/pretrain_then_finetune.yaml"
            )


def _select(config: dict[str, Any], name: str) -> tuple[bool, Any]:
    """Return whether a configuration has a key, and its value; a node that is no mapping has no keys below it.

    >>> _select({"data": {"n_bins": 3}}, "data.n_bins"), _select({"data": 3}, "data.n_bins")
    ((True, 3), (False, None))
    """
    node: Any = config
    for part in name.split("."):
        if not isinstance(node, dict) or part not in node:
            # A group that is no mapping must not hide that what it should name is missing.
            return (True, node) if name in BUILT and not isinstance(node, dict) else (False, None)
        node = node[part]
    return True, node


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _leaves(value, f"{key}[{number}]")
    else:
        yield key, node


def _shown(value: Any) -> str:
    """A value as it is typed, on one line and not too long.

    >>> _shown(None), _shown("a\\nb"), len(_shown("x" * 999))
    ('null', 'a b', 60)
    """
    text = "null" if value is None else " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
