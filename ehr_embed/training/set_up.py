"""Set up a training run before its first epoch: the model on its devices, the optimizer, the schedules, and their states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.data.batches import Batch, EventDataset
from ehr_embed.data.bucket_sampler import BucketSampler
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.heads import EventHead
from ehr_embed.models.protocol import AdaptsToRecords, body_of
from ehr_embed.run_folder.checkpoints import Continuation
from ehr_embed.tasks.protocol import Task
from ehr_embed.tasks.set_up import dataset_of, records_of
from ehr_embed.training.anchor import Anchor
from ehr_embed.training.ema import Ema
from ehr_embed.training.optimizer import build_optimizer, parameter_groups
from ehr_embed.training.processes import Processes
from ehr_embed.training.protocol import Course, Schedule, warmup_steps_of
from ehr_embed.training.schedules import start
from ehr_embed.training.settings import TrainerSettings
from ehr_embed.training.sharding import blocks_of
from ehr_embed.training.state import TrainingState, seed_of_rank, set_rng_state
from ehr_embed.training.throughput import Speed


@dataclass
class Training:
    """The model that `Trainer.fit` trains, with its optimizer, schedules and state.

    Attributes:
        wrapped: the model as Fabric calls it.
        state: all that a step or an epoch changes, which checkpoints hold.
        parameters: of the model and of the embedding.
        speed: turns counts of events and seconds into rates.
        rng: state of the random generators that the next epoch takes over; None = they stay as they are.
    """

    wrapped: Any
    state: TrainingState
    parameters: Sequence[Tensor]
    speed: Speed
    rng: dict[str, Any] | None

    def begin(self, loader: Any, *, is_new: bool) -> Iterator[Batch]:
        """Begin to read an epoch's batches, with the random generators as the run that goes on left them.

        Args:
            loader: draws one number when its iterator is made.
            is_new: whether the epoch starts at its first batch. In the middle of an epoch that number had been drawn before the
                state was saved.
        """
        rng, self.rng = self.rng, None
        if rng is not None and is_new:
            set_rng_state(rng)
        batches = iter(loader)
        if rng is not None and not is_new:
            set_rng_state(rng)
        return batches


def set_up_training(
    model: nn.Module,
    embedding: EventEmbedding,
    run: Continuation | None,
    *,
    settings: TrainerSettings,
    processes: Processes,
    task: Task,
    seed: int,
    about: dict[str, Any],
    n_batches: int,
) -> Training:
    """Fit the model's statistics to train, place it on the devices, build its optimizer and its schedules, and take over the state
    of `run`.

    Args:
        model: on any device, with the weights to start from.
        embedding: likewise.
        run: the earlier start to continue; None = begin.
        settings: how to train.
        processes: those that train together.
        task: after `setup`.
        seed: for what each process draws by itself.
        about: further contents of every checkpoint, among them `precision`.
        n_batches: of one process in one epoch.

    Raises:
        UserError: the model has no body to freeze or no blocks to compile, or `run` does not fit the model.
    """
    fabric, precision = processes.fabric, about["precision"]
    embedding.to(fabric.device)
    freeze(settings, model, embedding)
    if settings.compile == "head":
        compile_head(model)
    elif settings.compile:
        compile_blocks(model)
    if run is None and isinstance(model, AdaptsToRecords):
        # Ranks among an aligned dataset's own numbers need no labels, and more records make them better.
        dataset = records_of(task) if about.get("alignment") is not None else dataset_of(task, "train")
        model.to(fabric.device).adapt_to_records(inputs_of_all(dataset, embedding, settings=settings))
    processes.share(model)
    # Before the optimizer: an FSDP model has new parameters.
    wrapped = processes.wrap(model, task)
    groups = parameter_groups(
        model,
        embedding,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
    )
    optimizer: Any = fabric.setup_optimizers(build_optimizer(settings.optimizer, groups))
    total_steps = settings.steps_of(n_batches) * settings.epochs_of(n_batches)
    course = Course(
        total_steps=total_steps,
        warmup_steps=warmup_steps_of(settings.warmup_steps, total_steps),
        min_learning_rate=settings.min_learning_rate,
        is_higher_better=task.is_higher_better,
    )
    assert isinstance(settings.schedule, Schedule)
    scheduler, warmup, plateau = start(settings.schedule, optimizer, course)
    # After the model is on its device, and with the parameters that the optimizer changes.
    ema = None if settings.ema is None else Ema([*model.parameters(), *embedding.parameters()], settings.ema)
    anchor = Anchor([*model.parameters(), *embedding.parameters()], settings.pull) if settings.pull else None
    state = TrainingState(
        model,
        embedding,
        optimizer,
        scheduler,
        warmup,
        plateau,
        fabric.strategy.precision,
        about,
        processes,
        ema=ema,
        anchor=anchor,
    )
    rng = None if run is None else state.restore(run)
    if rng is None and processes.rank:  # else all ranks would drop and mask the same places
        torch.manual_seed(seed_of_rank(seed, processes.rank))
    speed = Speed.of(
        model,
        n_tokens=len(embedding.table),
        device=fabric.device,
        precision=precision,
        n_processes=processes.size,
    )
    return Training(wrapped, state, [*wrapped.parameters(), *embedding.parameters()], speed, rng)


def inputs_of_all(
    dataset: EventDataset, embedding: EventEmbedding, *, settings: TrainerSettings
) -> Iterator[dict[str, Tensor]]:
    """Yield a model's inputs for all rows of a dataset, in order of length; every process gets the same."""
    for rows in BucketSampler(
        dataset.lengths, batch_size=settings.batch_size, batch_tokens=settings.most_batch_tokens, shuffle=False
    ):
        yield embedding.inputs(dataset[rows].to(embedding.table.device))


def freeze(settings: TrainerSettings, model: nn.Module, embedding: EventEmbedding) -> None:
    """Let the head alone learn if `settings.freeze` says so.

    Raises:
        UserError: the model has no body.
    """
    if settings.freeze == "body":
        body_of(model).requires_grad_(False)
        embedding.requires_grad_(False)  # the vectors that the body reads are part of what it learned


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks of a model, and what a head that predicts events scores.

    Raises:
        UserError: it has none.
    """
    if not (blocks := blocks_of(model)):
        raise UserError(
            f"trainer.compile=true: {type(model).__name__} has no blocks to compile. Type: trainer.compile=false"
        )
    for block in blocks:  # alike, so that one compilation serves all
        block.compile(dynamic=True)
    for head in _event_heads(model):
        head.compile_scores()


def compile_head(model: nn.Module) -> None:
    """Compile what a head that predicts events scores, and nothing else of the model.

    Raises:
        UserError: it predicts no events.
    """
    if not (heads := _event_heads(model)):
        raise UserError(
            f"trainer.compile=head: {type(model).__name__} scores no vocabulary in this task. Type: trainer.compile=false"
        )
    for head in heads:
        head.compile_scores()


def _event_heads(model: nn.Module) -> list[EventHead]:
    return [module for module in model.modules() if isinstance(module, EventHead)]
