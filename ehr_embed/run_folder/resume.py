"""Resume a run in its folder: find an earlier start, compare its settings, and continue it, skip it or refuse it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import cannot_write, remove_leftovers
from ehr_embed.core.manifest import MANIFEST
from ehr_embed.core.moved import ADAMW, SCHEDULES, renamed
from ehr_embed.core.settings import OneOf, check_setting
from ehr_embed.data.samples import Samples, samples_digest
from ehr_embed.embedders.protocol import SPEED_KEYS
from ehr_embed.run_folder.checkpoints import Continuation, read_checkpoint
from ehr_embed.run_folder.contents import refuse_other_contents, remove_results
from ehr_embed.run_folder.finish import read_config
from ehr_embed.run_folder.layout import CALIBRATION, FINISHED, LATEST, LOCK, PREDICTIONS, VOCABULARY

log = logging.getLogger(__name__)
Mode = Annotated[str, OneOf("auto", "force", "overwrite")]
HARMLESS = (
    "run_dir",
    "cache_dir",
    "resume",
    "audit",
    "check",
    "trusted_packages",
    "integrity",
    "data.source.overwrite",
    "data.monitor",  # the default of task.monitor, which is compared
    "tracker",
    "hydra",
    "defaults",
    "event_vectors",  # defaults of model.whiten and model.shrinkage, which are compared
    "trainer.checkpoint_every",
    "trainer.save_every",
    "trainer.num_workers",
    "trainer.data_device",
    "trainer.prefetch",
    "trainer.profile",
    "report",
    "trainer.threads",
    *(f"embedder.{key}" for key in SPEED_KEYS),
)
"""Keys and groups that do not change the results of a run. `trainer.threads` may change the last digits, since it changes the
order in which numbers are added; another machine would do the same."""
NEW: dict[str, Any] = {
    "calibration._target_": "ehr_embed.calibration.none.NoCalibration",
    "data.aligned_to": "auto",
    "data.alignment_matching": "nearest",
    "data.alignment_pairs": None,
    "data.alignment_rules": None,
    "data.alignment_texts": "own",
    "data.alignment_twins": None,
    "data.text_variants": 0.0,
    "data.variant_kinds": ["synonyms", "words", "neighbours"],
    "ensemble.members": {},
    "ensemble.runs": [],
    "ensemble.weights": "tuning",
    "model.code_dropout": 0.0,
    "model.shrinkage": 0.1,
    "model.text_noise": 0.0,
    "model.whiten": False,
    "model.windows_hours": None,
    "task.margin": 0.1,
    "task.min_cosine": 0.5,
    "task.n_events": 8,
    "task.prefixes": None,
    "task.words": None,
    "trainer.betas": None,
    "trainer.bucket_batches": 64,
    "trainer.compile": False,
    "trainer.devices": 1,
    "trainer.ema": None,
    "trainer.keep": "best",
    "trainer.min_steps": None,
    "trainer.nodes": 1,
    "trainer.pull": 0.0,
    "trainer.optimizer._target_": ADAMW,
    "trainer.optimizer.betas": [0.9, 0.999],
    "trainer.schedule.factor": 0.5,
    "trainer.schedule.patience": 3,
    "trainer.scheduler_patience": None,
    "trainer.strategy": "auto",
    "trainer.teacher": None,
    "trainer.teacher_share": 0.5,
    "trainer.teacher_trees": 330,
}
"""Keys that configurations of earlier versions lack, with the values that correspond to the behaviour of these versions."""
TRAINER_GROUPS = ("trainer.schedule", "trainer.optimizer")
OPTIONS = {target: name for name, target in SCHEDULES.items()} | {ADAMW: "adamw"}
"""Classes of `TRAINER_GROUPS` that a message can name as options of their group."""
CLAIM_TIMEOUT_S = 5.0
"""Seconds to wait for the folder's lock: a job whose search was killed ends, and frees its folder, within about a second."""


