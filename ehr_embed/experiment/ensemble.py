"""The stages of an ensemble: a run for each seed of each member, and at last one that blends them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from ehr_embed.comparison.paired_bootstrap import METRICS, replicates_needed
from ehr_embed.config.check import check_config
from ehr_embed.config.instantiate import builder, check_stored
from ehr_embed.config.keys import RunKeys
from ehr_embed.core.errors import UserError
from ehr_embed.core.threads import AUTO
from ehr_embed.embedders.protocol import trainable_of
from ehr_embed.evaluation.predictions import read_predictions
from ehr_embed.models.ensemble import Ensemble
from ehr_embed.run_folder.checkpoints import read_checkpoint
from ehr_embed.run_folder.layout import MEMBERS, predictions_file
from ehr_embed.training.blend import refuse_task

log = logging.getLogger(__name__)
TARGET = f"{Ensemble.__module__}.{Ensemble.__qualname__}"
OWN, SHARED = ("model", "trainer"), ("data", "embedder", "task")
"""Groups that a member may have of its own, and those that it has from the ensemble."""


def is_ensemble(cfg: DictConfig) -> bool:
    """Return whether a configuration asks for an ensemble; those of earlier versions have no such key."""
    return any(OmegaConf.select(cfg, f"ensemble.{key}") for key in ("members", "runs"))


def written_out(cfg: DictConfig) -> DictConfig:
    """Return a configuration in which every member has its model and trainer, and the model is that of all members.

    Keys that a member's trainer lacks are those of the run's. A run stores this configuration, and it can be run again: a member
    takes nothing from the model of the ensemble.

    Raises:
        UserError: the ensemble would start with a pretraining, its token vectors would be learned, or its task has no classes; or a
            member has no model in a configuration whose model is an ensemble already.
    """
    if cfg.pretrain is not None:
        raise UserError(
            "ensemble and pretrain: expected one of them. Pretrain in a run of its own, from which all members may start. "
            "Type: pretrain=null init_from=RUN_DIR/pretrain"
        )
    refuse_task(builder(cfg)(cfg.task))
    if (trainable := trainable_of(cfg.embedder)) != "frozen":
        raise UserError(
            f"embedder.trainable={trainable}: each member would learn token vectors of its own, and an ensemble has one table. "
            "Type: embedder.trainable=frozen"
        )
    cfg = cfg.copy()
    with open_dict(cfg):
        for group in SHARED:  # now, since ${seed} would mean another seed in each member
            cfg[group] = OmegaConf.to_container(cfg[group], resolve=True)
        takers = [name for name, member in cfg.ensemble.members.items() if member.get("model") is None]
        typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
        chosen = next((text for text in typed if text.startswith("model=")), None)
        if takers and chosen:
            log.warning("%s is the model of the members %s, which have none of their own", chosen, ", ".join(takers))
        for name, member in cfg.ensemble.members.items():
            for group in OWN:
                if member.get(group) is None:
                    member[group] = cfg[group].copy()
            _complete(member.trainer, cfg.trainer)
            if member.model.get("_target_") == TARGET:
                raise UserError(
                    f"ensemble.members.{name} has no model of its own. Type: model@ensemble.members.{name}.model=NAME"
                )
    configs = [member.model for member in _runs_of(cfg).values()]
    configs += [
        check_stored(read_checkpoint(run)[1]["config"], "model", tuple(cfg.trusted_packages))
        for run in cfg.ensemble.runs
    ]
    lengths = {int(config.max_length) for config in configs}
    if len(lengths) > 1:
        raise UserError(
            f"the members of the ensemble read {', '.join(map(str, sorted(lengths)))} events of a record at most (max_length): "
            "expected one number, since all are given the same records. Type: model.max_length=N, and "
            "ensemble.members.NAME.model.max_length=N for members with a model of their own"
        )
    plain = [OmegaConf.to_container(config, resolve=True) for config in configs]
    with open_dict(cfg):
        cfg.model = {"_target_": TARGET, "max_length": lengths.pop(), "members": plain}
    return cfg


def _complete(own: DictConfig, trainer: DictConfig) -> None:
    """Give a member's trainer the keys of the run's that it lacks, and those of an optimizer or schedule that is the same."""
    for key, value in trainer.items():
        if key not in own:
            own[key] = value
        elif OmegaConf.is_dict(own[key]) and "_target_" not in own[key] and OmegaConf.is_dict(value):
            own[key] = OmegaConf.merge(value, own[key])


def member_runs(cfg: DictConfig, run_dir: Path) -> dict[Path, DictConfig]:
    """Return the folder and the configuration of every run that is to be trained for an ensemble.

    Args:
        cfg: what `written_out` returned.
        run_dir: the ensemble's folder.
    """
    found = {}
    for name, member in _runs_of(cfg).items():
        stage = cfg.copy()
        with open_dict(stage):
            stage.ensemble = {"members": {}, "runs": [], "weights": "tuning"}  # how they are blended changes no member
            stage.model, stage.trainer, stage.seed = member.model, member.trainer, member.seed
            stage.audit = "off"  # the ensemble's own stage looks at the same samples
            # The user's settings of the machine and of the report hold for all members.
            if OmegaConf.select(stage, "trainer.threads", default=AUTO) == AUTO:
                stage.trainer.threads = OmegaConf.select(cfg, "trainer.threads", default=AUTO)
            stage.trainer.n_bootstrap = cfg.trainer.n_bootstrap
            for key in ("name", "run_id"):
                if stage.tracker.get(key):  # a tracker keeps each member as a run
                    stage.tracker[key] = f"{stage.tracker[key]}-{name}"
        check_config(stage, RunKeys)
        builder(stage)(stage.trainer)  # refuses its settings before any member is trained
        found[run_dir / MEMBERS / name] = stage
    return found


def _runs_of(cfg: DictConfig) -> dict[str, DictConfig]:
    """Return the members of an ensemble, one per seed, by name: the seeds of two ensembles with other seeds differ."""
    found = {}
    for name, member in cfg.ensemble.members.items():
        n_seeds = member.get("seeds", 1)
        for seed in range(cfg.seed * n_seeds, (cfg.seed + 1) * n_seeds):
            found[f"{name}-{seed}"] = OmegaConf.create({**member, "seed": seed})
    return found


def blended(cfg: DictConfig, run_dir: Path) -> list[Path]:
    """Return the folders of the runs that an ensemble is made of, in the order of its model's members."""
    return [run_dir / MEMBERS / name for name in _runs_of(cfg)] + [Path(run).expanduser() for run in cfg.ensemble.runs]


