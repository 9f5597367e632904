"""From a composed configuration to a finished run: the only module below the entry points that knows Hydra."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning_fabric import seed_everything
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table

from ehr_embed import __version__
from ehr_embed.checkpoints import initialise
from ehr_embed.errors import UserError
from ehr_embed.event_embedding import EventEmbedding
from ehr_embed.exports.protocol import Export
from ehr_embed.files import atomic_path, write_json
from ehr_embed.instantiate import instantiate, instantiate_embedder, trainable_of
from ehr_embed.models.protocol import build_model, check_vectors
from ehr_embed.plots import plot_calibration, plot_loss, plot_precision_recall, plot_roc
from ehr_embed.prepare import Prepared, prepare, report
from ehr_embed.runs import TABLE, VOCABULARY
from ehr_embed.search.trial import NoTrial, TrialHandle, current_trial
from ehr_embed.sources.demo import bayes_auroc
from ehr_embed.sources.protocol import Source
from ehr_embed.table import link_table
from ehr_embed.tasks.labels import available_labels
from ehr_embed.tasks.protocol import Task, check_causality
from ehr_embed.trainer import Trainer
from ehr_embed.vocabulary import VocabularySettings

log = logging.getLogger(__name__)
EVALUATED = ("tuning", "held_out")
PACKAGES = (
    "torch",
    "lightning-fabric",
    "sentence-transformers",
    "transformers",
    "polars",
    "numpy",
    "hydra-core",
    "wandb",
)


def prepare_from(cfg: DictConfig, *, overwrite: bool = False) -> tuple[Source, Prepared]:
    """Open the source of a configuration, and its store and table, building what is missing."""
    build = _builder(cfg)
    source: Source = build(cfg.data.source)
    settings = VocabularySettings(
        values=cfg.data["values"], n_bins=cfg.data.n_bins, min_count=cfg.data.min_count, lookups=tuple(cfg.data.lookups)
    )
    embedder = instantiate_embedder(cfg.embedder, trusted=tuple(cfg.trusted_packages))
    try:
        prepared = prepare(
            source,
            settings,
            embedder,
            cache_dir=Path(cfg.cache_dir),
            min_text_coverage=cfg.data.min_text_coverage,
            overwrite=overwrite,
        )
    finally:
        embedder.close()
    return source, prepared


def embed(cfg: DictConfig) -> None:
    """Prepare the dataset of a configuration, say what there is, and export it where the configuration asks for it."""
    build = _builder(cfg)
    export: Export | None = build(cfg.export) if cfg.get("export") else None
    if export is not None:
        export.check()  # before the embedding, which may take hours
    source, prepared = prepare_from(cfg, overwrite=cfg.overwrite)
    report(prepared.store, cfg.data.min_text_coverage)
    n_tokens, width = prepared.table.shape
    print(
        f"store {prepared.store.folder}\ntable {prepared.table_path} ({n_tokens} x {width}, digest {prepared.table_digest})"
    )
    if export is not None:
        export.write(prepared, build(cfg.task), source.labels_dir)


def convert(cfg: DictConfig) -> None:
    """Open the source of a configuration, which imports its corpus as MEDS, and say what is there."""
    source: Source = _builder(cfg)(cfg.data.source)
    labels = ", ".join(available_labels(source.labels_dir))
    print(f"MEDS dataset {source.labels_dir.parent} ({len(source.shards)} shards, label sets: {labels})")


def run(cfg: DictConfig) -> float:
    """Train and evaluate one configuration; everything it leaves is in the run directory.

    With `pretrain` set, a run of its options comes first, in `RUN_DIR/pretrain`, and this one starts from it.

    Returns:
        The monitored metric on tuning with the best checkpoint: the objective of a search.
    """
    run_dir, init_from = run_directory(cfg), cfg.init_from
    if cfg.pretrain is not None:
        run_stage(pretraining(cfg), run_dir / "pretrain", init_from=None, trial=NoTrial())
        init_from = run_dir / "pretrain"
    return run_stage(cfg, run_dir, init_from=init_from, trial=current_trial(cfg.trusted_packages))


def pretraining(cfg: DictConfig) -> DictConfig:
    """The configuration of the stage before fine-tuning: `cfg` with the groups that `pretrain` names in place of its own."""
    stage = cfg.copy()
    with open_dict(stage):
        for group in cfg.pretrain:
            stage[group] = cfg.pretrain[group]
        stage.pretrain, stage.init_from = None, None
        for key in ("name", "run_id"):
            if stage.tracker.get(key):  # the two stages are two runs
                stage.tracker[key] = f"{stage.tracker[key]}-pretrain"
    return stage


def run_stage(cfg: DictConfig, run_dir: Path, *, init_from: str | Path | None, trial: TrialHandle) -> float:
    """Train and evaluate in `run_dir`, starting from the checkpoint `init_from` if there is one; `trial` is told each epoch."""
    began = time.perf_counter()
    seed_everything(cfg.seed, verbose=False)
    build = _builder(cfg)
    task: Task = build(cfg.task)
    if init_from is None and not task.is_trained:
        raise UserError(
            "this task evaluates a trained model and there is none. Type: init_from=RUN_DIR or a checkpoint"
        )
    source, prepared = prepare_from(cfg)
    task.setup(prepared.store, source.labels_dir, cfg.model.max_length)
    sizes = {"embedding_dim": prepared.table.shape[1], "has_values": prepared.store.manifest["has_values"]} | task.sizes
    model = build_model(cfg.model, prepared.store.vocabulary, trusted=tuple(cfg.trusted_packages), sizes=sizes)
    check_causality(task, model)
    check_vectors(model, trainable_of(cfg.embedder))
    embedding = EventEmbedding(prepared.table, trainable_of(cfg.embedder))
    settings = build(cfg.trainer)
    config = resolved(cfg, run_dir)
    if init_from is not None:
        initialise(model, embedding, init_from, config=config, identity=prepared.identity, whole=not task.is_trained)

    run_dir.mkdir(parents=True, exist_ok=True)
    with atomic_path(run_dir / "config.yaml") as path:
        path.write_text(CONFIG_HEADER.format(run_dir=run_dir.resolve()) + OmegaConf.to_yaml(config), encoding="utf-8")
    write_json(run_dir / "environment.json", environment())
    prepared.store.vocabulary.save(run_dir / VOCABULARY)
    link_table(prepared.table_path, run_dir / VOCABULARY / TABLE)
    tracker = build(
        cfg.tracker,
        run_dir=run_dir,
        config=config,
        tags=group_choices(),
        table_digest=prepared.table_digest,
        table_path=prepared.table_path,
    )

    def log_epoch(row: dict[str, float], epoch: int) -> None:
        tracker.log(row, step=epoch)
        _print_epoch(row, task.monitor)
        trial.report(row[f"tuning/{task.monitor}"], step=epoch)

    with tracker:
        trainer = Trainer(
            settings,
            task=task,
            run_dir=run_dir,
            config=config,
            identity=prepared.identity,
            sizes=sizes,
            seed=cfg.seed,
            log=log_epoch,
        )
        facts = trainer.fit(model, embedding) if task.is_trained else trainer.facts(model, embedding)
        outputs = {split: trainer.predict(model, embedding, split) for split in EVALUATED}
        task.fit_thresholds(outputs["tuning"])
        history = facts.pop("history")
        metrics: dict[str, Any] = {
            split: task.evaluate(split, outputs[split], n_bootstrap=settings.n_bootstrap)
            for split in reversed(EVALUATED)
        }
        metrics["train"] = facts | {"embedding_seconds": prepared.embedding_seconds}
        metrics["train"]["total_seconds"] = time.perf_counter() - began
        if "auroc" in metrics["held_out"] and (bayes := _bayes(source)):
            metrics["bayes_auroc"] = bayes
        write_json(run_dir / "metrics.json", metrics)
        for split in EVALUATED:
            task.write_predictions(run_dir / "predictions" / f"{split}.parquet", split, outputs[split])
        plots = write_plots(run_dir / "plots", history, task.curves(outputs))
        objective = float(metrics["tuning"][task.monitor]["value"])
        tracker.summarise(summary_of(metrics))
        tracker.add_plots(plots)
    print_metrics(metrics, run_dir)
    return objective


CONFIG_HEADER = """# The resolved configuration of one run. To run it again:
#
#   python train.py --config-path {run_dir} --config-name config run_dir=DIR
"""


def resolved(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    """The configuration as plain values, with what a repetition needs of Hydra's own part."""
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    defaults = ["_self_", {"override hydra/job_logging": "stdout"}]
    hydra = {"run": {"dir": "."}, "output_subdir": None}
    return {"defaults": defaults, **config, "run_dir": str(run_dir), "hydra": hydra}


