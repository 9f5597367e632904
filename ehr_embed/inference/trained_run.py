"""A finished run: opening its folder, and the samples it is asked about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ehr_embed.config.instantiate import check_stored, instantiate, stored_node, trainable_of
from ehr_embed.config.targets import check_plain, source_writes
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import file_sha256
from ehr_embed.core.manifest import checked
from ehr_embed.data.labels import read_labels
from ehr_embed.data.samples import Samples, build_samples
from ehr_embed.data.store import STATIC_TIME, SplitEvents
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.embedding.table import load_table
from ehr_embed.models.protocol import build_model
from ehr_embed.run_folder.checkpoints import read_checkpoint
from ehr_embed.sources.protocol import Source

VOCABULARY, TABLE, LOOKUPS = "vocabulary", "table.safetensors", "lookups.csv"


@dataclass(frozen=True)
class TrainedRun:
    """What a run leaves for use on other data.

    Attributes:
        config: its resolved configuration.
        model: with the best checkpoint's weights, in evaluation mode.
        embedding: the vectors of its tokens, as they were learned if they were.
        vocabulary: codes to tokens.
        class_names: what it predicts, in the order of its outputs; empty where it predicts events.
    """

    config: DictConfig
    model: nn.Module
    embedding: EventEmbedding
    vocabulary: Vocabulary
    class_names: list[str]


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
    config = OmegaConf.create(check_plain(checkpoint["config"], f"the configuration in {path}"))
    sizes: dict[str, Any] = checkpoint["sizes"]
    vocabulary = Vocabulary.load(folder / VOCABULARY)
    model = build_model(check_stored(config, "model", trusted), vocabulary, trusted=trusted, sizes=sizes)
    model.load_state_dict(checkpoint["model_state_dict"])
    embedding = EventEmbedding(table, trainable_of(config.embedder))
    embedding.load_state_dict(checkpoint.get("embedding_state_dict", {}))
    return TrainedRun(
        config=config,
        model=model.eval(),
        embedding=embedding.requires_grad_(False),
        vocabulary=vocabulary,
        class_names=checkpoint["class_names"],
    )


def trained_on(run: TrainedRun, *, trusted: tuple[str, ...] = ()) -> Source:
    """Return the source of the dataset that a run was trained on, opened for reading.

    A source that imports a corpus could write where the stored configuration says. In its place the MEDS dataset at its `root` is
    read, where there is one.

    Raises:
        UserError: the stored configuration names no source of this package or of `trusted`, or one that writes and whose dataset
            is not at its `root`.
    """
    node = stored_node(run.config, "source")
    if isinstance(node, dict) and "_target_" in node and source_writes(node["_target_"], trusted):
        root = node.get("root")
        if not isinstance(root, str) or not (Path(root).expanduser() / "data").is_dir():
            raise UserError(
                f"this run's source, {node['_target_']}, imports a corpus, and a stored configuration may not write. Its dataset is "
                "read from where the import lies, which is not known here. Type: data.root=DIR with the MEDS dataset"
            )
        kept = {key: node[key] for key in ("root", "splits", "split_column") if key in node}
        return instantiate(OmegaConf.create({"_target_": "ehr_embed.sources.meds.MedsSource", **kept}))  # type: ignore[no-any-return]
    return instantiate(check_stored(run.config, "source", trusted), trusted=trusted)  # type: ignore[no-any-return]


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
        UserError: no label belongs to a subject of the split, or no subject has a timed event.
    """
    if labels is None:
        last = events.times[events.offsets[1:] - 1]
        timed = last != STATIC_TIME
        frame = pl.DataFrame({"subject_id": events.subject_ids[timed], "prediction_time": last[timed]})
        frame = frame.with_columns(pl.col("prediction_time").cast(pl.Datetime("us")))
    else:
        frame = read_labels(labels, labels_dir).frame
        frame = frame.filter(pl.col("subject_id").is_in(pl.Series(events.subject_ids).implode()))
    if not len(frame):
        raise UserError(
            "no subject of this split has a prediction time, so there is nothing to go on from. Choose another split."
        )
    return build_samples(events, frame, np.zeros(len(frame), np.int64), max_length=max_length)
