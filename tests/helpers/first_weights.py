"""A checkpoint of a small decoder, and a model that starts from it."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import torch

from ehr_embed.data.vocabulary import Vocabulary, VocabularySettings
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.run_folder.checkpoints import initialise

SIZES = {"model_dim": 16, "n_heads": 2, "n_layers": 2}
NO_VOCABULARY = Vocabulary(VocabularySettings(), pl.DataFrame(), pl.DataFrame(), {})
"""Vectors that are not learned are not matched by name."""
FROZEN = EventEmbedding(torch.zeros(30, 12))
IDENTITY = {"embedder": "e1", "vocab_sha256": "v1"}
CONFIG = {
    "model": {"_target_": "ehr_embed.models.decoder.Decoder", **SIZES},
    "data": {"values": "both"},
    "embedder": {"_target_": "ehr_embed.embedders.hashing.HashingEmbedder"},
}


def saved(model: torch.nn.Module, folder: Path, **changes) -> Path:
    content = {"model_state_dict": model.state_dict(), "config": CONFIG, "identity": IDENTITY, "sizes": {}, "epoch": 3}
    torch.save({**content, "class_names": [], **changes}, folder / "best_checkpoint.pt")
    return folder


def start(
    model: torch.nn.Module, where: Path, *, embedding=FROZEN, config=CONFIG, identity=IDENTITY, whole: bool = False
) -> None:
    names = [] if whole else None
    initialise(model, embedding, where, config=config, identity=identity, vocabulary=NO_VOCABULARY, class_names=names)
