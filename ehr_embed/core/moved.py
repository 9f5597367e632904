"""Map the dotted names of earlier versions to those of today, for the configurations that runs and checkpoints keep.

Whoever moves or renames a class or a module adds a line here, so that runs trained before still open. Both sides of the
tables are below `ehr_embed.`, so that no stored name can lead out of the package. Whether a stored configuration may
build an object is decided after its name was mapped.
"""

from __future__ import annotations

from typing import Any

PACKAGE = "ehr_embed"
LEFT_STATE = "._of_matches."
"""In the names of states that were kept beside a table's matches; the matches know their codes themselves."""
DEFINITIONS = {
    "compare.compare": "comparison.compare.compare",
    "compare.paired_tests": "comparison.compare.paired_tests",
    "experiment.convert": "experiment.inputs.convert",
    "experiment.embed": "experiment.inputs.embed",
    "experiment.evaluate": "experiment.stage.evaluate",
    "experiment.open_source": "experiment.inputs.open_source",
    "experiment.prepare_from": "experiment.inputs.prepare_from",
    "experiment.run_stage": "experiment.stage.run_stage",
    "explain.Explainer": "inference.explainer.Explainer",
    "explain.event_table": "inference.explainer.event_table",
    "generate.TRAJECTORY_SCHEMA": "inference.trajectories.TRAJECTORY_SCHEMA",
    "generate.as_events": "inference.trajectories.as_events",
    "models.body.LENGTH_MULTIPLE": "data.batches.LENGTH_MULTIPLE",
    "models.protocol.build_model": "config.build_model.build_model",
    "optimizer.body_of": "models.protocol.body_of",
    "paired.Predictions": "evaluation.predictions.Predictions",
    "paired.read_predictions": "evaluation.predictions.read_predictions",
    "runs.LOOKUPS": "run_folder.layout.LOOKUPS",
    "runs.TABLE": "run_folder.layout.TABLE",
    "runs.VOCABULARY": "run_folder.layout.VOCABULARY",
    "checkpoints.BEST": "run_folder.layout.BEST",
    "finished.FINISHED": "run_folder.layout.FINISHED",
    "search.report.report_study": "search.study_report.report_study",
    "search.report.trial_row": "search.study_report.trial_row",
    "tabulate.markdown": "comparison.tabulate.markdown",
    "tabulate.statistic": "comparison.tabulate.statistic",
    "tabulate.table_frame": "comparison.tabulate.table_frame",
    "tabulate.tabulate": "comparison.tabulate.tabulate",
    "tabulate.write_table": "comparison.tabulate.write_table",
    "trainer.TrainerSettings": "training.settings.TrainerSettings",
    "training_state.Continuation": "run_folder.checkpoints.Continuation",
    "training_state.LATEST": "run_folder.layout.LATEST",
    "training_state.write_latest": "run_folder.checkpoints.write_latest",
}
"""Single definitions, old name -> new, both below `ehr_embed.`; these lines take precedence over `MODULES`."""
MODULES = {
    "core.vanishing": "core.lost_data",
    "attribution": "inference.attribution",
    "audit": "evaluation.leakage_audit",
    "batches": "data.batches",
    "bootstrap": "evaluation.bootstrap",
    "check_config": "config.check",
    "checkpoints": "run_folder.checkpoints",
    "cli": "experiment.cli",
    "code_statistics": "data.code_statistics",
    "embedders.cache": "embedding.vector_cache",
    "errors": "core.errors",
    "event_embedding": "embedding.event_embedding",
    "event_set": "data.event_set",
    "event_tensors": "data.device_events",
    "examples": "reports.example_records",
    "explain_plots": "inference.attribution_plots",
    "features": "evaluation.code_screening",
    "files": "core.files",
    "finished": "run_folder.finish",
    "fit_at_once": "training.fit_table",
    "generation": "models.sampling",
    "instantiate": "config.instantiate",
    "launchers": "core.launchers",
    "manifest": "core.manifest",
    "memory": "training.memory",
    "metrics": "evaluation.metrics",
    "model_card": "reports.model_card",
    "optimizer": "training.optimizer",
    "paired": "comparison.paired_bootstrap",
    "plots": "evaluation.plots",
    "precision": "training.precision",
    "predictions": "evaluation.predictions",
    "predictor": "inference.predictor",
    "prepare": "embedding.prepare",
    "pretrained": "core.pretrained_weights",
    "processes": "training.processes",
    "profiling": "training.profiling",
    "resume": "run_folder.resume",
    "run_report": "reports.run_report",
    "runs": "inference.trained_run",
    "samples": "data.samples",
    "search.outcome": "core.outcome",
    "comparison.outcome": "core.outcome",
    "search.plots": "comparison.study_plots",
    "search.report": "comparison.report",
    "search.results": "comparison.results",
    "search.runs": "search.trial_jobs",
    "sharding": "training.sharding",
    "speed": "training.throughput",
    "stopping": "core.stopping",
    "store": "data.store",
    "subgroups": "evaluation.subgroups",
    "table": "embedding.table",
    "tasks.directions": "evaluation.metric",
    "tasks.labels": "data.labels",
    "texts": "sources.code_texts",
    "trainer": "training.trainer",
    "trainer_settings": "training.settings",
    "training_state": "training.state",
    "transfer": "reports.transfer_metrics",
    "unpickle": "core.plain_pickle",
    "value_bins": "data.value_bins",
    "vocabulary": "data.vocabulary",
}
"""Modules, old name -> new, both below `ehr_embed.`."""


