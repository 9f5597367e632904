"""From a composed configuration to a finished run."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import configure_log
from hydra.types import RunMode
from lightning_fabric import seed_everything
from omegaconf import DictConfig, OmegaConf, open_dict

from ehr_embed import __version__
from ehr_embed.config.check import check_config, checks_config
from ehr_embed.config.instantiate import build_model, instantiate, instantiate_embedder, trainable_of
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path, file_sha256, link_file, write_json
from ehr_embed.core.launchers import n_launched
from ehr_embed.core.moved import renamed
from ehr_embed.core.stopping import stop_requests
from ehr_embed.core.threads import AUTO, use_threads
from ehr_embed.data.labels import available_labels
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.embedding.prepare import Prepared, prepare, report
from ehr_embed.evaluation.leakage_audit import audit
from ehr_embed.exports.protocol import Export
from ehr_embed.inference.trained_run import device_named
from ehr_embed.models.protocol import FitsAtOnce, adapt, check_vectors
from ehr_embed.reports.example_records import examples_of
from ehr_embed.reports.model_card import write_model_card
from ehr_embed.reports.run_report import EVALUATED, print_metrics, summary_of, write_plots
from ehr_embed.reports.transfer_metrics import kept
from ehr_embed.run_folder.checkpoints import checkpoint_path, initialise
from ehr_embed.run_folder.finish import finish, read_metrics
from ehr_embed.run_folder.layout import AUDIT, CONFIG, ENVIRONMENT, LOOKUPS, PLOTS, TABLE, VOCABULARY, predictions_file
from ehr_embed.run_folder.resume import claimed, find_run
from ehr_embed.search.trial import NoTrial, TrialHandle, current_trial
from ehr_embed.sources.code_texts import read_lookups
from ehr_embed.sources.demo import bayes_auroc
from ehr_embed.sources.hidden_codes import HiddenCodes
from ehr_embed.sources.protocol import Source
from ehr_embed.sources.renamed import RenamedSource
from ehr_embed.tasks.protocol import HasBaselines, Outputs, Task, check_causality
from ehr_embed.tasks.set_up import set_up
from ehr_embed.trackers.protocol import Tracker
from ehr_embed.training.fit_table import fit_at_once
from ehr_embed.training.processes import run_ranks
from ehr_embed.training.teacher import teacher_model
from ehr_embed.training.threads import use_threads_of_run
from ehr_embed.training.trainer import Trainer, TrainerSettings

log = logging.getLogger(__name__)
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
    source = open_source(cfg)
    settings = VocabularySettings(
        values=cfg.data["values"],
        n_bins=cfg.data.n_bins,
        min_count=cfg.data.min_count,
        lookups=tuple(cfg.data.lookups),
        describe_unseen=cfg.data.describe_unseen,
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
            integrity=cfg.get("integrity", "auto"),  # configurations of earlier runs have none
        )
    finally:
        embedder.close()
    return source, prepared


def open_source(cfg: DictConfig) -> Source:
    """The source of a configuration, with codes hidden from train and renamed where it says so."""
    source: Source = _builder(cfg)(cfg.data.source)
    if cfg.data.hidden_codes:
        source = HiddenCodes(source, share=cfg.data.hidden_codes, seed=cfg.data.hidden_seed)
    if cfg.data.renamed is not None:
        source = RenamedSource(source, table=cfg.data.renamed, missing=cfg.data.renamed_missing)
    return source


@stop_requests(is_deferred=False)
@checks_config
def embed(cfg: DictConfig) -> None:
    """Prepare the dataset of a configuration, say what there is, and export it where the configuration asks for it."""
    build = _builder(cfg)
    export: Export | None = build(cfg.export) if cfg.get("export") else None
    if export is not None:
        export.check()  # before the embedding, which may take hours
    threads = OmegaConf.select(cfg, "trainer.threads", default=AUTO)  # which configurations of earlier runs do not have
    use_threads(threads, key="trainer.threads", device=device_named("auto").type)
    source, prepared = prepare_from(cfg, overwrite=cfg.overwrite)
    report(prepared.store, cfg.data.min_text_coverage)
    n_tokens, width = prepared.table.shape
    print(
        f"store {prepared.store.folder}\ntable {prepared.table_path} ({n_tokens} x {width}, digest {prepared.table_digest})"
    )
    if export is not None:
        export.write(prepared, build(cfg.task), source.labels_dir)


@stop_requests(is_deferred=False)
@checks_config
def convert(cfg: DictConfig) -> None:
    """Open the source of a configuration, which imports its corpus as MEDS, and say what is there."""
    source: Source = _builder(cfg)(cfg.data.source)
    labels = ", ".join(available_labels(source.labels_dir))
    print(f"MEDS dataset {source.labels_dir.parent} ({len(source.shards)} shards, label sets: {labels})")


@stop_requests(is_deferred=False)
@checks_config
def run(cfg: DictConfig) -> float:
    """Train and evaluate one configuration; everything it leaves is in the run directory.

    A run that was stopped there goes on; a finished one is left as it is. With `pretrain` set, a run of its options comes
    first, in `RUN_DIR/pretrain`, and this one starts from it.

    Returns:
        The monitored metric on tuning with the best checkpoint: the objective of a search.
    """
    settings: TrainerSettings = _builder(cfg)(cfg.trainer)
    if settings.devices > 1 and settings.nodes == 1 and n_launched() == 1:
        chosen = cfg.copy()  # before `${now:}` means something else in each of them
        chosen.run_dir = str(run_directory(cfg))
        return run_ranks(partial(_run_rank, chosen, Singleton.get_state()), settings.devices)
    processes = settings.launch()
    if not processes.is_first:
        logging.disable(logging.WARNING)  # rank 0 says it
    run_dir, init_from = processes.on_first(lambda: run_directory(cfg)), cfg.init_from
    if cfg.pretrain is not None:
        check_config(first := pretraining(cfg))
        run_stage(first, run_dir / "pretrain", init_from=None, trial=NoTrial())
        init_from = run_dir / "pretrain"
    return run_stage(cfg, run_dir, init_from=init_from, trial=current_trial(cfg.trusted_packages))


def _run_rank(cfg: DictConfig, singletons: Any) -> float:
    """`run` in a process that `run_ranks` started, with Hydra's state and log as in the one that did."""
    Singleton.set_state(singletons)
    if HydraConfig.initialized():
        hydra: Any = HydraConfig.get()
        configure_log(hydra.job_logging, hydra.verbose)
    return run(cfg)


