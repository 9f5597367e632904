"""Refuse mistakes that a second suffices to find, before the event store and the embedding are built, which may take hours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import torch
from omegaconf import DictConfig, OmegaConf

from ehr_embed.config.instantiate import builder, instantiate, instantiate_embedder
from ehr_embed.config.targets import looked_up_name, own_object
from ehr_embed.core.errors import UserError
from ehr_embed.data.labels import LabelSet
from ehr_embed.experiment.provenance import group_choices
from ehr_embed.experiment.recalibration import check_calibration
from ehr_embed.models.protocol import declarations
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.pooled import PooledSource
from ehr_embed.sources.protocol import SPLITS, Source
from ehr_embed.tasks import protocol as tasks
from ehr_embed.tasks.classification import refuse_missing_classes, refuse_no_labels
from ehr_embed.tasks.next_event import NextEvent
from ehr_embed.tasks.numbers import numbers_in
from ehr_embed.tasks.protocol import PredictsNumber, ReadsLabels, Task
from ehr_embed.tasks.set_up import check_task
from ehr_embed.trackers.protocol import ChecksFirst, Tracker

MAX_EVENTS = 20_000_000
"""Largest number of events whose subjects are read, in order to know their splits where folders define the splits."""
WIDTH, N_TOKENS = 16, 50
"""Sizes for a model that is only built to be refused."""


def preflight(cfg: DictConfig, run_dir: Path) -> None:
    """Refuse a stage that would be refused after its data are prepared: by its model, embedder, tracker, labels or splits.

    A corpus that has to be imported is imported first, as its labels are part of it.

    Raises:
        UserError: the error that the part itself would raise later.
    """
    task: Task = builder(cfg)(cfg.task)
    check_task(task)
    if isinstance(task, tasks.ChecksFirst):
        task.check()
    known = sizes_before_setup(task) or {}
    check_model(cfg, num_classes=1 if isinstance(task, PredictsNumber) else known.get("num_classes", 2))
    instantiate_embedder(cfg.embedder, trusted=tuple(cfg.trusted_packages)).close()
    check_tracker(cfg, run_dir)
    check_calibration(cfg, task)
    source: Source = builder(cfg)(cfg.data.source)
    splits = splits_of(source)
    if splits is not None:
        check_splits(splits, str(source.labels_dir.parent))
    if isinstance(task, ReadsLabels):
        for label_set in task.label_sets(source.labels_dir):
            if splits is not None:
                check_labels(label_set, splits)


def sizes_before_setup(task: Task) -> dict[str, int] | None:
    """Return the size of a model's outputs, `num_classes` or `vocab_size`, where a task without label sets knows it before `setup`;
    None where it does not, or trains nothing. A `vocab_size` stands for that of the data."""
    if not task.is_trained:
        return None
    if isinstance(task, NextEvent):
        return {"vocab_size": N_TOKENS}
    try:
        known = dict(task.sizes)
    except Exception:  # any error of a task that has read no data yet
        return None
    is_known = set(known) in ({"num_classes"}, {"vocab_size"}) and all(known.values())
    return {name: int(size) for name, size in known.items()} if is_known else None


def check_model(cfg: DictConfig, *, num_classes: int = 2) -> None:
    """Build the model without memory for its weights, with sizes that stand for those of the data.

    A model that reads texts is left out, as its constructor loads weights, and a model of models.

    Raises:
        UserError: the model's settings do not fit together, or its `_target_` is not allowed.
    """
    trusted = tuple(cfg.trusted_packages)
    target = own_object(looked_up_name(cfg.model.get("_target_")), trusted)
    if not declarations(target).reads_vectors or OmegaConf.is_list(cfg.model.get("members")):
        return
    sizes: dict[str, Any] = {"embedding_dim": WIDTH, "has_values": cfg.data["values"] in ("continuous", "both")}
    try:
        with torch.device("meta"):
            instantiate(cfg.model, trusted=trusted, **sizes, num_classes=num_classes)
    except NotImplementedError:  # a constructor that computes with its weights can do so only where they have memory
        return
    except UserError as error:
        try:  # a model that predicts events only refuses classes, and not for its settings
            with torch.device("meta"):
                instantiate(cfg.model, trusted=trusted, **sizes, vocab_size=N_TOKENS)
        except UserError:
            raise error from None


def check_tracker(cfg: DictConfig, run_dir: Path) -> None:
    """Build the tracker, so that it refuses now what it would refuse when the run starts.

    Raises:
        UserError: the tracker cannot start.
    """
    tracker: Tracker = builder(cfg)(
        cfg.tracker, run_dir=run_dir, config={}, tags=group_choices(cfg), table_digest="", table_path=run_dir / "table"
    )
    if isinstance(tracker, ChecksFirst):
        tracker.check()


def splits_of(source: Source) -> pl.DataFrame | None:
    """Return subject_id and split of a source's subjects; None if only reading the whole source would tell."""
    return source.split_of_subjects(max_events=MAX_EVENTS) if isinstance(source, MedsSource | PooledSource) else None


def check_splits(splits: pl.DataFrame, where: str) -> None:
    """Refuse a dataset of which a split has no subject.

    Raises:
        UserError: names the split and the sizes of all.
    """
    sizes = dict(splits.group_by("split").len().iter_rows())
    if empty := [split for split in SPLITS if not sizes.get(split)]:
        found = ", ".join(f"{split} {n}" for split, n in sorted(sizes.items()))
        raise UserError(
            f"{where}: the split {empty[0]} has no subjects (found: {found}). A run trains on train, chooses by tuning and is "
            "judged on held_out. Give each some subjects in metadata/subject_splits.parquet, or type: data.splits=FILE.parquet"
        )


def check_labels(labels: LabelSet, splits: pl.DataFrame) -> None:
    """Refuse a label set that has no label in a split, or only one class or one number there.

    Subjects without events are not known yet, so a label set that passes here may still be refused.

    Raises:
        UserError: names the label set and the split.
    """
    rows = labels.frame.join(splits, on="subject_id", how="inner")
    if not len(rows):
        raise UserError(
            f"label set {labels.name}: none of its subjects (such as {labels.frame['subject_id'][0]}) is in a split of the "
            "dataset. Point task.labels and data.root at the same dataset."
        )
    # The classes of other label sets are those of train's subjects that have events.
    names = ["false", "true"]
    for split in SPLITS:
        values = rows.filter(split=split)["value"]
        refuse_no_labels(values, labels.name, split)
        if labels.are_numbers:
            numbers_in(values, labels.name, split)
        elif labels.is_boolean:
            refuse_missing_classes((values == "true").cast(pl.Int64).to_numpy(), names, labels.name, split)