TRAINER_SETTINGS, ADAMW = f"{PACKAGE}.training.settings.TrainerSettings", "torch.optim.AdamW"
SCHEDULES = {name: f"{PACKAGE}.training.schedules.{name.title()}" for name in ("plateau", "cosine", "constant")}
"""The schedules that the trainer took by name, before it took any class."""


def new_name(dotted: str) -> str:
    """Return today's dotted name for one of an earlier version; return any other name unchanged.

    >>> new_name("ehr_embed.trainer.TrainerSettings"), new_name("ehr_embed.store.EventStore")
    ('ehr_embed.training.settings.TrainerSettings', 'ehr_embed.data.store.EventStore')
    >>> new_name("ehr_embed.models.encoder.Encoder"), new_name("my.store.Store")
    ('ehr_embed.models.encoder.Encoder', 'my.store.Store')
    """
    package, _, rest = dotted.partition(".")
    if package != PACKAGE:
        return dotted
    if rest in DEFINITIONS:
        return f"{PACKAGE}.{DEFINITIONS[rest]}"
    parts = rest.split(".")
    for n in range(len(parts), 0, -1):
        if (module := ".".join(parts[:n])) in MODULES:
            return ".".join([PACKAGE, MODULES[module], *parts[n:]])
    return dotted


def renamed(config: Any) -> Any:
    """Return a configuration of plain values in which every `_target_`, at any depth, has its present name, and every key of the
    trainer its present place.

    >>> renamed({"trainer": {"_target_": "ehr_embed.trainer.TrainerSettings", "epochs": 3}, "seed": 0})
    {'trainer': {'_target_': 'ehr_embed.training.settings.TrainerSettings', 'epochs': 3}, 'seed': 0}
    """
    if isinstance(config, dict):
        found = {
            key: new_name(value) if key == "_target_" and isinstance(value, str) else renamed(value)
            for key, value in config.items()
        }
        return trainer_of_today(found) if found.get("_target_") == TRAINER_SETTINGS else found
    return [renamed(item) for item in config] if isinstance(config, list) else config


def trainer_of_today(trainer: dict[str, Any]) -> dict[str, Any]:
    """Return the trainer's keys with a schedule and an optimizer in place of the keys that stood for them.

    `schedule` was a name, `scheduler_patience` is now an option of the schedule and `betas` one of the optimizer. The older keys
    stay, as null, so that they can still be typed. A value that cannot be meant is left for the trainer to refuse.

    >>> found = trainer_of_today({"schedule": "plateau", "scheduler_patience": 5, "betas": [0.9, 0.99]})
    >>> found["schedule"], found["optimizer"]["betas"], found["betas"]
    ({'_target_': 'ehr_embed.training.schedules.Plateau', 'patience': 5}, [0.9, 0.99], None)
    """
    found = dict(trainer)
    if isinstance(name := found.get("schedule"), str) and name in SCHEDULES:
        found["schedule"] = {"_target_": SCHEDULES[name]}
    schedule, optimizer = found.get("schedule"), found.get("optimizer", {"_target_": ADAMW})
    if found.get("scheduler_patience") is not None:
        if isinstance(schedule, dict) and schedule.get("_target_") == SCHEDULES["plateau"]:
            found["schedule"] = schedule | {"patience": found["scheduler_patience"]}
        if isinstance(schedule, dict):
            found["scheduler_patience"] = None
    if found.get("betas") is not None and isinstance(optimizer, dict):
        found |= {"optimizer": optimizer | {"betas": found["betas"]}, "betas": None}
    return found


def current_state(state: Any) -> Any:
    """Return a model's state dict without the entries that models of earlier versions had beside those of today.

    >>> current_state({"features._extra_state": {}, "features._of_matches._extra_state": {}})
    {'features._extra_state': {}}
    """
    if not isinstance(state, dict) or not any(LEFT_STATE in str(name) for name in state):
        return state
    return {name: entry for name, entry in state.items() if LEFT_STATE not in str(name)}
