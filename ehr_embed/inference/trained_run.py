"""Open the folder of a finished run, and build the samples for which it predicts."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from ehr_embed.calibration.calibrator import Calibrator
from ehr_embed.config.build_model import build_model
from ehr_embed.config.instantiate import check_stored, instantiate, instantiate_stored_source
from ehr_embed.config.targets import check_plain
from ehr_embed.core.errors import UserError
from ehr_embed.core.lost_data import ONLY_SAID, say_or_refuse
from ehr_embed.core.manifest import checked
from ehr_embed.data.boundary import say_unseen
from ehr_embed.data.labels import read_labels
from ehr_embed.data.samples import Samples, build_samples
from ehr_embed.data.store import STATIC_TIME, SplitEvents
from ehr_embed.data.vocabulary import TOKENS_FILE, Vocabulary, vocabulary_sha256
from ehr_embed.embedders.protocol import trainable_of
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.embedding.table import load_table
from ehr_embed.models.protocol import AlignsCodes, PoolsCodes, ReadsVocabulary, align_codes
from ehr_embed.run_folder.calibration import read_calibration
from ehr_embed.run_folder.checkpoints import read_checkpoint
from ehr_embed.run_folder.layout import CALIBRATION, TABLE, VOCABULARY
from ehr_embed.run_folder.origin import checked_matches, checked_twins
from ehr_embed.sources.protocol import Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedRun:
    """The parts of a finished run that are needed to use it on other data.

    Attributes:
        config: resolved configuration as plain values.
        model: model with the weights of the best checkpoint, in evaluation mode.
        embedding: token vectors, with the learned values if they were trained.
        vocabulary: vocabulary, which maps codes to tokens.
        class_names: classes in the order of the model's outputs; empty if the run predicts events.
        precision: precision in which the run was trained and evaluated; None if an earlier version did not record it.
        matches: code -> code as which the run reads it, and gate: a code of an earlier run, or of a dataset that was pooled with
            the code's own; None = codes are read as themselves.
        twins: code of the earlier run -> code of it whose events it takes too.
        is_pooled: whether the run was trained on pooled datasets, whose codes are read as each other's.
        embedder_digest: digest of the embedder whose vectors the run was trained on.
    """

    config: dict[str, Any]
    model: nn.Module
    embedding: EventEmbedding
    vocabulary: Vocabulary
    class_names: list[str]
    precision: str | None
    matches: dict[str, tuple[str, float]] | None = None
    twins: dict[str, str] | None = None
    is_pooled: bool = False
    embedder_digest: str | None = None


def open_run(where: str | Path, *, trusted: tuple[str, ...] = ()) -> TrainedRun:
    """Open a run's folder, and build its model from the stored configuration.

    A config group may only build classes of that group or of the packages in `trusted`. The packages that the stored
    configuration itself trusts are ignored, or the author of a shared folder could choose the code that runs here.

    Raises:
        UserError: the folder is not a run's, or its files do not belong together.
    """
    folder = Path(where).expanduser()
    found_sha256 = vocabulary_sha256(folder / VOCABULARY)
    if found_sha256 is None:
        found = "a folder without vocabulary/" if folder.is_dir() else "no such folder"
        raise UserError(f"run={where}: expected the folder of a finished run (run_dir of train.py), found {found}.")
    path, checkpoint = read_checkpoint(folder, key="run")
    identity: dict[str, str] = checkpoint["identity"]
    if found_sha256 != identity["vocab_sha256"]:
        raise UserError(
            f"{folder / VOCABULARY / TOKENS_FILE} has sha256 {found_sha256[:12]}, but {path.name} was trained with "
            f"{identity['vocab_sha256'][:12]}: token ids would mean other events. Restore the run's folder, or train again."
        )
    for file in (folder / VOCABULARY).iterdir():
        checked(file)
    table, _ = load_table(folder / VOCABULARY / TABLE, expected=identity)
    config = check_plain(checkpoint["config"], f"the configuration in {path}")
    sizes: dict[str, Any] = checkpoint["sizes"]
    vocabulary = Vocabulary.load(folder / VOCABULARY)
    model = build_model(check_stored(config, "model", trusted), vocabulary, trusted=trusted, sizes=sizes)
    matches, is_pooled = checked_matches(checkpoint.get("alignment"), path), bool(checkpoint.get("is_pooled"))
    twins = checked_twins(checkpoint.get("twins"), path)
    if matches is not None and is_pooled and isinstance(model, PoolsCodes):
        model.pool(matches)
    elif matches is not None and isinstance(model, AlignsCodes):
        align_codes(model, matches, twins)
    model.load_state_dict(checkpoint["model_state_dict"])
    if matches is not None and isinstance(model, ReadsVocabulary):
        model.set_vocabulary(vocabulary)  # now that the model knows which codes it knows
    embedding = EventEmbedding(table, trainable_of(config["embedder"]))
    embedding.load_state_dict(checkpoint.get("embedding_state_dict", {}))
    return TrainedRun(
        config=config,
        model=model.eval(),
        embedding=embedding.requires_grad_(False),
        vocabulary=vocabulary,
        class_names=checkpoint["class_names"],
        precision=checkpoint.get("precision"),
        matches=matches,
        twins=twins,
        is_pooled=is_pooled,
        embedder_digest=identity.get("embedder"),
    )


def stored_calibrator(
    folder: Path, class_names: list[str], *, is_exclusive: bool, trusted: tuple[str, ...] = ()
) -> Calibrator | None:
    """Return the calibration of the run's folder, which may name a calibration only; its numbers are checked.

    Args:
        folder: the run's folder.
        class_names: what the run predicts.
        is_exclusive: whether a sample has one of the classes.
        trusted: further packages from which a calibration may come.

    Raises:
        UserError: the calibration is missing, damaged, foreign or another run's.
    """
    found = read_calibration(folder, class_names)
    if found is None:
        return None
    method = instantiate(check_stored(found, "calibration", trusted), trusted=trusted)
    try:
        parameters = method.check(found["parameters"], len(class_names), is_exclusive=is_exclusive)
    except UserError as error:
        raise UserError(f"{folder / CALIBRATION}: {error} Restore the run's folder, or train again.") from error
    return Calibrator(method, parameters, is_exclusive)


def trained_on(run: TrainedRun, *, trusted: tuple[str, ...] = ()) -> Source:
    """Return the source of the dataset that a run was trained on, opened for reading.

    Raises:
        UserError: `instantiate_stored_source` refuses the stored configuration or does not find the dataset.
    """
    source: Source = instantiate_stored_source(run.config, trusted)
    return source


def device_named(name: str) -> torch.device:
    """Return the torch device of a name, where `auto` means a GPU if there is one, else the CPU.

    Raises:
        UserError: torch does not know the device, or there is no GPU.

    >>> device_named("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise UserError(f"device={name}: expected auto, cpu or cuda ({str(error).splitlines()[0]}).") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: torch finds no GPU here. Type: device=cpu")
    return device


