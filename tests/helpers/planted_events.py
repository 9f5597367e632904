"""A planted dataset of event sequences, and a decoder that is pretrained on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import seed_everything

from ehr_embed.data.store import EventStore, build_store
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.decoder import Decoder
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.tasks.next_event import NextEvent
from ehr_embed.training.settings import TrainerSettings
from ehr_embed.training.trainer import Trainer
from tests.helpers.small_meds import Event, write_meds

WAYS = {"SEX//M": ("A", "B", "C", "D"), "SEX//F": ("A", "D", "C", "B")}
"""The order of events depends on a static event, so pairs of neighbours do not tell it."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[EventStore, Path]:
    """40 subjects a split who go round one of two ways, an event a day; `comes_B` says whether B comes within two days."""
    splits: dict[str, list[Event]] = {}
    labels = []
    rng = np.random.default_rng(0)
    for number, split in enumerate(SPLITS):
        splits[split] = []
        for subject in range(100 * number, 100 * number + 40):
            sex = ("SEX//M", "SEX//F")[subject % 2]
            n = int(rng.integers(6, 30))
            codes = [WAYS[sex][i % 4] for i in range(n + 2)]
            splits[split] += [(subject, None, sex, None)]
            splits[split] += [(subject, float(day), code, 3.0) for day, code in enumerate(codes[:n])]
            labels.append((subject, n - 0.5, "B" in codes[n : n + 2]))
    root = write_meds(tmp_path_factory.mktemp("rounds") / "set", splits, labels={"comes_B": labels})
    return build_store(root.parent / "store", MedsSource(root=str(root)), VocabularySettings(values="continuous")), root


def random_table(store: EventStore, width: int) -> torch.Tensor:
    table = torch.randn(len(store.vocabulary), width, generator=torch.Generator().manual_seed(0))
    table[0] = 0
    return table


def train(
    store: EventStore,
    run_dir: Path,
    task: NextEvent,
    kind: Callable[..., Any] = Decoder,
    epochs: int = 40,
    rate: float = 1e-2,
):
    run_dir.mkdir(exist_ok=True)
    seed_everything(0, verbose=False)
    task.setup(store, run_dir, 16)  # most records are cut, so that windows begin anywhere
    embedding = EventEmbedding(random_table(store, 12))
    sizes = {"embedding_dim": 12, "has_values": True, **task.sizes}
    model = kind(**sizes, model_dim=32, n_heads=2, n_layers=2, dropout=0.0, max_length=32)
    settings = TrainerSettings(
        epochs=epochs, learning_rate=rate, batch_size=8, precision="32-true", schedule="cosine", warmup_steps=5
    )
    trainer = Trainer(
        settings,
        settings.launch(),
        task=task,
        run_dir=run_dir,
        config={},
        identity={"embedder": "none", "vocab_sha256": store.manifest["vocab_sha256"]},
        sizes=sizes,
        seed=0,
        log=lambda row, epoch: None,
    )
    trainer.fit(model, embedding)
    return model.eval(), embedding, trainer


@pytest.fixture(scope="module")
def pretrained(planted, tmp_path_factory):
    store, _ = planted
    return train(store, tmp_path_factory.mktemp("run"), NextEvent())
