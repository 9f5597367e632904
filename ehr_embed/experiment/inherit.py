"""Give a run that only evaluates the model, embedder and use of numbers of the evaluated run, unless the user chose others."""

from __future__ import annotations

import logging
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from ehr_embed.config.instantiate import check_stored
from ehr_embed.config.targets import check_plain
from ehr_embed.core.errors import UserError
from ehr_embed.run_folder.finish import read_config
from ehr_embed.sources.imported import MANIFEST

log = logging.getLogger(__name__)
GROUPS = ("model", "embedder")
READS = ("values", "n_bins")
"""Keys of `data` that say how numbers reach the model."""
SYNTHETIC = ("ehr_embed.sources.demo.demo_source", "ehr_embed.sources.demo_times.demo_times_source")
"""Sources that write a cohort of their own where `data.root` holds none."""
CHOOSERS = ("experiment", "pipeline", "sweeps")
"""Groups that choose models and embedders themselves."""


def inherited(cfg: DictConfig) -> DictConfig:
    """Return the configuration with the model, the embedder and the use of numbers of the run in `init_from`, if it trains nothing
    and the command line chose none of these: they must be those of that run anyway.

    A run's folder may come from elsewhere, so that its configuration is checked as when the run is opened.

    Raises:
        UserError: the stored configuration names what it must not, or a synthetic cohort would be written where data were typed.
    """
    _refuse_synthetic(cfg)
    if cfg.init_from is None or cfg.pretrain is not None or OmegaConf.select(cfg, "trainer.epochs", default=1) != 0:
        return cfg
    folder = Path(str(cfg.init_from)).expanduser()
    there = read_config(folder) if folder.is_dir() else None
    if there is None or not HydraConfig.initialized():
        return cfg
    typed = [override.lstrip("+~").split("=")[0] for override in HydraConfig.get().overrides.task]
    if any(name.split("@")[0].split("/")[-1] in CHOOSERS for name in typed):
        return cfg
    check_plain(there, f"the configuration in {folder}")
    found, taken = cfg.copy(), []
    with open_dict(found):
        for group in GROUPS:
            if not any(name == group or name.startswith(f"{group}.") for name in typed):
                found[group] = check_stored(there, group, tuple(cfg.trusted_packages))
                taken.append(f"{group} ({str(found[group]['_target_']).rpartition('.')[2]})")
        for key in READS:
            value = there.get("data", {}).get(key)
            if value is not None and f"data.{key}" not in typed:
                found.data[key] = value
                taken.append(f"data.{key} ({value})")
    if taken:
        log.info("as in %s: %s", folder, ", ".join(taken))
    return found


def _refuse_synthetic(cfg: DictConfig) -> None:
    """Refuse to start from a trained run on a folder that was typed and holds nothing: `data=demo`, the default, would fill it with
    a synthetic cohort, whose metrics would be taken for those of the folder's data.

    Raises:
        UserError: the folder was typed, the source writes a cohort of its own, and none is there yet.
    """
    if (
        cfg.init_from is None
        or not HydraConfig.initialized()
        or OmegaConf.select(cfg, "data.source._target_") not in SYNTHETIC
    ):
        return
    typed = [override.lstrip("+~").split("=")[0] for override in HydraConfig.get().overrides.task]
    if "data" in typed or "experiment" in typed:
        return
    root = Path(str(cfg.data.root)).expanduser()
    if "data.root" in typed and not (root / MANIFEST).exists() and not (root.is_dir() and any(root.iterdir())):
        raise UserError(
            f"data.root={cfg.data.root} holds no data, and data=demo, the default, would write its synthetic cohort there; the "
            f"metrics of init_from={cfg.init_from} would be those of that cohort. For a dataset of your own type: data=meds "
            f"data.root={cfg.data.root} task.labels=NAME. For the synthetic cohort leave data.root out"
        )
