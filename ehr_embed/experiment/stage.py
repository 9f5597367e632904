"""One stage of a run: find what is finished, open the inputs, build, fit, conclude.

`run_stage` is the story; each of its sentences is a function below, and plain dataclasses carry what one hands to the next:
`Plan` -> `Inputs` -> `Built` -> `Fitted`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning_fabric import seed_everything
from omegaconf import DictConfig
from torch import nn

from ehr_embed.config.build_model import build_model, of_constructor
from ehr_embed.config.instantiate import builder
from ehr_embed.core.collector import collect_as_usual
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import write_json
from ehr_embed.core.rereadable import Rereadable
from ehr_embed.data.pool import Pool
from ehr_embed.embedders.protocol import trainable_of
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.embedding.pooling import pooled_table
from ehr_embed.embedding.prepare import Prepared
from ehr_embed.evaluation.leakage_audit import audit
from ehr_embed.experiment.best_possible import best_possible
from ehr_embed.experiment.ensemble import blended, judged
from ehr_embed.experiment.inputs import alignment_settings, prepare_from, variants_of, vector_of_words
from ehr_embed.experiment.parts import Built, EpochLog, Fitted, Inputs, Plan, give_sizes
from ehr_embed.experiment.provenance import digest_of_start, group_choices, made_from, resolved, write_inputs
from ehr_embed.experiment.recalibration import calibration_of, recalibrate
from ehr_embed.experiment.shared_codes import align_inputs, align_model, pool_inputs, pool_model
from ehr_embed.models.ensemble import Ensemble
from ehr_embed.models.protocol import AlignsCodes, FitsAtOnce, adapt, check_variants, check_vectors
from ehr_embed.reports.dataset_metrics import by_dataset
from ehr_embed.reports.transfer_metrics import kept, over_all_splits
from ehr_embed.run_folder.checkpoints import initialise
from ehr_embed.run_folder.finish import finish, read_metrics
from ehr_embed.run_folder.layout import ALIGNMENT, AUDIT
from ehr_embed.run_folder.origin import is_of_other_data
from ehr_embed.run_folder.resume import FoundRun, claimed, find_run
from ehr_embed.search.trial import TrialHandle
from ehr_embed.sources.protocol import EVALUATED, SPLITS
from ehr_embed.tasks.protocol import HasBaselines, Outputs, ReadsWords, TakesSizes, Task, check_causality
from ehr_embed.tasks.set_up import set_up
from ehr_embed.trackers.protocol import Tracker
from ehr_embed.training.batch_tokens import with_batch_tokens
from ehr_embed.training.blend import blend
from ehr_embed.training.fit_table import fit_at_once, inputs_of
from ehr_embed.training.settings import TrainerSettings
from ehr_embed.training.teacher import cross_fitted, teacher_model
from ehr_embed.training.threads import use_threads_of_run
from ehr_embed.training.trainer import Trainer

log = logging.getLogger(__name__)


def run_stage(cfg: DictConfig, run_dir: Path, *, init_from: str | Path | None, trial: TrialHandle) -> float:
    """Train and evaluate one configuration in `run_dir`.

    Args:
        cfg: the composed configuration.
        run_dir: the folder in which the stage leaves everything.
        init_from: a run or checkpoint that the weights start from; None = the model's own start.
        trial: is told the monitored metric of each epoch.

    Returns:
        The monitored metric on tuning with the best checkpoint.
    """
    collect_as_usual()
    plan = make_plan(cfg, run_dir, init_from=init_from, trial=trial)
    found = plan.processes.on_first(lambda: find_run(run_dir, plan.config, how=cfg.resume))
    if found.is_finished:
        return tell_finished(plan)
    inputs = open_inputs(plan, found)
    built = build(plan, inputs, found)
    with opened_folder(plan, inputs, built.tracker):
        fitted = fit(plan, built)
        return plan.processes.on_first(lambda: conclude(plan, inputs, built, fitted))


def make_plan(cfg: DictConfig, run_dir: Path, *, init_from: str | Path | None, trial: TrialHandle) -> Plan:
    """Seed the random generators, and build what needs no data: settings, processes and task.

    Raises:
        UserError: nothing would be trained, and there is no trained model to evaluate.
    """
    began = time.perf_counter()
    construct = builder(cfg)
    settings: TrainerSettings = construct(cfg.trainer)
    processes = settings.launch()  # with the precision of this stage
    seed_everything(cfg.seed, verbose=False)
    plan = Plan(
        cfg=cfg,
        config=resolved(cfg, run_dir),
        run_dir=run_dir,
        init_from=init_from,
        trial=trial,
        settings=settings,
        processes=processes,
        task=construct(cfg.task),
        alignment=alignment_settings(cfg),
        calibration=calibration_of(cfg),
        began=began,
    )
    if init_from is None and not plan.is_trained:
        raise UserError(
            "this run trains nothing (because of its task or trainer), so it needs a trained model, and none is given. "
            "Type: init_from=RUN_DIR or a checkpoint"
        )
    if init_from is None and plan.settings.pull:
        raise UserError(
            f"trainer.pull={plan.settings.pull}: weights are drawn back to those that they start from, and this run starts from "
            "random ones. Type: init_from=RUN_DIR, or trainer.pull=0"
        )
    return plan


def tell_finished(plan: Plan) -> float:
    """Print the metrics of a run that an earlier start finished, and return the monitored one."""
    from ehr_embed.reports.run_report import print_metrics  # here, as in `conclude`

    metrics = read_metrics(plan.run_dir)
    if plan.processes.is_first:
        own = ", ".join(plan.cfg.trusted_packages)
        note = f" (the settings are the same; whether the code of {own} has changed is not compared)" if own else ""
        log.info("%s is finished already%s. To train again: resume=overwrite, or another run_dir", plan.run_dir, note)
        print_metrics(metrics, plan.run_dir)
    return monitored(metrics, plan.task)


def open_inputs(plan: Plan, found: FoundRun) -> Inputs:
    """Open the source, the store and the table, align their codes with those of the run that the weights start from, build the
    task's samples, and audit them for leaks."""
    # Threads come first, since the embedding takes a CPU too.
    use_threads_of_run(plan.settings, plan.processes, found.threads)
    source, prepared = plan.processes.first(lambda: prepare_from(plan.cfg))
    prepared, aligned = plan.processes.first(lambda: align_inputs(plan, prepared))
    pooled = None if aligned is not None else plan.processes.first(lambda: pool_inputs(plan, prepared))
    if pooled is not None:
        prepared = replace(prepared, table=pooled_table(pooled, prepared.store.vocabulary, prepared.table))
    task, store = plan.task, prepared.store
    set_up(task, store, source.labels_dir, plan.cfg.model.max_length)
    audited = plan.processes.on_first(lambda: audit(store, task.samples, task.class_names, mode=plan.cfg.audit))
    return Inputs(source=source, prepared=prepared, aligned=aligned, pooled=pooled, audited=audited)


