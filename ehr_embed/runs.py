"""Opening the folder of a finished run: its model, its vocabulary and its table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from ehr_embed.checkpoints import read_checkpoint
from ehr_embed.errors import UserError
from ehr_embed.event_embedding import EventEmbedding
from ehr_embed.files import file_sha256
from ehr_embed.instantiate import instantiate, trainable_of
from ehr_embed.table import load_table
from ehr_embed.vocabulary import Vocabulary

VOCABULARY, TABLE = "vocabulary", "table.safetensors"


@dataclass(frozen=True)
class TrainedRun:
    """What a run leaves for use on other data.

    Attributes:
        config: its resolved configuration.
        model: with the best checkpoint's weights, in evaluation mode.
        embedding: the vectors of its tokens, as they were learned if they were.
        vocabulary: codes to tokens.
    """

    config: DictConfig
    model: nn.Module
    embedding: EventEmbedding
    vocabulary: Vocabulary


def open_run(where: str | Path) -> TrainedRun:
    """Open a run's folder; its `_target_`s may name this package and torch only.

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
    table, _ = load_table(folder / VOCABULARY / TABLE, expected=identity)
    config = OmegaConf.create(checkpoint["config"])
    sizes: dict[str, Any] = checkpoint["sizes"]
    model: nn.Module = instantiate(config.model, **sizes)
    model.load_state_dict(checkpoint["model_state_dict"])
    embedding = EventEmbedding(table, trainable_of(config.embedder))
    embedding.load_state_dict(checkpoint.get("embedding_state_dict", {}))
    return TrainedRun(config, model.eval(), embedding.requires_grad_(False), Vocabulary.load(folder / VOCABULARY))
