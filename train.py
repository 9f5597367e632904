"""One training run, composed by Hydra from conf/; `python train.py --help` lists groups and keys."""

import hydra
from omegaconf import DictConfig

from ehr_embed.experiment.cli import run_main


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """Train, evaluate, and return the monitored metric on tuning: the objective of a search."""
    from ehr_embed.experiment.run import run  # here, so that a misspelt override is refused before torch is loaded

    return run(cfg)


if __name__ == "__main__":
    run_main(main, "train")
