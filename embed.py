"""Prepare a dataset: vocabulary, event store and embedding table; `python embed.py --help` lists groups and keys."""

import hydra
from omegaconf import DictConfig

from ehr_embed.experiment.cli import run_main


@hydra.main(version_base="1.3", config_path="conf", config_name="embed")
def main(cfg: DictConfig) -> None:
    """Build what is missing and say what there is."""
    from ehr_embed.experiment.inputs import embed  # here, so that a misspelt override is refused before torch is loaded

    embed(cfg)


if __name__ == "__main__":
    run_main(main, "embed")
