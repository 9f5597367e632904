"""From a composed configuration to the stages of a run: one, or a pretraining and the stage that starts from it."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import configure_log
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from ehr_embed.calibration.none import NoCalibration
from ehr_embed.config.check import check_config, checks_config
from ehr_embed.config.instantiate import builder, instantiate
from ehr_embed.config.keys import RunKeys
from ehr_embed.core.errors import UserError
from ehr_embed.core.launchers import n_launched
from ehr_embed.core.stopping import stop_requests
from ehr_embed.core.threads import AUTO
from ehr_embed.experiment.ensemble import is_ensemble, member_runs, written_out
from ehr_embed.experiment.inherit import inherited
from ehr_embed.experiment.outlook import tell_outlook
from ehr_embed.experiment.preflight import preflight
from ehr_embed.experiment.stage import run_stage
from ehr_embed.run_folder.layout import FINISHED
from ehr_embed.search.trial import NoTrial, current_trial
from ehr_embed.training.processes import run_ranks
from ehr_embed.training.settings import TrainerSettings


@stop_requests(is_deferred=False)
@checks_config("RunKeys")
def run(cfg: DictConfig) -> float:
    """Train and evaluate one configuration, and leave everything in the run directory.

    A run that was stopped there goes on; a finished run is left as it is. With `pretrain` set, a stage with those options comes
    first, in `RUN_DIR/pretrain`, and the stage of `cfg` starts from its weights. With members in `ensemble`, each is a stage in
    `RUN_DIR/members`, and the last stage blends them.

    Returns:
        The monitored metric on tuning with the best checkpoint: the objective of a search. NaN with `check`, which trains nothing.
    """
    cfg = inherited(cfg)
    check_config(cfg, RunKeys)
    settings: TrainerSettings = builder(cfg)(cfg.trainer)
    if settings.devices > 1 and settings.nodes == 1 and n_launched() == 1:
        chosen = cfg.copy()
        chosen.run_dir = str(run_directory(cfg))  # now, since `${now:}` would mean another time in each process
        return run_ranks(partial(_run_rank, chosen, Singleton.get_state()), settings.devices)
    processes = settings.launch()
    if not processes.is_first:
        logging.disable(logging.WARNING)  # rank 0 says the same
    run_dir, init_from = processes.on_first(lambda: run_directory(cfg)), cfg.init_from
    members: dict[Path, DictConfig] = {}
    if is_ensemble(cfg):
        cfg = written_out(cfg)
        is_evaluated = init_from is not None and OmegaConf.select(cfg, "trainer.epochs", default=1) == 0
        members = {} if is_evaluated else member_runs(cfg, run_dir)
    stages = {run_dir: cfg, **members}
    if cfg.pretrain is not None:
        check_config(first := pretraining(cfg), RunKeys)
        stages = {run_dir / "pretrain": first, **stages}
    for folder, stage in stages.items():
        if not (folder / FINISHED).exists():
            processes.on_first(partial(preflight, stage, folder))
    if cfg.get("check"):  # configurations of earlier versions do not have this key
        for folder, stage in stages.items():
            processes.on_first(partial(tell_outlook, stage, folder))
        return math.nan
    if cfg.pretrain is not None:
        run_stage(first, run_dir / "pretrain", init_from=None, trial=NoTrial())
        init_from = run_dir / "pretrain"
    for folder, member in members.items():
        run_stage(member, folder, init_from=init_from, trial=NoTrial())
    return run_stage(cfg, run_dir, init_from=init_from, trial=current_trial(instantiate, cfg.trusted_packages))


def _run_rank(cfg: DictConfig, singletons: Any) -> float:
    """Call `run` in a process that `run_ranks` started, with the state of Hydra and the log of the process that started it."""
    Singleton.set_state(singletons)
    if HydraConfig.initialized():
        hydra: Any = HydraConfig.get()
        configure_log(hydra.job_logging, hydra.verbose)
    return run(cfg)


def run_directory(cfg: DictConfig) -> Path:
    """Return `run_dir`; of a job of a multirun, the job's own folder."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return Path(HydraConfig.get().runtime.output_dir)
    return Path(cfg.run_dir)


def pretraining(cfg: DictConfig) -> DictConfig:
    """Return the configuration of the stage before that of `cfg`: the groups that `pretrain` names replace those of `cfg`. The
    group `data` is an exception: only the keys that `pretrain.data` names are replaced.

    Raises:
        UserError: `pretrain` asks for other processes than `cfg`; both stages run in the same processes.
    """
    stage = cfg.copy()
    with open_dict(stage):
        for group, chosen in cfg.pretrain.items():
            stage[group] = OmegaConf.merge(cfg[group], chosen) if group == "data" else chosen
        stage.pretrain, stage.init_from = None, None
        if "calibration" in stage:  # of the labels' probabilities, which the first stage has none of
            stage.calibration = {"_target_": f"{NoCalibration.__module__}.{NoCalibration.__qualname__}"}
        # The user's settings of the machine hold for both stages, unless `pretrain.trainer.threads` says otherwise.
        if OmegaConf.select(stage, "trainer.threads", default=AUTO) == AUTO:
            stage.trainer.threads = OmegaConf.select(cfg, "trainer.threads", default=AUTO)
        for key in ("name", "run_id"):
            if stage.tracker.get(key):  # a tracker keeps the two stages as two runs
                stage.tracker[key] = f"{stage.tracker[key]}-pretrain"
    several = max(OmegaConf.select(cfg, f"trainer.{key}", default=1) for key in ("devices", "nodes")) > 1
    for key, default in ("devices", 1), ("nodes", 1), ("accelerator", "auto"):
        own, later = (OmegaConf.select(chosen, f"trainer.{key}", default=default) for chosen in (stage, cfg))
        if own != later and (several or key != "accelerator"):
            raise UserError(
                f"pretrain.trainer.{key}={own} and trainer.{key}={later}: both stages are trained by the same processes. "
                f"Type: pretrain.trainer.{key}={later}"
            )
    return stage
