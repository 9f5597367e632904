"""Write down where the numbers of a run come from: configuration, environment, and digests of the files that it read."""

from __future__ import annotations

import datetime
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ehr_embed import __version__
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path, file_sha256, link_file, write_json
from ehr_embed.core.moved import renamed
from ehr_embed.core.programs import as_typed, shipped
from ehr_embed.embedding.prepare import Prepared
from ehr_embed.embedding.table import save_table
from ehr_embed.run_folder.checkpoints import checkpoint_path
from ehr_embed.run_folder.layout import CONFIG, ENVIRONMENT, LOOKUPS, TABLE, VOCABULARY
from ehr_embed.sources.code_texts import read_lookups

PACKAGES = (
    "torch",
    "lightning-fabric",
    "sentence-transformers",
    "transformers",
    "polars",
    "numpy",
    "hydra-core",
    "wandb",
)
CONFIG_HEADER = """# The resolved configuration of one run. To run it again:
#
#   python train.py --config-path {run_dir} --config-name config run_dir=DIR
"""


def resolved(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Return the configuration as plain values, with the part of Hydra's own configuration that a repetition needs."""
    config = renamed(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(config, dict)
    defaults = ["_self_", {"override hydra/job_logging": "stdout"}]
    hydra = {"run": {"dir": "."}, "output_subdir": None}
    return {"defaults": defaults, **config, "run_dir": str(run_dir), "hydra": hydra}


def write_inputs(run_dir: Path, config: dict[str, Any], prepared: Prepared, *, is_aligned: bool = False) -> None:
    """Write what a run starts from: its configuration, versions and hardware, the vocabulary and the embedding table.

    Args:
        run_dir: the run's folder.
        config: what `resolved` returned; `run_folder.finish.read_config` reads the file.
        prepared: the store and the table.
        is_aligned: whether the table is another than the file of the store's folder.
    """
    with atomic_path(run_dir / CONFIG) as path:
        path.write_text(
            as_typed(CONFIG_HEADER.format(run_dir=run_dir.resolve())) + OmegaConf.to_yaml(config), encoding="utf-8"
        )
    write_json(run_dir / ENVIRONMENT, environment())
    vocabulary = prepared.store.vocabulary
    vocabulary.save(run_dir / VOCABULARY)
    if is_aligned:
        save_table(run_dir / VOCABULARY / TABLE, prepared.table, prepared.identity)
    else:
        link_file(prepared.table_path, run_dir / VOCABULARY / TABLE)
    if paths := vocabulary.settings.lookups:  # the new codes of a later dataset need them too
        with atomic_path(run_dir / VOCABULARY / LOOKUPS) as path:
            read_lookups(paths).write_csv(path)


def environment() -> dict[str, Any]:
    """Return the versions of the code and the packages that numbers depend on, the hardware, and the date."""
    return {
        "ehr_embed": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": processor(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


@lru_cache(1)
def processor() -> str:
    """Return the name of the processor, or its architecture if it does not tell its name."""
    found = Path("/proc/cpuinfo")
    lines = found.read_text(encoding="utf-8", errors="replace").splitlines() if found.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


@lru_cache(1)
def commit() -> str | None:
    """Return the commit of the checkout that this package is read from, with `-dirty` where files differ; None outside one."""
    if not (shipped("conf").parent / ".git").exists():
        return None
    command = ["git", "-C", str(shipped("conf").parent), "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def digest_of_start(init_from: str | Path | None) -> str | None:
    """Return the digest of the checkpoint from which the weights start; None where they start anew."""
    return None if init_from is None else file_sha256(checkpoint_path(init_from))


def made_from(prepared: Prepared, *, init_from_sha256: str | None, samples_digest: str) -> dict[str, Any]:
    """Return the digests of a run's inputs, for its manifest.

    Args:
        prepared: the store and the table.
        init_from_sha256: digest of the checkpoint that the weights started from; None = there was none, or it is not known.
        samples_digest: digest of the samples of all splits, with their labels.
    """
    store = prepared.store
    found = {"source": store.manifest["source"], "table_digest": prepared.table_digest, **prepared.identity}
    if init_from_sha256 is not None:
        found["init_from_sha256"] = init_from_sha256
    return found | {"samples_digest": samples_digest}


def group_choices(cfg: DictConfig) -> list[str]:
    """Return `group=option` for every config group, as tags for the tracker; no tags outside a Hydra application.

    If a name stands in place of a group, as in `trainer.schedule=cosine`, this name is the chosen option.

    Raises:
        UserError: an option was typed for a group in whose place the configuration has another name.
    """
    if not HydraConfig.initialized():
        return []
    choices = {group: choice for group, choice in HydraConfig.get().runtime.choices.items() if choice}
    typed = {text.lstrip("+").partition("=")[0] for text in HydraConfig.get().overrides.task}
    for group, choice in choices.items():
        key = group.replace("/", ".")
        is_inner = "/" in group and "@" not in group and not group.startswith("hydra/")
        if not is_inner or not isinstance(name := OmegaConf.select(cfg, key), str):
            continue
        if group in typed and not {key, f"pretrain.{key}"} & typed and name != choice:
            raise UserError(
                f"{group}={choice} was typed, and {key}={name} of a YAML, such as that of the experiment, would replace it. "
                f"Write in the defaults of that YAML, in place of its key: - override /{group}: {name}"
            )
        choices[group] = name
    return [f"{group}={choice}" for group, choice in sorted(choices.items()) if not group.startswith("hydra/")]
