"""A planted dataset of two classes, and a training of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import seed_everything

from ehr_embed.data.store import EventStore, build_store
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.encoder import Encoder
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.tasks.classification import Classification
from ehr_embed.training.settings import TrainerSettings
from ehr_embed.training.trainer import Trainer
from tests.helpers.small_meds import Event, write_meds


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[EventStore, Path]:
    """60 subjects a split whose label is whether they have the code GOOD, among noise."""
    rng = np.random.default_rng(0)
    splits: dict[str, list[Event]] = {}
    labels = []
    for number, split in enumerate(SPLITS):
        splits[split] = []
        for subject in range(100 * number, 100 * number + 60):
            case = subject % 3 == 0
            codes = [f"N{i}" for i in rng.integers(0, 5, rng.integers(2, 12))] + (["GOOD"] if case else ["BAD"])
            splits[split] += [(subject, float(day), code, None) for day, code in enumerate(rng.permutation(codes))]
            labels.append((subject, 99.0, case))
    root = write_meds(tmp_path_factory.mktemp("planted") / "set", splits, labels={"case": labels})
    return build_store(root.parent / "store", MedsSource(root=str(root)), VocabularySettings()), root / "labels"


def train(planted, run_dir: Path, *, seed: int = 0, dropout: float = 0.1, **settings):
    """Train a small encoder on random event vectors; returns the facts, the rows logged, and the trainer."""
    store, labels_dir = planted
    run_dir.mkdir(exist_ok=True)
    seed_everything(seed, verbose=False)
    task = Classification(monitor="auroc")
    task.setup(store, labels_dir, 16)
    table = torch.randn(len(store.vocabulary), 12, generator=torch.Generator().manual_seed(0))
    sizes = {"model_dim": 16, "n_heads": 2, "n_layers": 1, "max_length": 16}
    model = Encoder(embedding_dim=12, num_classes=2, dropout=dropout, **sizes)
    rows: list[dict[str, float]] = []
    chosen = {"epochs": 6, "learning_rate": 1e-2, "warmup_steps": 2, "precision": "32-true", "batch_size": 8}
    trainer_settings = TrainerSettings(**{**chosen, **settings})
    trainer = Trainer(
        trainer_settings,
        trainer_settings.launch(),
        task=task,
        run_dir=run_dir,
        config={"seed": seed},
        identity={"embedder": "none", "vocab_sha256": "none"},
        sizes={"embedding_dim": 12, "has_values": False, **task.sizes},
        seed=seed,
        log=lambda row, epoch: rows.append(row),
    )
    embedding = EventEmbedding(table)
    facts = trainer.fit(model, embedding)
    return facts, rows, trainer, model, embedding


MEASURED = ("_s", "_mib", "mfu")


def without_times(rows):
    return [{name: x for name, x in row.items() if not name.endswith(MEASURED)} for row in rows]