def build(plan: Plan, inputs: Inputs, found: FoundRun) -> Built:
    """Build the model with its first weights, the tracker and the trainer, and read the checkpoint to go on from.

    Raises:
        UserError: the model does not suit the task or the embedder, or a checkpoint does not suit this run.
    """
    cfg, task, prepared = plan.cfg, plan.task, inputs.prepared
    trainable = trainable_of(cfg.embedder)
    # A model that is aligned keeps the codes that it knows.
    vocabulary = prepared.store.vocabulary if inputs.aligned is None else inputs.aligned[0].vocabulary
    if isinstance(task, TakesSizes):
        give_sizes(task, plan.init_from, prepared)
    if isinstance(task, ReadsWords) and task.words is not None:
        words = task.words
        task.take_words(plan.processes.first(lambda: vector_of_words(cfg, words)), prepared.table)
    sizes = {"embedding_dim": prepared.table.shape[1], "has_values": prepared.store.manifest["has_values"]} | task.sizes
    model = build_model(cfg.model, vocabulary, trusted=tuple(cfg.trusted_packages), sizes=sizes)
    pool_model(model, inputs)
    check_causality(task, model)
    check_vectors(model, trainable)
    variants = variants_of(cfg, prepared, plan.alignment) if plan.is_trained else None
    if variants is not None:
        check_variants(model, variants.share)
    embedding = EventEmbedding(prepared.table, trainable, variants)
    if found.checkpoint is None:
        give_first_weights(plan, inputs, model, embedding)
    if inputs.aligned is not None:
        align_model(model, prepared.store.vocabulary, inputs.aligned[1])
    teacher = teacher_model(
        plan.settings.teacher,
        prepared.store.vocabulary,
        of_constructor(sizes),
        windows_hours=cfg.model.get("windows_hours"),
        n_trees=plan.settings.teacher_trees,
    )
    pool_model(teacher, inputs)
    start = found.load(prepared.identity, task.samples)
    settings = with_batch_tokens(
        plan.settings,
        plan.processes,
        task=task,
        model=model,
        embedding=embedding,
        seed=cfg.seed,
        kept=found.batch_tokens,
    )
    # A number in place of `auto` is kept, so that the run can be repeated elsewhere.
    if plan.settings.batch_tokens != settings.batch_tokens:
        plan.config["trainer"]["batch_tokens"] = settings.batch_tokens
    tracker: Tracker = builder(cfg)(
        cfg.tracker,
        run_dir=plan.run_dir,
        config=plan.config,
        tags=group_choices(cfg),
        table_digest=prepared.table_digest,
        table_path=prepared.table_path,
    )
    trainer = Trainer(
        settings,
        plan.processes,
        task=task,
        run_dir=plan.run_dir,
        config=plan.config,
        identity=prepared.identity,
        sizes=sizes,
        seed=cfg.seed,
        # A run that goes on keeps what it began with, whatever lies there now; checkpoints of earlier versions do not say it.
        init_from_sha256=digest_of_start(plan.init_from) if start is None else start.checkpoint.get("init_from_sha256"),
        log=EpochLog(tracker=tracker, trial=plan.trial, monitor=task.monitor, is_first=plan.processes.is_first),
    )
    if inputs.aligned is not None:  # so that whoever opens a checkpoint reads codes as this run does
        trainer.about["alignment"] = {code: list(match) for code, match in inputs.aligned[1].matches.items()}
        trainer.about["twins"] = dict(inputs.aligned[1].twins)
    if inputs.pooled is not None:
        trainer.about |= {
            "alignment": {c: list(match) for c, match in inputs.pooled.matches.items()},
            "is_pooled": True,
        }
    if cfg.data.get("pool_weights") == "datasets" and (pool := Pool.of(prepared.store.manifest)) is not None:
        trainer.batches.weigh = pool.weights
    origins = made_from(
        prepared, init_from_sha256=trainer.about["init_from_sha256"], samples_digest=trainer.about["samples_digest"]
    )
    return Built(
        model=model,
        embedding=embedding,
        trainer=trainer,
        tracker=tracker,
        teacher=teacher,
        start=start,
        made_from=origins,
        is_aligned=inputs.aligned is not None,
        predicted=predicted_splits(plan, prepared),
    )


