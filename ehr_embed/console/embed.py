"""`ehr-embed embed`: build a dataset's vocabulary, event store and embedding table; the same as embed.py of a checkout."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from ehr_embed.experiment.cli import CONF


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="embed")
def main(cfg: DictConfig) -> None:
    """Build what is missing and say what there is."""
    from ehr_embed.experiment.inputs import embed  # here, so that a misspelt override is refused before torch is loaded

    embed(cfg)
