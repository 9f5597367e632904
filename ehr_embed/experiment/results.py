"""Write what a person reads of a finished stage: predictions, plots, the model card and the report."""

from __future__ import annotations

from functools import partial
from typing import Any

from ehr_embed.experiment.parts import Fitted, Inputs, Plan
from ehr_embed.experiment.provenance import group_choices
from ehr_embed.experiment.recalibration import Recalibrated
from ehr_embed.reports.example_records import examples_of
from ehr_embed.reports.html_report import report_of, save
from ehr_embed.reports.model_card import write_model_card
from ehr_embed.reports.run_report import summary_of, write_plots
from ehr_embed.run_folder.layout import PLOTS, REPORT, predictions_file
from ehr_embed.sources.protocol import EVALUATED
from ehr_embed.tasks.protocol import DrawsPlots
from ehr_embed.trackers.protocol import KeepsReport, Tracker


def write_results(
    plan: Plan, inputs: Inputs, tracker: Tracker, fitted: Fitted, metrics: dict[str, Any], calibrated: Recalibrated
) -> None:
    """Write plots, the model card and the report, and give the tracker its summary."""
    task, run_dir, store = plan.task, plan.run_dir, inputs.prepared.store
    evaluated = {split: fitted.outputs[split] for split in EVALUATED}
    curves = task.curves(evaluated)
    raw = {} if calibrated.raw is None else task.curves({split: calibrated.raw[split] for split in EVALUATED})
    plots = write_plots(run_dir / PLOTS, fitted.history, curves, before=raw, chosen=fitted.facts.get("best_epoch"))
    if isinstance(task, DrawsPlots):
        for name, draw in task.plots(evaluated).items():
            draw(run_dir / PLOTS / f"{name}.png")
            plots.append(run_dir / PLOTS / f"{name}.png")
    write_model_card(
        run_dir,
        config=plan.config,
        metrics=metrics,
        store=store,
        samples=task.samples,
        curves=curves,
        audited=inputs.audited,
        n_bootstrap=plan.settings.n_bootstrap,
    )
    if plan.cfg.get("report", True):  # configurations of earlier versions do not have this key
        choices = group_choices(plan.cfg)
        made = partial(report_of, run_dir, config=plan.config, metrics=metrics, choices=choices)
        save(made(), run_dir / REPORT)
        if isinstance(tracker, KeepsReport):
            tracker.add_report(partial(made, has_environment=False))
    tracker.summarise(summary_of(metrics))
    tracker.add_plots(plots)
    tracker.add_examples(lambda: examples_of(task, store, fitted.outputs["held_out"]))


def write_predictions(plan: Plan, fitted: Fitted) -> None:
    """Write the predictions of the splits that were predicted for."""
    for split in fitted.outputs:
        plan.task.write_predictions(predictions_file(plan.run_dir, split), split, fitted.outputs[split])
