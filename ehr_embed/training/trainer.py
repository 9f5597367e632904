"""The only training loop, on Lightning Fabric."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.progress import ProgressBar
from ehr_embed.core.stopping import Stopped, StopRequest, stop_requests
from ehr_embed.data.batches import Batch
from ehr_embed.data.samples import samples_digest
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.protocol import body_of
from ehr_embed.run_folder.checkpoints import Continuation
from ehr_embed.run_folder.layout import BEST
from ehr_embed.tasks.protocol import Outputs, Task, run_step, tuning_values
from ehr_embed.tasks.set_up import dataset_of
from ehr_embed.training.memory import peak_memory_mib
from ehr_embed.training.precision import choose_precision
from ehr_embed.training.processes import Processes
from ehr_embed.training.profiling import profiler
from ehr_embed.training.set_up import Training, set_up_training
from ehr_embed.training.settings import TrainerSettings
from ehr_embed.training.sharding import load_weights
from ehr_embed.training.split_batches import SplitBatches
from ehr_embed.training.state import Progress, TrainingState, rng_state
from ehr_embed.training.step_check import check_step
from ehr_embed.training.step_mean import StepMean, count_of
from ehr_embed.training.threads import SlowEpochWarning

PROGRESS_EVERY = 20
"""Steps between progress updates; each waits for the device."""


class Trainer:
    """Trains a model on a task's train samples and keeps the checkpoint that is best on tuning.

    Args:
        settings: how to train.
        processes: the processes that train together, as `settings.launch` returned them.
        task: after `setup`.
        run_dir: where checkpoints go.
        config: the resolved configuration, stored in every checkpoint beside the precision.
        identity: digests of the embedder and the vocabulary, which the weights depend on; stored too.
        sizes: what the model was built with beside its configuration; stored too.
        seed: order of the batches, and what a task draws.
        log: called with a row of metrics and the epoch after every epoch.

    Attributes:
        teacher: gives each train batch targets in place of its labels; None = the labels stay. Set before `fit`.
        batches: the batches of each split; `batches.weigh` may be set before `fit`.
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
        init_from_sha256: str | None = None,
        log: Callable[[dict[str, float], int], None],
    ) -> None:
        self.settings, self.task, self.run_dir, self.seed, self.log = settings, task, run_dir, seed, log
        self.processes, self.fabric = processes, processes.fabric
        self.teacher: Callable[[Batch], Batch] | None = None
        self.batches = SplitBatches(task, settings, processes, seed=seed)
        self.precision = choose_precision(settings.precision, settings.accelerator)
        self.about: dict[str, Any] = {
            "config": config,
            "identity": identity,
            "sizes": sizes,
            "class_names": task.class_names,
            "samples_digest": samples_digest(task.samples),
            "init_from_sha256": init_from_sha256,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
        }

    def fit(self, model: nn.Module, embedding: EventEmbedding, run: Continuation | None = None) -> dict[str, Any]:
        """Train until `epochs` (or those of `min_steps`), or until the monitored metric has not improved for `patience` epochs.

        Model and embedding end with the best epoch's weights.

        Args:
            run: what to go on from; on a CPU the result is that of a run that was never stopped.

        Returns:
            Facts of the run: epochs, steps (of the optimizer), best_epoch, seconds, those of `throughput.rates`, history (one row
            of metrics per epoch), and those of `facts`.

        Raises:
            UserError: the loss became NaN or infinite or is no sum over the samples, or `run` does not fit the model.
            Stopped: a signal asked for it; `latest_checkpoint.pt` has been written.
        """
        n_batches = self.batches.n_of_epoch(1)
        training = set_up_training(
            model,
            embedding,
            run,
            settings=self.settings,
            processes=self.processes,
            task=self.task,
            seed=self.seed,
            about=self.about,
            n_batches=n_batches,
        )
        if run is None:
            check_step(self.task, training.wrapped, embedding, dataset_of(self.task, "train"))
        self._train_until_done(training, n_epochs=self.settings.epochs_of(n_batches))
        self._reload_best(model, embedding)
        progress = training.state.progress
        return self.facts(model, embedding) | {
            "n": len(dataset_of(self.task, "train")),
            "epochs": progress.epoch,
            "steps": progress.step,
            "best_epoch": progress.best_epoch,
            "seconds": progress.total_seconds,
            **training.speed(
                progress.total_events, progress.total_padded, progress.total_pairs, progress.total_seconds
            ),
            "history": progress.history,
        }

    def _train_until_done(self, training: Training, *, n_epochs: int) -> None:
        """Train and evaluate one epoch after another, until the last one or until patience is over."""
        state = training.state
        progress = state.progress
        warn_if_slow = SlowEpochWarning(self.fabric.device, progress.history)
        profiled = profiler(self.run_dir, is_on=self.settings.profile and self.processes.is_first)
        with stop_requests(is_deferred=True) as stop, profiled as after_batch:
            if progress.history and not progress.batch:
                self._keep(state)  # an earlier start may have been killed before it did so
            for row in progress.history:  # a tracker that was killed may lack the last rows, and a new one lacks all
                self.log(row, row["epoch"])
            while self._goes_on(progress, n_epochs):
                loss = self._train_epoch(training, stop, after_batch)
                row, value = self._evaluate_epoch(training, loss, stop)
                progress.end_epoch(
                    row, value, is_higher_better=self.task.is_higher_better, keeps_last=self.settings.keep == "last"
                )
                state.save(self.run_dir)
                self._keep(state)
                self.log(row, progress.epoch)
                warn_if_slow(row)
                self._leave_if_asked(stop, progress)

    def _goes_on(self, progress: Progress, n_epochs: int) -> bool:
        """Return whether an epoch is unfinished, or another one is to come."""
        patience = self.settings.patience
        is_patient = patience is None or progress.epochs_without_improvement < patience
        return bool(progress.batch) or (progress.epoch < n_epochs and is_patient)

    def _evaluate_epoch(self, training: Training, loss: float, stop: StopRequest) -> tuple[dict[str, Any], float]:
        """Evaluate the epoch on tuning, and tell the plateau schedule.

        Args:
            training: after the epoch.
            loss: its mean train loss per event or sample.
            stop: a request to stop ends the evaluation at once; the next start does it again.

        Returns:
            The epoch's row of metrics, and its monitored metric.

        Raises:
            Stopped: a signal asked for it; `latest_checkpoint.pt` has been written.
        """
        state, progress = training.state, training.state.progress
        rng = rng_state()
        try:
            with state.averaged():
                tuning_loss, outputs = self.evaluate(state.model, state.embedding, "tuning", stop)
        except Stopped:
            state.save(self.run_dir, rng)
            self._leave_if_asked(stop, progress)
            raise
        tuning = tuning_values(self.task, outputs)
        value = float(tuning[self.task.monitor])
        if state.plateau is not None and progress.step >= state.warmup.total_iters:
            state.plateau.step(value)
        row = {
            "epoch": progress.epoch,
            "step": progress.step,
            "train/loss": loss,
            "train/learning_rate": state.optimizer.param_groups[0]["lr"],
            "tuning/loss": tuning_loss,
        }
        found = training.speed(progress.n_events, progress.n_padded, progress.n_pairs, progress.seconds)
        found["peak_memory_mib"] = peak_memory_mib(self.fabric.device)
        row |= {f"train/{name}": x for name, x in found.items()}
        row |= {f"tuning/{name}": metric for name, metric in tuning.items()}
        if "loss" in tuning:  # the metric, which class weights, smoothing or a task's own loss do not change
            row["tuning/trained_loss"] = tuning_loss
        return row, value

    def _reload_best(self, model: nn.Module, embedding: EventEmbedding) -> None:
        """Give model and embedding the weights of the best epoch."""
        self.fabric.barrier()
        # mmap: the optimizer's state in the file, twice as large as the weights, is not read.
        best = torch.load(self.run_dir / BEST, map_location="cpu", weights_only=True, mmap=True)
        load_weights(model, best["model_state_dict"])
        embedding.load_state_dict(best.get("embedding_state_dict", {}))

    def facts(self, model: nn.Module, embedding: EventEmbedding) -> dict[str, Any]:
        """Return the facts that any model has, also one that is not trained here: n_parameters, n_trained (those with a gradient),
        peak_memory_mib so far (of the GPU, else of this process), precision, and an empty history."""
        parameters = [*model.parameters(), *embedding.parameters()]
        return {
            "n_parameters": sum(p.numel() for p in parameters),
            "n_trained": sum(p.numel() for p in parameters if p.requires_grad),
            "peak_memory_mib": peak_memory_mib(self.fabric.device),
            "precision": self.precision,
            "history": [],
        }

    def predict(self, model: nn.Module, embedding: EventEmbedding, split: str) -> Outputs:
        """Return the task's outputs (n, n_outputs) of all samples of a split, in sample order."""
        embedding.to(self.fabric.device)
        return self.evaluate(model.to(self.fabric.device), embedding, split)[1]

    def _train_epoch(self, training: Training, stop: StopRequest, after_batch: Callable[[], None]) -> float:
        """Train one more pass over train, or the rest of a pass that an earlier start began.

        Args:
            training: what is trained.
            stop: a request to stop ends the epoch after the next step.
            after_batch: called after every batch.

        Returns:
            The mean loss per event or sample.

        Raises:
            UserError: a process would have no batch, or the loss became NaN or infinite.
            Stopped: a signal asked for it; `latest_checkpoint.pt` has been written.
        """
        settings, state, progress = self.settings, training.state, training.state.progress
        training.wrapped.train()
        state.embedding.train()
        if settings.freeze == "body":
            body_of(training.wrapped.module).eval()
        progress.epoch += not progress.batch
        loader = self.loader("train", progress.epoch, progress.batch)
        first, n_batches = progress.batch, len(loader.sampler)
        if not n_batches:
            raise UserError(
                f"an epoch has fewer batches than this run has processes ({self.processes.size}), so some would have none. "
                f"Type: {settings.batch_key}=SMALLER, or trainer.devices=FEWER"
            )
        device = self.fabric.device
        # The sum of the losses and their number; float64, as float32 stops counting at 2^24.
        losses = torch.tensor([progress.loss_sum, progress.loss_count], dtype=torch.float64, device=device)
        step_mean = StepMean(self.processes, device)
        began = time.perf_counter() - progress.seconds
        bar = ProgressBar(
            training.begin(loader, is_new=not first),
            total=n_batches,
            initial=first,
            desc=f"epoch {progress.epoch}",
            leave=False,
            is_shown=self.processes.is_first,
            unit="batch",
        )
        for number, batch in enumerate(bar, first):
            progress.count(batch)
            ends_step = (number + 1) % settings.accumulate == 0 or number + 1 == n_batches
            own = self._backward(training, step_mean, batch, ends_step=ends_step)
            losses += own
            after_batch()
            if number % PROGRESS_EVERY == 0 and bar.is_bar:  # reading the loss waits for the device
                rate = progress.n_events / (time.perf_counter() - began)
                mean_loss = float(own[0] / own[1].clamp(min=1))
                bar.set_postfix(loss=f"{mean_loss:.4f}", events_per_s=f"{rate:,.0f}")
            if not ends_step:
                continue
            # The last group of an epoch may be smaller.
            group = min(settings.accumulate, n_batches - number // settings.accumulate * settings.accumulate)
            self._step(training, step_mean, n_batches=group)
            is_due = settings.checkpoint_every is not None and progress.step % settings.checkpoint_every == 0
            asked = self._asked_before(stop)
            if asked or is_due or number + 1 == n_batches:
                progress.batch, progress.seconds = number + 1, time.perf_counter() - began
                progress.average(losses.tolist(), self.processes)
                self._refuse_infinite(progress)
                losses[0], losses[1] = progress.loss_sum, progress.loss_count
            if asked or is_due:
                state.save(self.run_dir)
                self._leave_if_asked(stop, progress)
        return progress.loss

    def _backward(self, training: Training, step_mean: StepMean, batch: Batch, *, ends_step: bool) -> Tensor:
        """Add the gradients of one batch.

        Args:
            training: what is trained.
            step_mean: divides the batch's sum.
            batch: on any device.
            ends_step: whether this is the step's last batch; the processes share their gradients then.

        Returns:
            (2,) float64, the batch's sum of losses and their number.
        """
        moved = batch.to(self.fabric.device)
        with self.fabric.no_backward_sync(training.wrapped, enabled=not ends_step):
            result = run_step(
                self.task,
                training.wrapped,
                training.state.embedding,
                moved if self.teacher is None else self.teacher(moved),
            )
            self.fabric.backward(step_mean.loss(result))
        return torch.stack([result.loss_sum.detach().double(), count_of(result, self.fabric.device)])

    def _step(self, training: Training, step_mean: StepMean, *, n_batches: int) -> None:
        """Change the weights by the mean gradient of the last `n_batches` batches, and advance the schedule."""
        state = training.state
        self._synchronise(state.embedding)
        step_mean.finish(training.parameters, n_batches=n_batches)
        if self.settings.clip_norm > 0:
            self.fabric.clip_gradients(
                training.wrapped, state.optimizer, max_norm=self.settings.clip_norm, error_if_nonfinite=False
            )
        state.optimizer.step()
        if state.anchor is not None:
            state.anchor.draw_back(state.optimizer.param_groups[0]["lr"])
        state.scheduler.step()
        state.optimizer.zero_grad()
        state.progress.step += 1
        if state.ema is not None:
            state.ema.update(state.progress.step)

    @staticmethod
    def _refuse_infinite(progress: Progress) -> None:
        """Refuse a loss from which nothing can be learned; no checkpoint holds such weights."""
        if not np.isfinite(progress.loss_sum):
            raise UserError(
                f"the training loss became {progress.loss_sum} in epoch {progress.epoch}, so nothing can be learned from here on. "
                "Type: resume=overwrite trainer.learning_rate=LOWER, or resume=overwrite trainer.precision=32-true"
            )

    def _asked(self, stop: StopRequest) -> str | None:
        """Return the signal that asked any process to stop: all stop together, since each waits for the others."""
        number = self.processes.largest(0 if stop.name is None else signal.Signals[stop.name])
        return signal.Signals(number).name if number else None

    def _asked_before(self, stop: StopRequest) -> bool:
        """Return whether a signal had asked any process to stop at the previous call; a single process answers for now."""
        return self.processes.largest_before(int(stop.name is not None)) > 0

    def _leave_if_asked(self, stop: StopRequest, progress: Progress) -> None:
        """Raise `Stopped` if a signal asked any process to stop; the caller has saved the state."""
        if name := self._asked(stop):
            raise Stopped(
                f"stopped by {name} in epoch {progress.epoch}, step {progress.step}, and saved in {self.run_dir}; "
                "the same command with this run_dir continues"
            )

    def evaluate(
        self, model: nn.Module, embedding: EventEmbedding, split: str, stop: StopRequest | None = None
    ) -> tuple[float, Outputs]:
        """Return the mean loss per event or sample of a split, and its outputs (n, n_outputs) in sample order; neither depends on
        the batches."""
        model.eval()
        embedding.eval()
        loader = self.loader(split)
        n, n_own = len(loader.dataset), loader.sampler.n_own
        result = torch.zeros(n, self.task.n_outputs, dtype=torch.float64, device=self.fabric.device)
        losses = torch.zeros(2, dtype=torch.float64, device=self.fabric.device)
        # Buffers that an FSDP model makes in inference mode could not be trained with.
        with torch.inference_mode(self.processes.size == 1), torch.no_grad():
            for number, batch in enumerate(loader):
                if stop is not None and self._asked_before(stop):
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

    def loader(self, split: str, epoch: int | None = None, first: int = 0) -> Any:
        """Return the batches of a split: of a training epoch in random order from batch `first` on, else in order of length."""
        return self.batches.loader(split, epoch, first)

    def _keep(self, state: TrainingState) -> None:
        """Keep the latest checkpoint as the best one or as that of its epoch, where it is due."""
        if self.processes.is_first:
            state.keep(self.run_dir, save_every=self.settings.save_every)
