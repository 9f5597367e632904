"""Runs that are stopped, and what they leave."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from ehr_embed.core.files import read_json
from tests.helpers.configs import composed
from tests.helpers.small_meds import Event, write_meds

SMALL = ("embedder=hashing", "model.n_layers=1", "model.model_dim=16", "model.dropout=0.2", "trainer.precision=32-true")


SHORT = ("trainer.epochs=3", "trainer.batch_size=16", "trainer.warmup_steps=3", "trainer.n_bootstrap=20")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """120 subjects a split with a planted signal."""
    rng, labels = np.random.default_rng(0), []
    splits: dict[str, list[Event]] = {}
    for number, split in enumerate(("train", "tuning", "held_out")):
        splits[split] = []
        for subject in range(1000 * number, 1000 * number + 120):
            codes = [f"N{i}" for i in rng.integers(0, 9, rng.integers(4, 20))] + [("BAD", "GOOD")[subject % 3 == 0]]
            splits[split] += [(subject, float(day), code, None) for day, code in enumerate(rng.permutation(codes))]
            labels.append((subject, 99.0, subject % 3 == 0))
    return write_meds(tmp_path_factory.mktemp("resume") / "set", splits, labels={"good": labels})


def settings(dataset: Path, run_dir: Path, *overrides: str) -> Any:
    place = (f"data.root={dataset}", f"cache_dir={dataset.parent / 'cache'}", f"run_dir={run_dir}")
    kind = [o for o in overrides if o.startswith(("task=", "model="))]
    others = [o for o in overrides if o not in kind]
    return composed("data=meds", *place, "model=encoder_small", *kind, *SMALL, *SHORT, *others)


def after_steps(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Do something when a run has taken that many optimizer steps."""
    count, step = 0, torch.optim.AdamW.step

    def counted(self, *args, **kwargs):
        nonlocal count
        count += 1
        result = step(self, *args, **kwargs)
        if count == number:
            action()
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def what_is_left(run_dir: Path) -> dict[str, Any]:
    """Everything a run leaves that is neither a time nor the memory it took."""
    metrics = read_json(run_dir / "metrics.json")
    measured = ("_s", "_mib", "mfu")
    metrics["train"] = {k: v for k, v in metrics["train"].items() if "second" not in k and not k.endswith(measured)}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    best = torch.load(run_dir / "best_checkpoint.pt", weights_only=True)
    states = {**best["model_state_dict"], **best.get("embedding_state_dict", {})}
    weights = {name: x for name, x in states.items() if isinstance(x, torch.Tensor)}
    return {
        "metrics": metrics,
        "rows": [{k: v for k, v in row.items() if not k.endswith(measured)} for row in rows],
        "predictions": {p.name: pl.read_parquet(p).to_dicts() for p in (run_dir / "predictions").iterdir()},
        "best": (best["epoch"], {name: x.numpy().tobytes() for name, x in weights.items()}),
    }


def latest_step(run_dir: Path) -> int:
    path = run_dir / "latest_checkpoint.pt"
    return torch.load(path, weights_only=True)["progress"]["step"] if path.exists() else 0