def pretraining(cfg: DictConfig) -> DictConfig:
    """The configuration of the stage before this one: `cfg` with the groups that `pretrain` names in place of its own; of
    `data`, the keys that it names.

    Raises:
        UserError: it wants other processes; a run keeps those that it began with.
    """
    stage = cfg.copy()
    with open_dict(stage):
        for group, chosen in cfg.pretrain.items():
            stage[group] = OmegaConf.merge(cfg[group], chosen) if group == "data" else chosen
        stage.pretrain, stage.init_from = None, None
        # What the user says of the machine holds for both stages, unless `pretrain.trainer.threads` says otherwise.
        if OmegaConf.select(stage, "trainer.threads", default=AUTO) == AUTO:
            stage.trainer.threads = OmegaConf.select(cfg, "trainer.threads", default=AUTO)
        for key in ("name", "run_id"):
            if stage.tracker.get(key):  # the two stages are two runs
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


def run_stage(cfg: DictConfig, run_dir: Path, *, init_from: str | Path | None, trial: TrialHandle) -> float:
    """Train and evaluate in `run_dir`, starting from the checkpoint `init_from` if there is one; `trial` is told each epoch."""
    began = time.perf_counter()
    build = _builder(cfg)
    settings: TrainerSettings = build(cfg.trainer)
    processes = settings.launch()  # with the precision of this stage
    seed_everything(cfg.seed, verbose=False)
    task: Task = build(cfg.task)
    is_trained = task.is_trained and settings.epochs > 0
    if init_from is None and not is_trained:
        raise UserError(
            "this run evaluates a trained model (a task or trainer that trains nothing) and there is none. "
            "Type: init_from=RUN_DIR or a checkpoint"
        )
    config = resolved(cfg, run_dir)
    found = processes.on_first(lambda: find_run(run_dir, config, how=cfg.resume))
    if found.is_finished:
        done = read_metrics(run_dir)
        if processes.is_first:
            log.info("%s is finished already. To train again: resume=overwrite, or another run_dir", run_dir)
            print_metrics(done, run_dir)
        return float(done["tuning"][task.monitor]["value"])
    use_threads_of_run(settings, processes, found.threads)  # before the embedding, which takes a CPU too
    source, prepared = processes.first(lambda: prepare_from(cfg))
    set_up(task, prepared.store, source.labels_dir, cfg.model.max_length)
    audited = processes.on_first(lambda: audit(prepared.store, task.samples, task.class_names, mode=cfg.audit))
    sizes = {"embedding_dim": prepared.table.shape[1], "has_values": prepared.store.manifest["has_values"]} | task.sizes
    model = build_model(cfg.model, prepared.store.vocabulary, trusted=tuple(cfg.trusted_packages), sizes=sizes)
    check_causality(task, model)
    check_vectors(model, trainable_of(cfg.embedder))
    embedding = EventEmbedding(prepared.table, trainable_of(cfg.embedder))
    made_from = {
        "source": prepared.store.manifest["source"],
        "table_digest": prepared.table_digest,
        **prepared.identity,
    }
    if found.checkpoint is None:
        adapt(model, embedding.table, prepared.store.vocabulary)
        if init_from is not None:
            initialise(
                model,
                embedding,
                init_from,
                config=config,
                identity=prepared.identity,
                vocabulary=prepared.store.vocabulary,
                class_names=None if is_trained else task.class_names,
            )
            made_from["init_from_sha256"] = file_sha256(checkpoint_path(init_from))
    start = found.load(prepared.identity, task.samples)
    tracker: Tracker = build(
        cfg.tracker,
        run_dir=run_dir,
        config=config,
        tags=group_choices(),
        table_digest=prepared.table_digest,
        table_path=prepared.table_path,
    )

    def log_epoch(row: dict[str, float], epoch: int) -> None:
        if processes.is_first:
            tracker.log(row, step=epoch)
            _print_epoch(row, task.monitor)
        trial.report(row[f"tuning/{task.monitor}"], step=epoch)

    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(claimed(run_dir, is_new=cfg.resume == "overwrite"))
            stack.enter_context(tracker)
            write_inputs(run_dir, config, prepared)
            if audited is not None:
                write_json(run_dir / AUDIT, audited)

        processes.on_first(begin)
        trainer = Trainer(
            settings,
            processes,
            task=task,
            run_dir=run_dir,
            config=config,
            identity=prepared.identity,
            sizes=sizes,
            seed=cfg.seed,
            log=log_epoch,
            teacher_model=teacher_model(settings.teacher, prepared.store.vocabulary, sizes) if is_trained else None,
        )
        if not is_trained:
            facts = trainer.facts(model, embedding)
        elif isinstance(model, FitsAtOnce):
            facts = fit_at_once(trainer, model, embedding)
        else:
            facts = trainer.fit(model, embedding, start)
        outputs = {split: trainer.predict(model, embedding, split) for split in EVALUATED}

        def conclude() -> float:
            history = facts.pop("history")
            metrics = evaluate(task, outputs, n_bootstrap=settings.n_bootstrap)
            metrics["monitor"] = {"name": task.monitor, "is_higher_better": task.is_higher_better}
            metrics["train"] = facts | {"embedding_seconds": prepared.embedding_seconds}
            metrics["train"]["total_seconds"] = time.perf_counter() - began + (start.seconds if start else 0)
            if not is_trained and init_from is not None and (share := kept(init_from, metrics["held_out"])):
                metrics["transfer"] = share
            if "auroc" in metrics["held_out"] and (bayes := _bayes(source)):
                metrics["bayes_auroc"] = bayes
            for split in EVALUATED:
                task.write_predictions(predictions_file(run_dir, split), split, outputs[split])
            curves = task.curves(outputs)
            plots = write_plots(run_dir / PLOTS, history, curves)
            write_model_card(
                run_dir,
                config=config,
                metrics=metrics,
                store=prepared.store,
                samples=task.samples,
                curves=curves,
                audited=audited,
                n_bootstrap=settings.n_bootstrap,
            )
            tracker.summarise(summary_of(metrics))
            tracker.add_plots(plots)
            tracker.add_examples(lambda: examples_of(task, prepared.store, outputs["held_out"]))
            finish(run_dir, metrics, made_from | {"samples_digest": trainer.about["samples_digest"]})
            print_metrics(metrics, run_dir)
            return float(metrics["tuning"][task.monitor]["value"])

        return processes.on_first(conclude)


