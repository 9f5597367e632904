"""Calibrate the outputs of a stage: fit on tuning alone, keep the calibration with the run, and say what it changed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ehr_embed.calibration.calibrator import fit_calibrator
from ehr_embed.calibration.none import NoCalibration
from ehr_embed.calibration.protocol import Calibration
from ehr_embed.config.instantiate import builder
from ehr_embed.core.errors import UserError
from ehr_embed.experiment.parts import Plan
from ehr_embed.run_folder.calibration import write_calibration
from ehr_embed.tasks.protocol import GivesProbabilities, Outputs, Task, WeighsSamples

log = logging.getLogger(__name__)
SHOWN = ("auroc", "auprc", "brier", "ece", "loss")
"""Metrics that are shown before and after."""


@dataclass(frozen=True)
class Recalibrated:
    """The outputs of a stage after its calibration.

    Attributes:
        outputs: of each split; the model's own where nothing was fitted.
        raw: the model's own where a calibration was fitted; None = there is none.
        facts: for metrics.json; None = the run asks for no calibration.
    """

    outputs: dict[str, Outputs]
    raw: dict[str, Outputs] | None = None
    facts: dict[str, Any] | None = None


def calibration_of(cfg: DictConfig) -> Calibration:
    """Return the calibration of a configuration; those of earlier versions have none."""
    node = OmegaConf.select(cfg, "calibration")
    method: Calibration = NoCalibration() if node is None else builder(cfg)(node)
    return method


def check_calibration(cfg: DictConfig, task: Task) -> None:
    """Refuse a calibration of a task that gives no probabilities of classes.

    Raises:
        UserError: names the task.
    """
    method = calibration_of(cfg)
    if isinstance(method, NoCalibration) or (isinstance(task, GivesProbabilities) and task.needs_causal is None):
        return
    raise UserError(
        f"calibration: {type(method).__name__} maps probabilities of classes, and {type(task).__name__} does not train a model to "
        "give any. Type: calibration=none, or task=classification or task=multilabel"
    )


def recalibrate(
    plan: Plan, outputs: dict[str, Outputs], *, evaluate: Callable[[Task, dict[str, Outputs]], dict[str, Any]]
) -> Recalibrated:
    """Fit the calibration of a stage on tuning, apply it to every split, and write it into the run's folder.

    Args:
        plan: the stage.
        outputs: the model's own, of each split.
        evaluate: returns the metrics of the evaluated splits, here of the model's own outputs, to be shown beside the calibrated.

    Returns:
        The outputs as they are to be evaluated and written.
    """
    method, task = plan.calibration, plan.task
    if isinstance(method, NoCalibration):
        return Recalibrated(outputs)
    samples, is_exclusive = task.samples["tuning"], isinstance(task, WeighsSamples)
    fit = fit_calibrator(
        method,
        outputs["tuning"],
        samples.labels,
        samples.subject_ids,
        task.class_names,
        is_exclusive=is_exclusive,
    )
    facts = {"method": type(method).__name__, "n": fit.n, "subjects": fit.subjects}
    if fit.calibrator is None:
        return Recalibrated(outputs, facts=facts | {"too_few": fit.too_few})
    calibrator = fit.calibrator
    write_calibration(plan.run_dir, plan.config["calibration"], task.class_names, calibrator.parameters)
    told = method.describe(calibrator.parameters)
    log.info("calibration: %s, fitted on %d samples of tuning", told, fit.n)
    return Recalibrated(
        {split: calibrator(values) for split, values in outputs.items()},
        outputs,
        facts | {"fitted": told, "before": _before(evaluate(task, outputs))},
    )


def _before(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics that are shown of each evaluated split."""
    return {split: {name: own[name] for name in SHOWN if name in own} for split, own in metrics.items()}
