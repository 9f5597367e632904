"""The only training loop, on Lightning Fabric."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm

from ehr_embed.core.errors import UserError
from ehr_embed.core.stopping import Stopped, StopRequest, stop_requests
from ehr_embed.data.batches import BucketSampler, batch_loader
from ehr_embed.data.samples import samples_digest
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.gbm import GBM
from ehr_embed.models.protocol import AdaptsToRecords, body_of
from ehr_embed.run_folder.checkpoints import Continuation
from ehr_embed.run_folder.layout import BEST
from ehr_embed.tasks.protocol import Outputs, Task, run_step, tuning_values
from ehr_embed.training.ema import Ema
from ehr_embed.training.memory import peak_memory_mib
from ehr_embed.training.optimizer import fitting_warmup, parameter_groups, schedules
from ehr_embed.training.precision import choose_precision
from ehr_embed.training.processes import Processes
from ehr_embed.training.profiling import profiler
from ehr_embed.training.settings import TrainerSettings
from ehr_embed.training.sharding import blocks_of, load_weights
from ehr_embed.training.state import Progress, TrainingState, rng_state, seed_of_rank, set_rng_state
from ehr_embed.training.step_mean import StepMean, count_of
from ehr_embed.training.teacher import Teacher, cross_fitted
from ehr_embed.training.threads import SlowEpochWarning
from ehr_embed.training.throughput import peak_flops, rates, training_flops

__all__ = ["Trainer", "TrainerSettings"]
log = logging.getLogger(__name__)
PROGRESS_EVERY = 20
"""Steps between progress updates; each waits for the device."""


class Trainer:
    """Trains a model on a task's train samples and keeps the checkpoint that is best on tuning.

    Args:
        settings: how to train.
        processes: what `settings.launch` gave.
        task: after `setup`.
        run_dir: where checkpoints go.
        config: the resolved configuration, stored in every checkpoint beside the precision.
        identity: digests of the embedder and the vocabulary, which the weights depend on; stored too.
        sizes: what the model was built with beside its configuration; stored too.
        seed: order of the batches, and what a task draws.
        log: called with a row of metrics and the epoch after every epoch.
        teacher_model: what `settings.teacher` names, unfitted.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        processes: Processes,
        *,
        task: Task,
        run_dir: Path,
        config: dict[str, Any],
        identity: dict[str, str],
        sizes: dict[str, Any],
        seed: int,
        log: Callable[[dict[str, float], int], None],
        teacher_model: GBM | None = None,
    ) -> None:
        self.settings, self.task, self.run_dir, self.seed, self.log = settings, task, run_dir, seed, log
        self.processes, self.fabric = processes, processes.fabric
        self.teacher_model = teacher_model
        self.teacher: Teacher | None = None
        self.precision = choose_precision(settings.precision, settings.accelerator)
        self.about = {
            "config": config,
            "identity": identity,
            "sizes": sizes,
            "class_names": task.class_names,
            "samples_digest": samples_digest(task.samples),
            "precision": self.precision,
            "threads": torch.get_num_threads(),
        }

    def fit(self, model: nn.Module, embedding: EventEmbedding, run: Continuation | None = None) -> dict[str, Any]:
        """Train until `epochs`, or until the monitored metric has not improved for `patience` epochs.

        Model and embedding end with the best epoch's weights.

        Args:
            run: what to go on from; on a CPU the result is that of a run that was never stopped.

        Returns:
            Facts of the run: epochs, steps (of the optimizer), best_epoch, seconds, those of `speed.rates`, history (a row an
            epoch), and those of `facts`.

        Raises:
            UserError: the loss became NaN or infinite, or `run` does not fit the model.
            Stopped: a signal asked for it; `latest_checkpoint.pt` has been written.
        """
        settings = self.settings
        embedding.to(self.fabric.device)
        if settings.freeze == "body":
            body_of(model).requires_grad_(False)
            embedding.requires_grad_(False)  # what the body reads is part of what it learned
        if settings.compile:
            if not (blocks := blocks_of(model)):
                raise UserError(
                    f"trainer.compile=true: {type(model).__name__} has no blocks to compile. Type: trainer.compile=false"
                )
            for block in blocks:  # alike, so that one compilation serves all
                block.compile(dynamic=True)
        if run is None and isinstance(model, AdaptsToRecords):
            model.to(self.fabric.device).adapt_to_records(self._train_inputs(embedding))
        if self.teacher_model is not None:
            self.teacher = cross_fitted(self, self.teacher_model, embedding, share=settings.teacher_share)
        self.processes.share(model)
        # Before the optimizer: a model that is spread has new parameters.
        wrapped = self.fabric.setup_module(model)
        groups = parameter_groups(
            model,
            embedding,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay,
        )
        optimizer: Any = self.fabric.setup_optimizers(
            torch.optim.AdamW(
                groups, betas=(settings.betas[0], settings.betas[1]), fused=self.precision != "16-mixed"
            )  # which clips outside
        )
        steps_per_epoch = -(-len(self._loader("train", 1).sampler) // settings.accumulate)
        total_steps = steps_per_epoch * settings.epochs
        warmup_steps = fitting_warmup(settings.warmup_steps, total_steps)
        if warmup_steps < settings.warmup_steps:
            log.info("trainer.warmup_steps=%d: %d of %d steps", settings.warmup_steps, warmup_steps, total_steps)
        scheduler, plateau = schedules(
            optimizer,
            settings.schedule,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            min_learning_rate=settings.min_learning_rate,
            patience=settings.scheduler_patience,
            is_higher_better=self.task.is_higher_better,
        )
        scaling = self.fabric.strategy.precision
        learned = [*model.parameters(), *embedding.parameters()]
        ema = None if settings.ema is None else Ema(learned, settings.ema)
        state = TrainingState(
            model, embedding, optimizer, scheduler, plateau, scaling, self.about, self.processes, ema=ema
        )
        rng = None if run is None else state.restore(run)
        if rng is None and self.processes.rank:  # else all ranks would drop and mask the same places
            torch.manual_seed(seed_of_rank(self.seed, self.processes.rank))
        progress = state.progress
        speed = self._speed(model, embedding)
        warn_if_slow = SlowEpochWarning(self.fabric.device, progress.history)

        profiled = profiler(self.run_dir, is_on=settings.profile and self.processes.is_first)
        with stop_requests(is_deferred=True) as stop, profiled as after_batch:
            if progress.history and not progress.batch:
                self._keep(state)  # a kill may have come before it
            for row in progress.history:  # to whoever keeps them now, and may not have the last
                self.log(row, row["epoch"])
            while progress.batch or (
                progress.epoch < settings.epochs
                and (settings.patience is None or progress.epochs_without_improvement < settings.patience)
            ):
                loss = self._train_epoch(wrapped, state, stop, rng, after_batch)
                rng = rng_state()
                try:
                    with state.averaged():
                        tuning_loss, outputs = self._predict(model, embedding, "tuning", stop)
                except Stopped:
                    state.save(self.run_dir, rng)
                    self._leave_if_asked(stop, progress)
                    raise
                rng = None
                tuning = tuning_values(self.task, outputs)
                value = float(tuning[self.task.monitor])
                if plateau is not None and progress.step >= warmup_steps:
                    plateau.step(value)
                row = {
                    "epoch": progress.epoch,
                    "step": progress.step,
                    "train/loss": loss,
                    "train/learning_rate": optimizer.param_groups[0]["lr"],
                    "tuning/loss": tuning_loss,
                }
                found = speed(progress.n_events, progress.n_padded, progress.n_pairs, progress.seconds)
                found["peak_memory_mib"] = peak_memory_mib(self.fabric.device)
                row |= {f"train/{name}": x for name, x in found.items()}
                row |= {f"tuning/{name}": metric for name, metric in tuning.items()}
                progress.end_epoch(
                    row, value, is_higher_better=self.task.is_higher_better, keeps_last=settings.keep == "last"
                )
                state.save(self.run_dir)
                self._keep(state)
                self.log(row, progress.epoch)
                warn_if_slow(row)
                self._leave_if_asked(stop, progress)

        self.fabric.barrier()
        # Mapped: the optimizer's state, twice the weights, is not read.
        best = torch.load(self.run_dir / BEST, map_location="cpu", weights_only=True, mmap=True)
        load_weights(model, best["model_state_dict"])
        embedding.load_state_dict(best.get("embedding_state_dict", {}))
        return self.facts(model, embedding) | {
            "n": len(self.task.dataset("train")),
            "epochs": progress.epoch,
            "steps": progress.step,
            "best_epoch": progress.best_epoch,
            "seconds": progress.total_seconds,
            **speed(progress.total_events, progress.total_padded, progress.total_pairs, progress.total_seconds),
            "history": progress.history,
        }

    def _train_inputs(self, embedding: EventEmbedding) -> Iterator[dict[str, Tensor]]:
        """What a model is given of all of train, at the prediction times, the same in every process."""
        dataset, settings = self.task.dataset("train"), self.settings
        for rows in BucketSampler(
            dataset.lengths, batch_size=settings.batch_size, batch_tokens=settings.batch_tokens, shuffle=False
        ):
            yield embedding.inputs(dataset[rows].to(self.fabric.device))

    def _speed(
        self, model: nn.Module, embedding: EventEmbedding
    ) -> Callable[[float, float, float, float], dict[str, float]]:
        """`rates` of all processes together from what one has done on average."""
        flops, n = training_flops(model, len(embedding.table)), self.processes.size
        peak = None if flops is None else peak_flops(self.fabric.device, self.precision)

        def speed(n_events: float, n_padded: float, n_pairs: float, seconds: float) -> dict[str, float]:
            return rates(n * n_events, n * n_padded, n * n_pairs, seconds, flops, None if peak is None else n * peak)

        return speed

    def facts(self, model: nn.Module, embedding: EventEmbedding) -> dict[str, Any]:
        """What can be said of a model that is not trained here: n_parameters, n_trained of them, peak_memory_mib so far (of the
        GPU, else of this process), precision, and an empty history."""
        parameters = [*model.parameters(), *embedding.parameters()]
        return {
            "n_parameters": sum(p.numel() for p in parameters),
            "n_trained": sum(p.numel() for p in parameters if p.requires_grad),
            "peak_memory_mib": peak_memory_mib(self.fabric.device),
            "precision": self.precision,
            "history": [],
        }

    def predict(self, model: nn.Module, embedding: EventEmbedding, split: str) -> Outputs:
        """The task's outputs of all samples of a split, in sample order."""
        embedding.to(self.fabric.device)
        return self._predict(model.to(self.fabric.device), embedding, split)[1]

    def _train_epoch(
        self,
        model: Any,
        state: TrainingState,
        stop: StopRequest,
        rng: dict[str, Any] | None,
        after_batch: Callable[[], None],
    ) -> float:
        """Train one more pass over train, or what is left of one that was begun; return its mean loss per event or sample.

        Args:
            rng: state of the generators to go on with; None = as they are.
            after_batch: called after every batch.
        """
        model.train()
        settings, progress = self.settings, state.progress
        if settings.freeze == "body":
            body_of(model.module).eval()
        progress.epoch += not progress.batch
        loader = self._loader("train", progress.epoch, progress.batch)
        first, n_batches = progress.batch, len(loader.sampler)
        if not n_batches:
            raise UserError(
                f"an epoch has fewer batches than this run has processes ({self.processes.size}), so some would have none. "
                f"Type: {self.settings.batch_key}=SMALLER, or trainer.devices=FEWER"
            )
        device = self.fabric.device
        # Of the losses and of their number; float64, as float32 stops counting at 2^24.
        losses = torch.tensor([progress.loss_sum, progress.loss_count], dtype=torch.float64, device=device)
        step_mean, parameters = StepMean(self.processes, device), [*model.parameters(), *state.embedding.parameters()]
        began = time.perf_counter() - progress.seconds
        if rng is not None and not first:
            set_rng_state(rng)
        batches = iter(loader)
        if rng is not None and first:
            set_rng_state(rng)  # the iterator has drawn a number, as it had before
        bar = tqdm(
            batches,
            total=n_batches,
            initial=first,
            desc=f"epoch {progress.epoch}",
            leave=False,
            disable=None if self.processes.is_first else True,
            unit="batch",
        )
        for number, batch in enumerate(bar, first):
            progress.count(batch)
            # The last group of an epoch may be smaller.
            group = min(settings.accumulate, n_batches - number // settings.accumulate * settings.accumulate)
            steps = (number + 1) % settings.accumulate == 0 or number + 1 == n_batches
            with self.fabric.no_backward_sync(model, enabled=not steps):
                moved = batch.to(device)
                result = run_step(
                    self.task, model, state.embedding, moved if self.teacher is None else self.teacher(moved)
                )
                self.fabric.backward(step_mean.loss(result))
            own = torch.stack([result.loss_sum.detach().double(), count_of(result, device)])
            losses += own
            after_batch()
            if number % PROGRESS_EVERY == 0 and not bar.disable:
                rate = progress.n_events / (time.perf_counter() - began)
                mean_loss = float(own[0] / own[1].clamp(min=1))
                bar.set_postfix(loss=f"{mean_loss:.4f}", events_per_s=f"{rate:,.0f}")
            if not steps:
                continue
            self._synchronise(state.embedding)
            step_mean.finish(parameters, n_batches=group)
            if settings.clip_norm > 0:
                self.fabric.clip_gradients(
                    model, state.optimizer, max_norm=settings.clip_norm, error_if_nonfinite=False
                )
            state.optimizer.step()
            state.scheduler.step()
            state.optimizer.zero_grad()
            progress.step += 1
            if state.ema is not None:
                state.ema.update(progress.step)
            is_due = settings.checkpoint_every is not None and progress.step % settings.checkpoint_every == 0
            asked = self._asked(stop)
            if asked or is_due or number + 1 == n_batches:
                progress.batch, progress.seconds = number + 1, time.perf_counter() - began
                progress.average(losses.tolist(), self.processes)
                self._finite(progress)
                losses[0], losses[1] = progress.loss_sum, progress.loss_count
            if asked or is_due:
                state.save(self.run_dir)
                self._leave_if_asked(stop, progress)
        return progress.loss

    @staticmethod
    def _finite(progress: Progress) -> None:
        """Refuse a loss from which nothing can be learned; no checkpoint holds such weights."""
        if not np.isfinite(progress.loss_sum):
            raise UserError(
                f"the training loss became {progress.loss_sum} in epoch {progress.epoch}, so nothing can be learned from here on. "
                "Type: resume=overwrite trainer.learning_rate=LOWER, or resume=overwrite trainer.precision=32-true"
            )

    def _asked(self, stop: StopRequest) -> str | None:
        """The signal by which any process was asked to stop: they do so together, since each waits for the others."""
        number = self.processes.largest(0 if stop.name is None else signal.Signals[stop.name])
        return signal.Signals(number).name if number else None

    def _leave_if_asked(self, stop: StopRequest, progress: Progress) -> None:
        if name := self._asked(stop):
            raise Stopped(
                f"stopped by {name} in epoch {progress.epoch}, step {progress.step}, and saved in {self.run_dir}; "
                "the same command with this run_dir continues"
            )

    def _predict(
        self, model: nn.Module, embedding: EventEmbedding, split: str, stop: StopRequest | None = None
    ) -> tuple[float, Outputs]:
        """Return the mean loss per event or sample of a split, and its outputs (n, n_outputs) in sample order; neither depends on
        the batches."""
        model.eval()
        loader = self._loader(split)
        n, n_own = len(loader.dataset), loader.sampler.n_own
        result = torch.zeros(n, self.task.n_outputs, dtype=torch.float64, device=self.fabric.device)
        losses = torch.zeros(2, dtype=torch.float64, device=self.fabric.device)
        # Buffers that a spread model makes in inference mode could not be trained with.
        with torch.inference_mode(self.processes.size == 1), torch.no_grad():
            for number, batch in enumerate(loader):
                if stop is not None and self._asked(stop):
                    raise Stopped
                moved = batch.to(self.fabric.device)
                with self.fabric.autocast():
                    step = run_step(self.task, model, embedding, moved)
                if number < n_own:
                    result[moved.sample] = step.outputs
                    losses += torch.stack([step.loss_sum.double(), count_of(step, self.fabric.device)])
        result = self._reduce(result, "sum")
        loss_sum, count = self._reduce(losses, "sum").tolist()
        return loss_sum / max(count, 1), result.cpu().numpy()

    def _synchronise(self, embedding: EventEmbedding) -> None:
        """Give every process the mean gradient of the embedding, which Fabric's wrapper of the model does not see."""
        if self.processes.size > 1:
            for parameter in embedding.parameters():
                if parameter.grad is not None:
                    distributed.all_reduce(parameter.grad)  # Fabric's would wait for the GPU first
                    parameter.grad /= self.processes.size

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        reduced = self.fabric.all_reduce(x, reduce_op=how)
        assert isinstance(reduced, Tensor)
        return reduced

    def _loader(self, split: str, epoch: int | None = None, first: int = 0) -> Any:
        """Batches of a split: in random order in an epoch of training, from its `first`, else in order of length."""
        settings = self.settings
        dataset = self.task.dataset(split, None if epoch is None else np.random.default_rng([self.seed, epoch]))
        sampler = BucketSampler(
            dataset.lengths,
            batch_size=settings.batch_size,
            batch_tokens=settings.batch_tokens,
            shuffle=epoch is not None,
            seed=self.seed,
            rank=self.processes.rank,
            world_size=self.processes.size,
        )
        sampler.set_epoch(epoch or 0, first)
        return batch_loader(
            dataset,
            sampler,
            num_workers=settings.num_workers,
            device=self.fabric.device,
            data_device=settings.data_device,
        )

    def _keep(self, state: TrainingState) -> None:
        if self.processes.is_first:
            state.keep(self.run_dir, save_every=self.settings.save_every)
