"""Translate a config of the original pipeline into an experiment YAML of this package.

    python -m ehr_embed.migrate OLD.yaml
    python -m ehr_embed.migrate OLD.yaml > my/experiment/old.yaml
    python train.py --config-dir my experiment=old

The output is a YAML file. Its comments hold the command line and list the keys that are no longer needed and the unknown keys.
The table below covers the keys of the four configs in https://github.com/Ashvin-Gupta/CancEHR-Training
(src/pipelines/embedded_based) and those in that repository's README; docs/migration.md shows the same table.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError  # what OmegaConf.load raises

from ehr_embed.core.errors import UserError
from ehr_embed.core.pipes import reader_may_leave
from ehr_embed.core.programs import command

STAGES = ("create", "pretrain", "encoder", "decoder")
"""The four configs of the original: create embeddings, pretrain the decoder, fine-tune the encoder, fine-tune the decoder."""
CREATE, PRETRAIN, ENCODER, DECODER = ((stage,) for stage in STAGES)
TRAINING = PRETRAIN + ENCODER + DECODER
FINE_TUNING = ENCODER + DECODER
EMBEDDERS: dict[str, tuple[str, dict[str, Any]]] = {
    # The original gave E5 no prefix, and did not normalise the vectors of the multilingual model.
    "all-MiniLM-L6-v2": ("minilm_l6", {}),
    "all-MiniLM-L12-v2": ("minilm_l12", {}),
    "all-mpnet-base-v2": ("mpnet", {}),
    "paraphrase-multilingual-mpnet-base-v2": ("multilingual_mpnet", {"embedder.normalize": False}),
    "e5-large-v2": ("e5_large", {"embedder.prompt": None}),
}
BATCH_TOKENS = 16_384
"""Default of trainer.batch_tokens: a batch with more events, padding included, is made smaller."""
DEFAULT_EPOCHS = 50
"""Default of trainer.epochs."""


@dataclass(frozen=True)
class Key:
    """A config key of the original and its counterpart.

    Attributes:
        old: dotted path of the key.
        stages: the original's configs that contain the key, of `STAGES`.
        new: key or config group of this package that takes the value; None = the value is not needed.
        why: reason why the value is not needed, or a note on the counterpart.
    """

    old: str
    stages: tuple[str, ...]
    new: str | None
    why: str = ""


def _same(section: str, target: str, names: str, stages: tuple[str, ...]) -> list[Key]:
    return [Key(f"{section}.{name}", stages, f"{target}.{name}") for name in names.split()]


KEYS = (
    *_same(
        "data", "data", "data_dir vocab_filepath labels_filepath medical_lookup_filepath lab_lookup_filepath", CREATE
    ),
    *_same("data", "data", "region_lookup_filepath time_lookup_filepath cutoff_months", CREATE),
    Key(
        "data.cutoff_months",
        TRAINING,
        None,
        "only a reminder in the original: the cut-off is applied when events are read",
    ),
    Key("data.format", CREATE, None, "every token is an event"),
    Key(
        "data.vocab_embedding_path",
        CREATE,
        None,
        "the table is kept in cache_dir; to write it: export=vocab_pt export.dir=DIR",
    ),
    Key(
        "data.embedding_output_dir",
        CREATE,
        None,
        "ids and one table replace the files; to write them: export=patient_files export.dir=DIR",
    ),
    Key("data.embedding_output_dir", TRAINING, "data.data_dir", "with data=patient_files"),
    Key("model.model_name", CREATE, "embedder", "or embedder.model for a model without a YAML of its own"),
    Key("model.name", CREATE, "embedder", "the name of the same key in the original's README"),
    Key("model.batch_size", CREATE, "embedder.batch_size"),
    Key("model.device", CREATE, "embedder.device"),
    Key("device", CREATE, "embedder.device"),
    Key("device", TRAINING, "trainer.accelerator"),
    Key("model.embedding_dim", STAGES, None, "read from the embedder"),
    Key("model.type", TRAINING, "model"),
    *_same("model", "model", "model_dim n_heads n_layers dropout", TRAINING),
    Key("model.context_length", TRAINING, "model.max_length"),
    Key("model.max_length", TRAINING, "model.max_length"),
    Key("model.pooling", FINE_TUNING, "model.pooling"),
    Key("model.vocab_size", PRETRAIN + DECODER, None, "read from the vocabulary"),
    Key("model.num_classes", FINE_TUNING, None, "read from the labels"),
    Key("model.add_classification_head", DECODER, None, "the task determines the head"),
    Key("training.task", TRAINING, "task"),
    *_same("training", "trainer", "batch_size epochs learning_rate min_learning_rate weight_decay", TRAINING),
    *_same("training", "trainer", "num_workers save_every warmup_steps", TRAINING),
    Key("training.scheduler_patience", FINE_TUNING, "trainer.scheduler_patience"),
    Key("training.early_stopping_patience", FINE_TUNING, "trainer.patience"),
    Key("training.patience", FINE_TUNING, "trainer.patience"),
    Key(
        "training.eval_batch_size",
        TRAINING,
        None,
        "evaluation uses the batches of training; its numbers do not depend on them",
    ),
    Key("training.class_weights", FINE_TUNING, "task.class_weights"),
    Key(
        "training.pretrained_checkpoint",
        FINE_TUNING,
        "init_from",
        "a run of this package: checkpoints of the original do not load",
    ),
    Key("training.output_dir", CREATE, None, "the store and the table lie in cache_dir"),
    Key("training.output_dir", TRAINING, "run_dir"),
    Key("training.overwrite_output_dir", CREATE, None, "existing files are used; to build them again: overwrite=true"),
    Key("seed", TRAINING, "seed"),
    Key("training.seed", TRAINING, "seed"),
    Key("name", STAGES, None, "run_dir names a run"),
    Key("wandb.enabled", TRAINING, "tracker", "wandb if the value is true"),
    Key("wandb.project", TRAINING, "tracker.project"),
    Key("wandb.run_name", TRAINING, "tracker.name"),
)


@dataclass
class Migration:
    """The translation of one config.

    Attributes:
        stage: kind of the config, one of `STAGES`.
        groups: config group -> option.
        values: key -> value.
        dropped: one line per key that is not needed, with the reason.
        unknown: keys that do not occur in the original's configs, with their values.
    """

    stage: str
    groups: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def program(self) -> str:
        """Return the script that runs the translated config."""
        return "embed.py" if self.stage == "create" else "train.py"

    @property
    def command(self) -> list[str]:
        """Return the overrides of the equivalent command line."""
        groups = [f"{group}={option}" for group, option in self.groups.items()]
        return groups + [f"{key}={hydra_value(value)}" for key, value in self.values.items()]


def migrate(config: dict[str, Any]) -> Migration:
    """Translate every key of a config of the original.

    Raises:
        UserError: the config is none of the original's four.

    >>> old = {"model": {"type": "transformer_encoder_embedded", "context_length": 64, "layers": 2},
    ...     "training": {"batch_size": 8, "output_dir": "out"}, "data": {"embedding_output_dir": "files"}}
    >>> new = migrate(old)
    >>> new.command[:4]
    ['data=patient_files', 'model=encoder', 'task=classification', 'model.max_length=64']
    >>> new.unknown
    ['model.layers=2']
    """
    leaves = dict(_leaves(config))
    result = Migration(_stage(leaves))
    stage = result.stage
    result.groups["data"] = "tokenized" if stage == "create" else "patient_files"
    if stage != "create":
        result.groups["model"] = "decoder" if stage in ("pretrain", "decoder") else "encoder"
        result.groups["task"] = "next_event" if stage == "pretrain" else "classification"
    places = {key.old: key for key in KEYS if stage in key.stages}
    for old, value in leaves.items():
        place = places.get(old)
        if place is None:
            result.unknown.append(f"{old}={value}")
        elif place.new is None:
            result.dropped.append(f"{old}={value}: {place.why}")
        elif value is not None:
            _place(result, place.new, value)
    if stage != "create":
        result.values.setdefault("trainer.warmup_steps", 0)  # the original has no warm-up
    if stage == "pretrain":
        # The original predicts only the next token, with an output matrix of its own, and trains all epochs on a cosine schedule.
        result.values |= {"model.vocabulary_head": "linear", "task.time_weight": 0, "trainer.schedule": "cosine"}
        result.values["trainer.patience"] = result.values.get("trainer.epochs", DEFAULT_EPOCHS)
    if stage in FINE_TUNING:
        result.values["task.monitor"] = "f1"  # the original chooses the best epoch by F1
    if stage == "decoder":
        result.values.setdefault("model.pooling", "mean")
    if result.groups.get("model") == "decoder":
        # The original's decoder reads the order of events only, and the original's files hold no times.
        result.values["model.times"] = []
    batch_size, max_length = (result.values.get(key, 0) for key in ("trainer.batch_size", "model.max_length"))
    if batch_size * max_length > BATCH_TOKENS:
        result.values["trainer.batch_tokens"] = batch_size * max_length
    return result


def _place(result: Migration, new: str, value: Any) -> None:
    if new in ("model", "task"):
        return  # the stage already determines model and task
    if new == "embedder":
        known = EMBEDDERS.get(str(value).rpartition("/")[2])
        result.groups["embedder"] = known[0] if known else "minilm_l6"
        result.values.update(known[1] if known else {"embedder.model": value})
    elif new == "tracker":
        result.groups["tracker"] = "wandb" if value else "jsonl"
    elif new.startswith("tracker.") and result.groups.get("tracker") == "jsonl":
        result.dropped.append(f"{new.replace('tracker', 'wandb')}={value}: W&B is not enabled")
    else:
        if new.startswith("tracker."):
            result.groups["tracker"] = "wandb"
        result.values[new] = value


def _leaves(config: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            # `enabled` comes first, because the translation of the other W&B keys depends on it.
            ordered = dict(sorted(value.items(), key=lambda item: item[0] != "enabled"))
            yield from _leaves(ordered, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _stage(leaves: dict[str, Any]) -> str:
    kind, task = str(leaves.get("model.type", "")), str(leaves.get("training.task", ""))
    if "autoregressive" in task:
        return "pretrain"
    if kind:
        if not kind.startswith(("transformer_encoder", "transformer_decoder")):
            raise UserError(
                f"model.type={kind}: expected transformer_encoder_embedded or transformer_decoder_embedded."
            )
        is_pretraining = "decoder" in kind and "model.num_classes" not in leaves and task != "classification"
        return "pretrain" if is_pretraining else ("decoder" if "decoder" in kind else "encoder")
    if {"data.vocab_filepath", "data.vocab_embedding_path", "model.model_name"} & set(leaves):
        return "create"
    raise UserError(
        "this is none of the original's four configs: expected model.type (pretraining, fine-tuning), or data.vocab_filepath "
        f"(create embeddings); found {', '.join(leaves) or 'nothing'}."
    )


def hydra_value(value: Any) -> str:
    """Return a value in Hydra's grammar of overrides.

    >>> [hydra_value(v) for v in (None, True, 1e-4, [0.5, 1.5], "a/b.csv", "it's, well")]
    ['null', 'true', '0.0001', '[0.5,1.5]', 'a/b.csv', "'it\\\\'s, well'"]
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(hydra_value(item) for item in value)}]"
    text = str(value)
    if not isinstance(value, str) or re.fullmatch(r"[A-Za-z./_-][\w./@:+-]*", text):
        return text
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def render(migration: Migration, old: str) -> str:
    """Return the YAML text, with the command, the dropped keys and the unknown keys as comments.

    Args:
        migration: the translation.
        old: name of the original's file.
    """
    program = command(migration.program.removesuffix(".py"))
    words = [program, *(shlex.quote(word) for word in migration.command)]
    lines = ["# @package _global_", f"# {old}, migrated from the original pipeline ({migration.stage}).", "#"]
    lines += [f"#   {' '.join(words)}", "#"]
    for title, entries in (
        ("Not needed here", migration.dropped),
        ("Unknown, not in the original's four configs; nothing was guessed", migration.unknown),
    ):
        if entries:
            lines += [f"# {title}:", *(f"#   {entry}" for entry in entries), "#"]
    nested = OmegaConf.create(
        {"defaults": [{f"override /{group}": option} for group, option in migration.groups.items()]}
    )
    for key, value in migration.values.items():
        OmegaConf.update(nested, key, value)
    return "\n".join([*lines[:-1], OmegaConf.to_yaml(nested).rstrip()])


@reader_may_leave()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog=command("migrate"), description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("old", help="a config of the original: create embeddings, pretrain, or fine-tune")
    old = parser.parse_args(arguments).old
    try:
        if not Path(old).is_file():
            raise UserError(f"no such file {old}. Type: python -m ehr_embed.migrate OLD.yaml")
        try:
            config = OmegaConf.to_container(OmegaConf.load(old))
        except YAMLError as error:
            raise UserError(f"{old}: not readable as YAML ({error}).") from error
        if not isinstance(config, dict):
            raise UserError(f"{old}: expected sections model, data, training; found {type(config).__name__}.")
        migration = migrate({str(key): value for key, value in config.items()})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(render(migration, Path(old).name))
    if migration.unknown:
        print(f"{len(migration.unknown)} unknown keys were left out: {', '.join(migration.unknown)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
