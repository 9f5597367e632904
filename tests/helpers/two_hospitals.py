"""Two small hospitals whose codes, units and habits differ, and the overrides of runs on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from ehr_embed.sources.protocol import SPLITS
from tests.helpers.configs import composed
from tests.helpers.small_meds import Event, write_meds

HOME = {
    "HR": "Heart rate (beats per minute)",
    "NA": "Sodium in serum (mEq/L)",
    "GLU": "Glucose in serum (mg/dL)",
    "FEVER": "Fever",
    "WARD": "Ward: surgery",
}
AWAY = {
    "v//1": "Vital signs > HR",
    "l//2": "Labs: Sodium [mmol/L], hourly",
    "l//3": "Labs: Glucose [mmol/L], hourly",
    "d//4": "Diagnosis: fever",
    "w//5": "Care plan: bed rails raised",
    "w//6": "Care plan: call light within reach",
}


def write_hospital(root: Path, codes: dict[str, str], *, heart_unit: float, noise: int, seed: int, first: int) -> Path:
    """A fast heart means the label; sodium, glucose and fever mean nothing; `noise` events of care codes fill the record."""
    rng = np.random.default_rng(seed)
    heart, sodium, glucose, fever, *care = codes
    splits: dict[str, list[Event]] = {}
    labels = []
    for n, split in enumerate(SPLITS):
        splits[split] = []
        for subject in range(first + 1000 * n, first + 1000 * n + 90):
            is_case = bool(rng.random() < 0.5)
            for step in range(4):
                at = float(step)
                beats = rng.normal(120 if is_case else 80, 12)
                splits[split].append((subject, at, heart, float(beats * heart_unit)))
                splits[split].append((subject, at, sodium, float(rng.normal(139, 4))))
                splits[split].append((subject, at, glucose, float(rng.normal(7, 2))))
            splits[split].append((subject, 4.0, fever, None))
            splits[split] += [(subject, 4.0, str(rng.choice(care)), None) for _ in range(noise)]
            labels.append((subject, 9.0, is_case))
    rows = [(code, text, None) for code, text in codes.items()]
    return write_meds(root, splits, codes=rows, labels={"case": labels})


MODELS = {
    "gbm": ["model=gbm", "model.min_leaf_samples=5"],
    "code_tab": [
        "model=code_tab", "model.model_dim=16", "model.hidden_dim=16", "model.n_gates=4", "model.n_members=2",
        "model.member_weights=text", "model.feeds_absent=false", "model.code_dropout=0.2", "model.text_noise=0.1",
    ],
    "encoder": ["model=encoder_small", "model.model_dim=32", "model.n_layers=1", "model.n_heads=2", "model.max_length=32"],
    "code_encoder": ["model=code_encoder", "model.model_dim=32", "model.n_layers=1", "model.n_heads=2"],
}  # fmt: skip
TRAINER = (
    "trainer.epochs=8", "trainer.batch_size=16", "trainer.learning_rate=5e-3", "trainer.warmup_steps=2", "trainer.n_bootstrap=0",
    "trainer.precision=32-true", "trainer.threads=1", "audit=off",
)  # fmt: skip


def config(folder: Path, hospital: str, kind: str, run_dir: str, *overrides: str) -> DictConfig:
    return composed(
        "data=meds", f"data.root={folder / hospital}", "data.values=continuous", "data.min_count=1", *MODELS[kind], *TRAINER[1:],
        f"run_dir={folder / run_dir}", f"cache_dir={folder / 'cache'}", *overrides,
    )  # fmt: skip
