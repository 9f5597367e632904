"""A dataset whose two decisive codes have the same text, and configurations that learn to tell them apart or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from ehr_embed.sources.protocol import SPLITS
from tests.helpers.configs import composed
from tests.helpers.small_meds import Event, write_meds

GOOD, BAD = "GOOD", "BAD"


KINDS = {
    "frozen": ["embedder=hashing", "embedder.embedding_dim=16"],
    "residual": ["embedder=hashing", "embedder.embedding_dim=16", "embedder.trainable=residual"],
    "full": ["embedder=hashing", "embedder.embedding_dim=16", "embedder.trainable=full"],
    "learned": ["embedder=learned", "embedder.embedding_dim=16"],
}


def write_homonyms(root: Path) -> Path:
    """50 subjects a split whose label is whether they have GOOD or BAD, two codes with one text, among noise."""
    rng = np.random.default_rng(0)
    splits: dict[str, list[Event]] = {}
    labels = []
    for number, split in enumerate(SPLITS):
        splits[split] = []
        for subject in range(100 * number, 100 * number + 50):
            case = subject % 2 == 0
            codes = [f"N{i}" for i in rng.integers(0, 5, 4)] + [GOOD if case else BAD]
            splits[split] += [(subject, float(day), code, None) for day, code in enumerate(rng.permutation(codes))]
            labels.append((subject, 99.0, case))
    codes = [(code, "Result of the test", None) for code in (GOOD, BAD)]
    return write_meds(root, splits, codes=codes, labels={"case": labels})


LABELLED = ("task.labels=case", "task.monitor=auroc")


def config(root: Path, run_dir: Path, *overrides: str, task: Sequence[str] = LABELLED) -> DictConfig:
    small = [
        "model.model_dim=16",
        "model.n_layers=1",
        "model.max_length=16",
        "trainer.n_bootstrap=0",
        "trainer.epochs=10",
    ]
    small += ["trainer.batch_size=8", "trainer.warmup_steps=2"]
    return composed(
        "data=meds", f"data.root={root}", "data.min_count=1", *task,
        "model=encoder_small", "trainer=short", "trainer.learning_rate=1e-2", "trainer.precision=32-true", *small,
        f"run_dir={run_dir}", f"cache_dir={root.parent / 'cache'}", *overrides,
    )  # fmt: skip
