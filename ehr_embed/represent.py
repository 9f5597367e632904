"""`python -m ehr_embed.represent`: write the vectors that a finished run makes of a dataset's records or events."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ehr_embed.config.check import checks_config
from ehr_embed.core.threads import use_threads
from ehr_embed.experiment.cli import CONF, run_main

log = logging.getLogger(__name__)


@checks_config("RepresentKeys")
def represent(cfg: DictConfig) -> Path:
    """Write the vectors as `cfg` (conf/represent.yaml) says.

    Returns:
        The path of the file.

    Raises:
        UserError: `Predictor` or `Representer` refuses the run, the dataset or a setting.
    """
    # Imported here, so that a misspelt override is refused before torch is loaded.
    from ehr_embed.experiment.inputs import alignment_settings
    from ehr_embed.inference.predictor import Predictor
    from ehr_embed.inference.representer import Representer
    from ehr_embed.inference.trained_run import device_named, trained_on

    device = device_named(cfg.device)
    use_threads(cfg.threads, device=device.type)
    predictor = Predictor(cfg.run, device=str(device), trusted_packages=cfg.trusted_packages, needs_classes=False)
    representer = Representer(predictor, per=cfg.per, pooling=cfg.pooling)
    root = cfg.data.root
    if root is None:
        root = str(trained_on(predictor.run, trusted=tuple(cfg.trusted_packages)).labels_dir.parent)
    path, began = Path(cfg.output).expanduser(), time.perf_counter()
    n_rows = representer.write(
        path,
        root,
        labels=cfg.task.labels,
        split=cfg.split,
        lookups=tuple(cfg.data.lookups),
        alignment=alignment_settings(cfg),
    )
    log.info("%d vectors in %.1f s", n_rows, time.perf_counter() - began)
    print(f"{n_rows} vectors in {path}")
    return path


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="represent")
def main(cfg: DictConfig) -> None:
    """Run the command line."""
    represent(cfg)


if __name__ == "__main__":
    run_main(main, "represent")
