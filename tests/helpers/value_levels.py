"""A planted dataset in which the level of a value decides the label, with a configuration for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig

from ehr_embed.sources.protocol import SPLITS
from tests.helpers.configs import composed
from tests.helpers.small_meds import Event, write_meds

LABELLED = ("task.labels=case", "task.monitor=auroc")


N_SUBJECTS = 120


def write_levels(root: Path) -> Path:
    """Subjects with a static sex and a test whose last value says the label; the earlier ones and the noise do not."""
    rng = np.random.default_rng(0)
    splits: dict[str, list[Event]] = {}
    labels, three = [], []
    for number, split in enumerate(SPLITS):
        splits[split] = []
        for i in range(N_SUBJECTS):
            subject, level = 1000 * number + i, i % 3
            events: list[Event] = [(subject, None, f"SEX//{i % 2}", None), (subject, -9000.0, "MEDS_BIRTH", None)]
            values = [*rng.normal(0, 3, 2), rng.normal(4 * level, 0.3)]
            events += [(subject, float(day), "TEST", float(value)) for day, value in enumerate(values)]
            events += [(subject, 5.0 + k, f"N{rng.integers(4)}", None) for k in range(3)]
            events += [(subject, 50.0, "TEST", float(rng.normal(0, 9)))]  # after the prediction
            splits[split] += events
            labels.append((subject, 20.0, level == 2))
            three.append((subject, 20.0, ("low", "middle", "high")[level]))
    return write_meds(root, splits, labels={"case": labels, "other": labels, "level": three})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_levels(tmp_path_factory.mktemp("levels") / "set")


def config(root: Path, run_dir: Path, *overrides: str, task: Sequence[str] = LABELLED) -> DictConfig:
    return composed(
        "data=meds", f"data.root={root}", "data.min_count=1", "embedder=hashing", "embedder.embedding_dim=16", *task,
        "trainer.n_bootstrap=0", f"run_dir={run_dir}", f"cache_dir={root.parent / 'cache'}", *overrides,
    )  # fmt: skip