def predicted_splits(plan: Plan, prepared: Prepared) -> tuple[str, ...]:
    """Return the evaluated splits, and train too where a model of other data meets its labels for the first time."""
    meets_labels = plan.task.is_trained and not plan.is_trained and plan.init_from is not None
    is_new = meets_labels and is_of_other_data(str(plan.init_from), prepared.store.manifest["source"])
    return SPLITS if is_new else EVALUATED


def give_first_weights(plan: Plan, inputs: Inputs, model: nn.Module, embedding: EventEmbedding) -> None:
    """Fit the model to the vectors of the vocabulary, and load what `init_from` names: the body, or for a model that is only
    evaluated all of it. An aligned dataset's vectors are the run's already."""
    vocabulary, identity = inputs.prepared.store.vocabulary, inputs.prepared.identity
    if inputs.aligned is not None:
        origin = inputs.aligned[0]
        vocabulary, identity = origin.vocabulary, identity | {"vocab_sha256": origin.identity["vocab_sha256"]}
        embedding = EventEmbedding(origin.texts, origin.trainable)
    adapt(model, embedding.table, vocabulary)
    if plan.init_from is not None:
        initialise(
            model,
            embedding,
            plan.init_from,
            config=plan.config,
            identity=identity,
            vocabulary=vocabulary,
            class_names=None if plan.is_trained else plan.task.class_names,
            trained_classes=plan.task.class_names,
        )


@contextmanager
def opened_folder(plan: Plan, inputs: Inputs, tracker: Tracker) -> Iterator[None]:
    """Claim the run's folder and keep the tracker open while inside; what the run starts from is written first.

    Only the first process does so; the others wait for it, and raise what it raises.
    """
    with ExitStack() as stack:
        plan.processes.on_first(lambda: _enter_folder(stack, plan, inputs, tracker))
        yield


def _enter_folder(stack: ExitStack, plan: Plan, inputs: Inputs, tracker: Tracker) -> None:
    stack.enter_context(claimed(plan.run_dir, is_new=plan.cfg.resume == "overwrite"))
    stack.enter_context(tracker)
    alignment = inputs.pooled if inputs.aligned is None else inputs.aligned[1]
    write_inputs(plan.run_dir, plan.config, inputs.prepared, is_aligned=alignment is not None)
    if alignment is not None:
        alignment.write(plan.run_dir / ALIGNMENT)
    if inputs.audited is not None:
        write_json(plan.run_dir / AUDIT, inputs.audited)


