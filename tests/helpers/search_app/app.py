"""A Hydra application with a toy objective, run in processes of its own by tests/test_search*.py."""

from __future__ import annotations

import json
import os
import time

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ehr_embed.config.instantiate import instantiate
from ehr_embed.core.launchers import n_launched
from ehr_embed.experiment.cli import run_main
from ehr_embed.search.trial import current_trial


@hydra.main(version_base="1.3", config_path="conf", config_name="app")
def main(cfg: DictConfig) -> float | tuple[float, float]:
    if cfg.started:
        record = {"pid": os.getpid(), "folder": HydraConfig.get().runtime.output_dir, "x": cfg.x, "text": cfg.text}
        record |= {"threads": os.environ.get("OMP_NUM_THREADS"), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
        record["n_launched"] = n_launched()
        with open(cfg.started, "a") as file:
            file.write(json.dumps(record) + "\n")
    value = (cfg.x - (cfg.kind.name == "shifted")) ** 2 + cfg.y**2 + 0.01 * cfg.seed
    trial = current_trial(instantiate)
    for epoch in range(1, cfg.epochs + 1):
        time.sleep(cfg.seconds)
        trial.report(value + 1 / epoch, step=epoch)
    if not cfg.epochs:
        time.sleep(cfg.seconds)
    if cfg.raise_above is not None and cfg.x > cfg.raise_above:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
    if cfg.die_above is not None and cfg.x > cfg.die_above:
        os.kill(os.getpid(), 9)
    if cfg.nan_above is not None and cfg.x > cfg.nan_above:
        return float("nan")
    return value


if __name__ == "__main__":
    run_main(main, "app")
