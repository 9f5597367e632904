"""A small dataset with telling ids and texts, and a run trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ehr_embed.experiment.run import run
from tests.helpers.configs import composed
from tests.helpers.no_account import no_account  # noqa: F401 (a fixture for all)
from tests.helpers.small_meds import Event, write_meds

SUBJECTS = range(770_012_000, 770_012_090)


TEXTS = {"ZEBRA//ONE": "Quagga fever of the left hoof", "ZEBRA//TWO": "Okapi cough at night", "ZEBRA//SEX": "Equine"}


SMALL = (
    "embedder=hashing", "model=encoder_small", "model.n_layers=1", "model.model_dim=16", "trainer=short", "trainer.epochs=2",
    "trainer.n_bootstrap=5", "trainer.precision=32-true", "task.monitor=auroc", "data.min_count=1", "audit=off",
)  # fmt: skip


@pytest.fixture(scope="module")
def ward(tmp_path_factory) -> Path:
    """A dataset whose path, subjects, codes and texts are like nothing else."""
    splits: dict[str, list[Event]] = {"train": [], "tuning": [], "held_out": []}
    labels = []
    for number, subject in enumerate(SUBJECTS):
        events: list[Event] = [(subject, None, "ZEBRA//SEX", None), (subject, 0.0, "ZEBRA//ONE", None)]
        splits[("train", "tuning", "held_out")[number % 3]] += [
            *events,
            (subject, float(number % 7), "ZEBRA//TWO", None),
        ]
        labels.append((subject, 9.0, number % 2 == 0))
    folder = tmp_path_factory.mktemp("st_elsewhere_ward_7") / "hospital_export"
    folder.mkdir()
    codes = [(code, text, None) for code, text in TEXTS.items()]
    return write_meds(folder, splits, codes=codes, labels={"outcome": labels})


@pytest.fixture(scope="module")
def trained(ward, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run(
        composed("data=meds", f"data.root={ward}", *SMALL, f"cache_dir={folder / 'cache'}", f"run_dir={folder / 'run'}")
    )
    return folder / "run"


def stored(run_dir: Path, tmp_path: Path, **groups: Any) -> Path:
    """The run with other groups in the configuration of its checkpoint, as a foreign one may come."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "vocabulary").symlink_to(run_dir / "vocabulary")
    checkpoint = torch.load(run_dir / "best_checkpoint.pt", weights_only=True)
    checkpoint["config"] |= groups
    torch.save(checkpoint, folder / "best_checkpoint.pt")
    return folder