@dataclass(frozen=True)
class FoundRun:
    """The run that was found in a run's folder.

    Attributes:
        is_finished: whether the run ended with the present settings.
        checkpoint: checkpoint from which to continue; None = start from the beginning.
        is_changed: whether the run continues with other settings (resume=force).
        threads: CPU threads that each process of the run had; the same number reproduces the same digits. None if an earlier
            version wrote the checkpoint or the settings changed.
        batch_tokens: events per batch of the run, which stand for `trainer.batch_tokens=auto`; None = no run was found.
    """

    is_finished: bool = False
    checkpoint: Path | None = None
    is_changed: bool = False
    threads: int | None = None
    batch_tokens: int | None = None

    def load(self, identity: Mapping[str, str], samples: Mapping[str, Samples]) -> Continuation | None:
        """Read the checkpoint from which to continue; return None if there is none.

        Args:
            identity: digests of the present embedder and vocabulary.
            samples: samples of each split with their labels.

        Raises:
            UserError: the data or the embedder differ from those of the checkpoint, with which no `resume` mode continues.
        """
        if self.checkpoint is None:
            return None
        path, checkpoint = read_checkpoint(self.checkpoint)
        here = {**identity, "samples": samples_digest(samples)}
        there = {**checkpoint["identity"], "samples": checkpoint.get("samples_digest")}
        names = {"embedder": "the embedder", "vocab_sha256": "the vocabulary", "samples": "the samples or labels"}
        for key, value in here.items():
            if there.get(key) != value:
                raise UserError(
                    f"{path} was trained on other data: {names.get(key, key)} had digest {str(there.get(key))[:12]}, now "
                    f"{value[:12]}. A run that was trained partly on each would be a result on neither. Type: "
                    "run_dir=ANOTHER, or resume=overwrite to start again here"
                )
        progress = checkpoint["progress"]
        place = f"batch {progress['batch']}" if progress["batch"] else "its end"
        log.info("continuing %s at epoch %d, %s (step %d)", path.parent, progress["epoch"], place, progress["step"])
        return Continuation(path, checkpoint, self.is_changed)


def find_run(run_dir: Path, config: dict[str, Any], *, how: str) -> FoundRun:
    """Return the state of an earlier run in `run_dir` that a run with `config` may continue.

    Args:
        run_dir: the run's folder.
        config: resolved configuration of the present start.
        how: `auto` (continue with the same settings only), `force` (also with changed settings), `overwrite` (start again).

    Raises:
        UserError: the folder holds files that no run writes, the run there has other settings and `how` is `auto`, or `how` is
            unknown.
    """
    check_setting("resume", how, Mode)
    refuse_other_contents(run_dir)
    is_finished = (run_dir / FINISHED).exists()
    latest = run_dir / LATEST if (run_dir / LATEST).exists() else None
    if how == "overwrite" or not (is_finished or latest):
        return FoundRun()
    # The checkpoint stores the settings of its training; config.yaml beside it may be that of a later start with resume=force.
    checkpoint = {} if is_finished or latest is None else read_checkpoint(latest)[1]
    there: dict[str, Any] = checkpoint["config"] if checkpoint else _config_beside(run_dir)
    batch_tokens = there.get("trainer", {}).get("batch_tokens")
    if config.get("trainer", {}).get("batch_tokens") == "auto" and isinstance(batch_tokens, int):
        config = {**config, "trainer": {**config["trainer"], "batch_tokens": batch_tokens}}
    changes = differences(there, config)
    if changes and how != "force":
        old = _overrides(there, config)
        as_before = f"to go on as it was: {old}; " if old else ""
        raise UserError(
            f"{run_dir} holds a run with other settings: {'; '.join(changes)}. To go on with the new ones, type: "
            f"resume=force; {as_before}to start again here: resume=overwrite; to keep both: run_dir=ANOTHER"
        )
    if is_finished and not changes:
        return FoundRun(is_finished=True)
    threads = checkpoint.get("threads")
    has_threads = isinstance(threads, int) and threads > 0 and not changes
    return FoundRun(
        checkpoint=latest,
        is_changed=bool(changes),
        threads=threads if has_threads else None,
        batch_tokens=batch_tokens if isinstance(batch_tokens, int) else None,
    )