def run_directory(cfg: DictConfig) -> Path:
    """`run_dir`, or in a multirun the job's own folder."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return Path(HydraConfig.get().runtime.output_dir)
    return Path(cfg.run_dir)


def group_choices() -> list[str]:
    """`group=option` for every config group chosen, as tags; empty outside a Hydra application."""
    if not HydraConfig.initialized():
        return []
    choices = HydraConfig.get().runtime.choices
    return [
        f"{group}={choice}" for group, choice in sorted(choices.items()) if choice and not group.startswith("hydra/")
    ]


def environment() -> dict[str, Any]:
    """Versions and hardware."""
    return {
        "ehr_embed": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def summary_of(metrics: dict[str, Any]) -> dict[str, float]:
    """Flat point values: `best/<split>/<metric>`, those of the best checkpoint, and `train/<fact>`.

    >>> summary_of({"tuning": {"auroc": {"value": 0.8, "low": 0.7, "high": 0.9}, "n": 10}, "train": {"epochs": 3}})
    {'best/tuning/auroc': 0.8, 'train/epochs': 3}
    """
    best = {
        f"best/{split}/{name}": entry["value"]
        for split in EVALUATED
        for name, entry in metrics.get(split, {}).items()
        if isinstance(entry, dict) and "value" in entry
    }
    return best | {f"train/{name}": value for name, value in metrics["train"].items()}


def write_plots(folder: Path, history: list[dict[str, float]], curves: dict[str, Any]) -> list[Path]:
    """Loss where something was trained; ROC, precision-recall and calibration for binary labels."""
    folder.mkdir(parents=True, exist_ok=True)
    named: dict[str, tuple[Callable[[Path, Any], None], Any]] = {
        "loss": (plot_loss, history),
        "roc": (plot_roc, curves),
        "precision_recall": (plot_precision_recall, curves),
        "calibration": (plot_calibration, curves),
    }
    paths = []
    for name, (plot, data) in named.items():
        if data:
            plot(folder / f"{name}.png", data)
            paths.append(folder / f"{name}.png")
    return paths


def print_metrics(metrics: dict[str, Any], run_dir: Path) -> None:
    """The table a run ends with."""
    table = Table(title=f"held-out and tuning metrics with 95 % intervals, {run_dir}", title_justify="left")
    table.add_column("metric")
    for split in reversed(EVALUATED):
        table.add_column(f"{split} (n={metrics[split]['n']})", justify="right")
    names = [name for name, entry in metrics["held_out"].items() if isinstance(entry, dict) and "value" in entry]
    for name in names:
        table.add_row(name, *(_cell(metrics[split][name]) for split in reversed(EVALUATED)))
    if "prevalence" in metrics["held_out"]:
        table.add_row("prevalence", *(f"{metrics[split]['prevalence']:.3f}" for split in reversed(EVALUATED)))
    for name in metrics["held_out"].get("baselines", {}):
        for metric in ("perplexity", "top1_accuracy"):
            cells = (f"{metrics[split]['baselines'][name][metric]:.3f}" for split in reversed(EVALUATED))
            table.add_row(f"{metric}, {name}", *cells)
    if bayes := metrics.get("bayes_auroc"):
        table.add_row("best possible auroc", *(f"{bayes[split]:.3f}" for split in reversed(EVALUATED)))
    console = Console()
    console.print(table)
    train = metrics["train"]
    trained = ""
    if "epochs" in train:
        trained = f"best epoch {train['best_epoch']} of {train['epochs']}, {train['events_per_s']:,.0f} events/s, "
    console.print(
        f"{train['n_parameters']:,} parameters, {trained}{train['precision']}, {train['total_seconds']:.0f} s in all",
        highlight=False,
    )


def _cell(entry: dict[str, float | None]) -> str:
    interval = "" if entry["low"] is None else f" [{entry['low']:.3f}, {entry['high']:.3f}]"
    return f"{entry['value']:.3f}{interval}"


def _print_epoch(row: dict[str, float], monitor: str) -> None:
    log.info(
        "epoch %d: train loss %.4f, tuning loss %.4f, tuning %s %.4f, %s events/s",
        row["epoch"],
        row["train/loss"],
        row["tuning/loss"],
        monitor,
        row[f"tuning/{monitor}"],
        f"{row['train/events_per_s']:,.0f}",
    )


def _bayes(source: Source) -> dict[str, float] | None:
    """The demo's best possible AUROC of each evaluated split; None where the true risk is not known."""
    known = {split: bayes_auroc(source.labels_dir.parent, split) for split in EVALUATED}
    return {split: value for split, value in known.items() if value is not None} or None


def _builder(cfg: DictConfig) -> Callable[..., Any]:
    """`instantiate` with the configuration's trusted packages."""
    trusted = tuple(cfg.trusted_packages)
    return lambda node, **sizes: instantiate(node, trusted=trusted, **sizes)
