"""Overrides of a calibrated ensemble that takes a second to train."""

from __future__ import annotations

SMALL = (
    "embedder=hashing", "embedder.embedding_dim=16", "data.n_subjects=160", "model=mean_pool", "trainer=short", "trainer.epochs=1",
    "trainer.batch_size=16", "trainer.learning_rate=1e-2", "trainer.n_bootstrap=0", "trainer.precision=32-true",
    "trainer.threads=1", "audit=off", "data.values=continuous", "+ensemble.members.pooled.seeds=2",
    "calibration=temperature", "calibration.min_per_class=2",
)  # fmt: skip
