"""`ehr-embed train`: one training run, or with `-m` or `sweeps=NAME` many; the same as train.py of a checkout."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from ehr_embed.experiment.cli import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> float:
    """Train, evaluate, and return the monitored metric on tuning: the objective of a search."""
    from ehr_embed.experiment.run import run  # here, so that a misspelt override is refused before torch is loaded

    return run(cfg)