def fit(plan: Plan, built: Built) -> Fitted:
    """Train the model where there is something to train, and predict the evaluated splits with the best weights."""
    model, embedding, trainer = built.model, built.embedding, built.trainer
    if not plan.is_trained:
        if built.is_aligned and isinstance(model, AlignsCodes):  # ranks of numbers need no labels
            embedding.to(trainer.fabric.device)
            model.to(trainer.fabric.device)
            model.adapt_to_records(Rereadable(lambda: inputs_of(trainer, embedding, "train")))
        facts = trainer.facts(model, embedding)
    elif isinstance(model, FitsAtOnce):
        facts = fit_at_once(trainer, model, embedding)
    elif isinstance(model, Ensemble):
        runs = blended(plan.cfg, plan.run_dir)
        facts = blend(trainer, model, embedding, runs, how=plan.cfg.ensemble.weights)
    else:
        if built.teacher is not None:
            trainer.teacher = cross_fitted(trainer, built.teacher, embedding, share=plan.settings.teacher_share)
        facts = trainer.fit(model, embedding, built.start)
    history = facts.pop("history")
    outputs = {split: trainer.predict(model, embedding, split) for split in built.predicted}
    return Fitted(facts=facts, history=history, outputs=outputs)


def conclude(plan: Plan, inputs: Inputs, built: Built, fitted: Fitted) -> float:
    """Calibrate, measure, write the results and at last metrics.json, print the table, and return the monitored metric on tuning.

    Only the first process concludes.
    """
    # The imports are here because they load the libraries of plots, which would delay the first epoch.
    from ehr_embed.experiment.results import write_predictions, write_results
    from ehr_embed.reports.run_report import print_metrics

    calibrated = recalibrate(plan, fitted.outputs, evaluate=partial(evaluate, n_bootstrap=plan.settings.n_bootstrap))
    fitted = replace(fitted, outputs=calibrated.outputs)
    metrics = measure(plan, inputs, built, fitted)
    if calibrated.facts is not None:
        metrics["calibration"] = calibrated.facts
    write_predictions(plan, fitted)
    if isinstance(built.model, Ensemble) and plan.is_trained:
        runs, n_bootstrap = blended(plan.cfg, plan.run_dir), plan.settings.n_bootstrap
        metrics["members"] = judged(plan.run_dir, runs, built.model.weights.tolist(), n_bootstrap=n_bootstrap)
    write_results(plan, inputs, built.tracker, fitted, metrics, calibrated)
    finish(plan.run_dir, metrics, built.made_from)
    print_metrics(metrics, plan.run_dir)
    return monitored(metrics, plan.task)


def measure(plan: Plan, inputs: Inputs, built: Built, fitted: Fitted) -> dict[str, Any]:
    """Return what metrics.json holds: the metrics of each evaluated split, facts of the training, and what to compare with."""
    task = plan.task
    metrics = evaluate(task, fitted.outputs, n_bootstrap=plan.settings.n_bootstrap)
    metrics["monitor"] = {"name": task.monitor, "is_higher_better": task.is_higher_better}
    earlier_seconds = built.start.seconds if built.start else 0
    metrics["train"] = fitted.facts | {
        "embedding_seconds": inputs.prepared.embedding_seconds,
        "total_seconds": time.perf_counter() - plan.began + earlier_seconds,
    }
    if not plan.is_trained and plan.init_from is not None:
        share = kept(plan.init_from, metrics["held_out"], task.metrics)
        metrics |= {"transfer": share} if share else {}
    if inputs.aligned is not None:
        metrics["alignment"] = inputs.aligned[1].facts
    if "train" in fitted.outputs:
        found = over_all_splits(task, fitted.outputs, n_bootstrap=plan.settings.n_bootstrap)
        metrics |= {"all_splits": found} if found else {}
    if (pool := Pool.of(inputs.prepared.store.manifest)) is not None:
        evaluated = {split: fitted.outputs[split] for split in EVALUATED}
        metrics["datasets"] = by_dataset(task, evaluated, pool, n_bootstrap=plan.settings.n_bootstrap)
    if inputs.pooled is not None:
        metrics["pooled"] = inputs.pooled.facts
    return metrics | best_possible(metrics["held_out"], inputs.source, task)


def evaluate(task: Task, outputs: dict[str, Outputs], *, n_bootstrap: int) -> dict[str, Any]:
    """Return the metrics of the evaluated splits, with thresholds that are chosen on tuning.

    Args:
        task: after `setup`.
        outputs: the task's outputs (n, n_outputs) of each evaluated split.
        n_bootstrap: replicates of the intervals.
    """
    task.fit_thresholds(outputs["tuning"])
    metrics = {split: task.evaluate(split, outputs[split], n_bootstrap=n_bootstrap) for split in reversed(EVALUATED)}
    if isinstance(task, HasBaselines):
        for split, found in metrics.items():
            found["baselines"] = task.baselines(split)
    return metrics


def monitored(metrics: dict[str, Any], task: Task) -> float:
    """Return the monitored metric on tuning from what metrics.json holds."""
    return float(metrics["tuning"][task.monitor]["value"])