def judged(run_dir: Path, runs: Sequence[Path], weights: Sequence[float], *, n_bootstrap: int) -> list[dict[str, Any]]:
    """Compare an ensemble with each of its members on held_out, by paired bootstrap tests on the same draws of subjects.

    Args:
        run_dir: the ensemble's folder, with its predictions.
        runs: the members' folders.
        weights: of the members.
        n_bootstrap: 0 = differences without intervals; else as many draws as the number of members needs.

    Returns:
        For each member `run`, `weight` and, per metric of `METRICS`, how far the ensemble lies above it: `difference`, `low`,
        `high`, `p`, and `p_holm`, adjusted over the members; None where it is undefined in every draw.
    """
    names = [f"{number}: {run.name}" for number, run in enumerate(runs)]
    files = {"": run_dir, **dict(zip(names, runs, strict=True))}
    predictions = {name: read_predictions(predictions_file(folder, "held_out")) for name, folder in files.items()}
    # The import is here because it loads the libraries of plots, which would delay the first epoch of every run.
    from ehr_embed.comparison.compare import paired_tests

    tests = paired_tests(predictions, n_bootstrap=replicates_needed(len(runs)) if n_bootstrap else 0)
    found = []
    for name, run, weight in zip(names, runs, weights, strict=True):
        of_metric: dict[str, Any] = {}
        for metric in METRICS:
            row = tests[(tests["metric"] == metric) & (tests["other"] == name)].iloc[0]
            numbers = {key: float(row[key]) for key in ("difference", "low", "high", "p", "p_holm")}
            of_metric[metric] = {key: x if x == x else None for key, x in numbers.items()}
        is_own = run.parent == run_dir / MEMBERS
        found.append(
            {"run": f"{MEMBERS}/{run.name}" if is_own else run.name, "weight": float(weight), "held_out": of_metric}
        )
    return found