def _config_beside(run_dir: Path) -> dict[str, Any]:
    config = read_config(run_dir)
    if config is None:
        raise UserError(
            f"{run_dir} holds a finished run without config.yaml, so its settings are unknown. "
            "Type: run_dir=ANOTHER, or resume=overwrite to start again here"
        )
    return config


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return one text per key in which two resolved configurations differ, without the keys in `HARMLESS`.

    A path below `cache_dir` is compared without `cache_dir`.

    >>> differences({"seed": 0, "trainer": {"epochs": 5}}, {"seed": 0, "trainer": {"epochs": 9}, "run_dir": "x"})
    ['trainer.epochs was 5, now 9']
    """
    old, new, changed = _compared(there, here)
    return [f"{key} was {_shown(old, key)}, now {_shown(new, key)}" for key in changed]


def _compared(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return two configurations as dotted keys with their values, and the keys in which they differ."""
    old, new = (dict(_flat(renamed(config), str(config.get("cache_dir", "")))) for config in (there, here))
    for key, value in [(f"{stage}{key}", value) for stage in ("", "pretrain.") for key, value in NEW.items()]:
        for config in (old, new):
            if key in old or key in new:
                config.setdefault(key, value)
    keys = [key for key in dict.fromkeys([*old, *new]) if not _is_harmless(key)]
    return old, new, [key for key in keys if key not in old or key not in new or old[key] != new[key]]


def _overrides(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return overrides that restore the values of `there`; empty if a value is no plain number or word, or a key is new.

    >>> _overrides({"trainer": {"batch_size": 32}, "seed": 1}, {"trainer": {"batch_size": None}, "seed": 1})
    'trainer.batch_size=32'
    >>> _overrides({"model": {"times": ["gap"]}}, {"model": {"times": []}})
    ''
    >>> plateau = {"trainer": {"schedule": {"_target_": SCHEDULES["plateau"], "patience": 5}}}
    >>> cosine = {"trainer": {"schedule": {"_target_": SCHEDULES["cosine"]}}}
    >>> _overrides(plateau, cosine), _overrides(cosine, plateau)
    ('trainer/schedule=plateau trainer.schedule.patience=5', 'trainer/schedule=cosine')
    """
    old, _, changed = _compared(there, here)
    values: dict[str, Any] = {}
    for group in TRAINER_GROUPS:  # another member has other keys, so that its option is typed, and all of its keys
        if f"{group}._target_" in changed:
            own = {key: value for key, value in _flat(renamed(there), "") if key.startswith(f"{group}.")}
            values[group.replace(".", "/")] = OPTIONS.get(own.pop(f"{group}._target_", ""), "")
            values |= own
            changed = [key for key in changed if not key.startswith(f"{group}.")]
    values |= {key: old[key] for key in changed if key in old}
    values = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in values.items()}
    if any(key not in old for key in changed) or not all(re.fullmatch(r"[\w.+-]+", value) for value in values.values()):
        return ""
    return " ".join(f"{key}={value}" for key, value in values.items())


def _is_harmless(key: str) -> bool:
    own = key.removeprefix("pretrain.")
    return any(own == name or own.startswith(f"{name}.") for name in HARMLESS)


def _shown(config: Mapping[str, Any], key: str) -> str:
    if key not in config:
        return "not set"
    return "null" if config[key] is None else str(config[key])


def _flat(node: Mapping[str, Any], cache_dir: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, cache_dir, f"{prefix}{key}.")
        elif isinstance(value, str) and cache_dir and value.startswith(f"{cache_dir}/"):
            yield f"{prefix}{key}", f"CACHE{value.removeprefix(cache_dir)}"
        else:
            yield f"{prefix}{key}", value


@contextmanager
def claimed(run_dir: Path, *, is_new: bool) -> Iterator[None]:
    """Lock the folder for this process, and remove what a killed or earlier run left that no longer holds: metrics.json, the
    manifest, the calibration and half-written files.

    Args:
        run_dir: the run's folder, which is created if it is missing.
        is_new: also remove the results and checkpoints of an earlier run.

    Raises:
        UserError: another process has locked the folder, or it cannot be written to.
    """
    lock = FileLock(run_dir / LOCK)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=CLAIM_TIMEOUT_S)
    except Timeout:
        raise UserError(
            f"{run_dir}: another process is running there, and two would overwrite each other's checkpoints. "
            "Wait for its end, or type: run_dir=ANOTHER"
        ) from None
    except OSError as error:
        raise cannot_write(run_dir, error) from error
    try:
        for name in (FINISHED, MANIFEST, CALIBRATION):  # the run is unfinished from now on, and these no longer hold
            (run_dir / name).unlink(missing_ok=True)
        for folder in (run_dir, run_dir / PREDICTIONS, run_dir / VOCABULARY):
            remove_leftovers(folder)
        if is_new:
            remove_results(run_dir)
        yield
    finally:
        lock.release()