def evaluate(task: Task, outputs: dict[str, Outputs], *, n_bootstrap: int) -> dict[str, Any]:
    """Metrics of the evaluated splits, with thresholds from tuning."""
    task.fit_thresholds(outputs["tuning"])
    metrics = {split: task.evaluate(split, outputs[split], n_bootstrap=n_bootstrap) for split in reversed(EVALUATED)}
    if isinstance(task, HasBaselines):
        for split, found in metrics.items():
            found["baselines"] = task.baselines(split)
    return metrics


CONFIG_HEADER = """# The resolved configuration of one run. To run it again:
#
#   python train.py --config-path {run_dir} --config-name config run_dir=DIR
"""


def write_inputs(run_dir: Path, config: dict[str, Any], prepared: Prepared) -> None:
    """What the run starts from: configuration, versions and hardware, vocabulary and table."""
    with atomic_path(run_dir / CONFIG) as path:
        path.write_text(CONFIG_HEADER.format(run_dir=run_dir.resolve()) + OmegaConf.to_yaml(config), encoding="utf-8")
    write_json(run_dir / ENVIRONMENT, environment())
    prepared.store.vocabulary.save(run_dir / VOCABULARY)
    link_file(prepared.table_path, run_dir / VOCABULARY / TABLE)
    if paths := prepared.store.vocabulary.settings.lookups:  # a later dataset's new codes need them too
        with atomic_path(run_dir / VOCABULARY / LOOKUPS) as path:
            read_lookups(paths).write_csv(path)


def resolved(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    """The configuration as plain values, with what a repetition needs of Hydra's own part."""
    config = renamed(OmegaConf.to_container(cfg, resolve=True))
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
    """The demo's best possible AUROC of each evaluated split; None where the true risk or an AUROC is not known."""
    known = {split: bayes_auroc(source.labels_dir.parent, split) for split in EVALUATED}
    return {split: value for split, value in known.items() if value is not None} or None


def _builder(cfg: DictConfig) -> Callable[..., Any]:
    """`instantiate` with the configuration's trusted packages."""
    trusted = tuple(cfg.trusted_packages)
    return lambda node, **sizes: instantiate(node, trusted=trusted, **sizes)