def samples_to_predict(events: SplitEvents, labels: str | None, labels_dir: Path, *, max_length: int) -> Samples:
    """Return one sample per prediction time of a label set, or one per subject at its last event; all labels are zero.

    Args:
        events: events of the subjects.
        labels: name or path of a label set, whose values are not needed; None = predict at each subject's last event.
        labels_dir: folder in which the name of a label set is looked up.
        max_length: largest number of events per sample.

    Raises:
        UserError: no label belongs to a subject of the split, no subject has a timed event, or (nearly) all prediction times lie
            before every timed event.
    """
    asked = None if labels is None else read_labels(labels, labels_dir, needs_values=False).frame
    frame = times_to_predict(events, asked)
    if asked is None:
        say_static_only(len(events.subject_ids) - len(frame), len(events.subject_ids))
    elif len(frame) < len(asked):
        log.info("%d of the %d rows of labels %s are of the subjects asked for", len(frame), len(asked), labels)
    if not len(frame):
        raise nothing_to_predict()
    samples = build_samples(events, frame, np.zeros(len(frame), np.int64), max_length=max_length)
    say_unseen(events, samples, where=f"labels {labels}")
    return samples


def times_to_predict(events: SplitEvents, labels: pl.DataFrame | None) -> pl.DataFrame:
    """Return the prediction times of the subjects in `events`, with the columns subject_id and prediction_time first.

    Args:
        events: events of the subjects.
        labels: label set, whose rows for these subjects are returned; None = the time of each subject's last timed event.
    """
    if labels is not None:
        return labels.filter(pl.col("subject_id").is_in(pl.Series(events.subject_ids).implode()))
    last = events.times[events.offsets[1:] - 1]
    timed = last != STATIC_TIME
    frame = pl.DataFrame({"subject_id": events.subject_ids[timed], "prediction_time": last[timed]})
    return frame.with_columns(pl.col("prediction_time").cast(pl.Datetime("us")))


def say_static_only(n: int, of: int) -> None:
    """Log how many of the subjects have static events only, and therefore no last event at which to predict."""
    say_or_refuse(
        n,
        of,
        "subjects have static events only, so they have no last event to predict at, and are left out",
        remedy="Give their prediction times: task.labels=NAME, or labels=NAME where futures are generated.",
        refused_from=ONLY_SAID,
    )


def nothing_to_predict() -> UserError:
    """Return the error for a split in which no subject has a prediction time."""
    return UserError(
        "no subject of this split has a prediction time, so there is no record to continue. Choose another split."
    )
