"""A finished run: opening its folder, and the samples it is asked about."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from ehr_embed.config.instantiate import build_model, check_stored, instantiate_stored_source, trainable_of
from ehr_embed.config.targets import check_plain
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import file_sha256
from ehr_embed.core.manifest import checked
from ehr_embed.core.vanishing import ONLY_SAID, say_or_refuse
from ehr_embed.data.boundary import say_unseen
from ehr_embed.data.labels import read_labels
from ehr_embed.data.samples import Samples, build_samples
from ehr_embed.data.store import STATIC_TIME, SplitEvents
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.embedding.table import load_table
from ehr_embed.run_folder.checkpoints import read_checkpoint
from ehr_embed.run_folder.layout import TABLE, VOCABULARY
from ehr_embed.sources.protocol import Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedRun:
    """What a run leaves for use on other data.

    Attributes:
        config: its resolved configuration, as plain values.
        model: with the best checkpoint's weights, in evaluation mode.
        embedding: the vectors of its tokens, as they were learned if they were.
        vocabulary: codes to tokens.
        class_names: what it predicts, in the order of its outputs; empty where it predicts events.
        precision: in which it was trained and evaluated; None = an earlier version did not write it down.
    """

    config: dict[str, Any]
    model: nn.Module
    embedding: EventEmbedding
    vocabulary: Vocabulary
    class_names: list[str]
    precision: str | None


def open_run(where: str | Path, *, trusted: tuple[str, ...] = ()) -> TrainedRun:
    """Open a run's folder; of its configuration each group may build members of that group, and of the packages of `trusted`.

    Those that the run's own configuration trusts do not count: whoever hands on a folder would choose what runs here.

    Raises:
        UserError: not a run's folder, or files in it that do not belong together.
    """
    folder = Path(where).expanduser()
    if not (folder / VOCABULARY / "vocab.csv").is_file():
        found = "a folder without vocabulary/" if folder.is_dir() else "no such folder"
        raise UserError(f"run={where}: expected the folder of a finished run (run_dir of train.py), found {found}.")
    path, checkpoint = read_checkpoint(folder)
    identity: dict[str, str] = checkpoint["identity"]
    found_sha256 = file_sha256(folder / VOCABULARY / "vocab.csv")
    if found_sha256 != identity["vocab_sha256"]:
        raise UserError(
            f"{folder / VOCABULARY / 'vocab.csv'} has sha256 {found_sha256[:12]}, but {path.name} was trained with "
            f"{identity['vocab_sha256'][:12]}: token ids would mean other events. Restore the run's folder, or train again."
        )
    for file in (folder / VOCABULARY).iterdir():
        checked(file)
    table, _ = load_table(folder / VOCABULARY / TABLE, expected=identity)
    config = check_plain(checkpoint["config"], f"the configuration in {path}")
    sizes: dict[str, Any] = checkpoint["sizes"]
    vocabulary = Vocabulary.load(folder / VOCABULARY)
    model = build_model(check_stored(config, "model", trusted), vocabulary, trusted=trusted, sizes=sizes)
    model.load_state_dict(checkpoint["model_state_dict"])
    embedding = EventEmbedding(table, trainable_of(config["embedder"]))
    embedding.load_state_dict(checkpoint.get("embedding_state_dict", {}))
    return TrainedRun(
        config=config,
        model=model.eval(),
        embedding=embedding.requires_grad_(False),
        vocabulary=vocabulary,
        class_names=checkpoint["class_names"],
        precision=checkpoint.get("precision"),
    )


def trained_on(run: TrainedRun, *, trusted: tuple[str, ...] = ()) -> Source:
    """Return the source of the dataset that a run was trained on, opened for reading.

    Raises:
        UserError: as `instantiate_stored_source`.
    """
    source: Source = instantiate_stored_source(run.config, trusted)
    return source


def device_named(name: str) -> torch.device:
    """The device of a name, `auto` being a GPU if there is one.

    Raises:
        UserError: torch does not know or have it.

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
    """Records up to the prediction times of a label set, or up to each subject's last event; their labels are zeros.

    Raises:
        UserError: no label belongs to a subject of the split, no subject has a timed event, or (nearly) all prediction times lie
            before every timed event.
    """
    asked = None if labels is None else read_labels(labels, labels_dir).frame
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
    """Return the rows of `labels` that belong to subjects of the events; None: the time of each subject's last event, if it has
    one. The first columns are subject_id and prediction_time."""
    if labels is not None:
        return labels.filter(pl.col("subject_id").is_in(pl.Series(events.subject_ids).implode()))
    last = events.times[events.offsets[1:] - 1]
    timed = last != STATIC_TIME
    frame = pl.DataFrame({"subject_id": events.subject_ids[timed], "prediction_time": last[timed]})
    return frame.with_columns(pl.col("prediction_time").cast(pl.Datetime("us")))


def say_static_only(n: int, of: int) -> None:
    """Say how many of the subjects have static events only, and so no last event to predict at."""
    say_or_refuse(
        n,
        of,
        "subjects have static events only, so they have no last event to predict at, and are left out",
        remedy="Give their prediction times: task.labels=NAME, or labels=NAME where futures are generated.",
        refused_from=ONLY_SAID,
    )


def nothing_to_predict() -> UserError:
    """Return the error for a label set and a split that have no subject in common."""
    return UserError(
        "no subject of this split has a prediction time, so there is nothing to go on from. Choose another split."
    )
