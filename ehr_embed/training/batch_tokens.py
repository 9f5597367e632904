"""Chooses the events per batch from the memory of the device, for `trainer.batch_tokens=auto`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.data.batches import EventDataset, padded_length
from ehr_embed.data.device_events import GIB, free_bytes, is_gathered_there
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.ensemble import Ensemble
from ehr_embed.models.protocol import FitsAtOnce
from ehr_embed.tasks.protocol import Task, run_step
from ehr_embed.tasks.set_up import dataset_of
from ehr_embed.training.processes import Processes
from ehr_embed.training.set_up import freeze
from ehr_embed.training.settings import AUTO, N_BATCH_TOKENS, TrainerSettings

log = logging.getLogger(__name__)
FEWEST, MOST = 4_096, 262_144
"""Events of the first batch that is tried, and the most that are chosen."""
SHARE = 0.7
"""Share of the free memory that one step may take; the rest is for what torch's allocator loses between tensors, for the events of
the splits, and for the buffers in which several processes add their gradients."""
STATE_BYTES = 12
"""Bytes per trained parameter that only training takes: two moments of AdamW and an average of the weights, in float32."""


class DeviceMemory(Protocol):
    """Protocol of the memory in which a step is tried."""

    def free(self) -> int:
        """Return the bytes that are free."""
        ...

    def peak_of(self, work: Callable[[], None]) -> int:
        """Do the work, and return the bytes that it took at its peak, above what was taken before."""
        ...


@dataclass(frozen=True)
class CudaMemory:
    """The memory of a GPU, as torch's allocator counts it."""

    device: torch.device

    def free(self) -> int:
        """Return the bytes that no tensor and no other process uses."""
        return free_bytes(self.device)

    def peak_of(self, work: Callable[[], None]) -> int:
        """Do the work, and return the bytes that its tensors took at their peak, above those that were there before."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        taken = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.reset_peak_memory_stats(self.device)  # the run reports the peak of its own steps
        return taken


def with_batch_tokens(
    settings: TrainerSettings,
    processes: Processes,
    *,
    task: Task,
    model: nn.Module,
    embedding: EventEmbedding,
    seed: int,
    kept: int | None = None,
    memory: DeviceMemory | None = None,
) -> TrainerSettings:
    """Return the settings with a number in place of `batch_tokens=auto`; all processes get the same number.

    On a GPU, steps of training and of evaluation are tried with ever larger batches of the longest samples, as `largest_that_fits`
    says. Weights and random numbers stay as they are. On a CPU, and for a model without steps, the number is `N_BATCH_TOKENS`.

    Args:
        settings: of the trainer.
        processes: those that train together, which must all call this function.
        task: after `setup`.
        model: with its first weights; on a GPU it is moved there.
        embedding: likewise.
        seed: of what the task draws for an epoch.
        kept: the number of an earlier start of this run, with which it goes on; None = there was none.
        memory: where the steps are tried; None = that of the device, which only a GPU has.

    Raises:
        UserError: the smallest batch does not fit.
    """
    device = processes.fabric.device
    if settings.batch_tokens != AUTO:
        return settings
    if memory is None and device.type == "cuda":
        memory = CudaMemory(device)
    if kept is not None:
        n, reason = kept, "as before in this run"
    elif memory is None or isinstance(model, FitsAtOnce | Ensemble) or not task.is_trained or settings.epochs == 0:
        n, reason = N_BATCH_TOKENS, "what auto stands for on a CPU, and where no steps are trained"
    else:
        n, reason = _tried(settings, processes, task, model, embedding, seed, memory)
        n = -processes.largest(-n)
    bound = "" if settings.batch_size is None else f", or {settings.batch_size} samples (trainer.batch_size)"
    log.info("%d events per batch%s: %s", n, bound, reason)
    return replace(settings, batch_tokens=n)


def largest_that_fits(peak_of: Callable[[int], int], *, budget: float, first: int) -> tuple[int, int]:
    """Return the most events per batch whose step takes at most `budget` bytes, and the bytes of the largest step that was tried.

    The number of events is doubled as long as twice the bytes of the last step are within the budget, so that a step runs out of
    memory only if its bytes grow faster than its events, or if another process takes memory meanwhile; the last number that fitted
    is chosen then. One and a half times the last number is chosen where that much fits. The numbers are coarse, so that a few MiB
    more or less of free memory do not change them.

    Args:
        peak_of: tries a step with so many events and returns the bytes that it took.
        budget: bytes.
        first: events of the first step.

    Raises:
        torch.OutOfMemoryError: the first step ran out of memory.

    >>> largest_that_fits(lambda n: 1000 + 10 * n, budget=400_000, first=4096)
    (32768, 328680)
    >>> largest_that_fits(lambda n: 0, budget=1, first=4096)[0] == MOST
    True
    """
    n = first
    taken = peak_of(n)
    while 2 * n <= MOST and 2 * taken <= budget:
        try:
            taken = peak_of(2 * n)
        except torch.OutOfMemoryError:
            return n, taken
        n *= 2
    more = n + n // 2
    return (more if more <= MOST and 1.5 * taken <= budget else n), taken


def _tried(
    settings: TrainerSettings,
    processes: Processes,
    task: Task,
    model: nn.Module,
    embedding: EventEmbedding,
    seed: int,
    memory: DeviceMemory,
) -> tuple[int, str]:
    """Return the number of events per batch, and the reason for it in words."""
    device = processes.fabric.device
    model.to(device)
    embedding.to(device)
    dataset: Any = dataset_of(task, "train", np.random.default_rng([seed, 1]))
    if is_gathered_there(dataset.events, device, settings.data_device):
        dataset = dataset.on(device)
    longest = int(padded_length(dataset.lengths).max())
    step = _step_of(processes, task, model, embedding, dataset)
    first = max(FEWEST, longest)
    with _unchanged(model, embedding, device):
        freeze(settings, model, embedding)
        state = STATE_BYTES * sum(p.numel() for p in (*model.parameters(), *embedding.parameters()) if p.requires_grad)
        try:
            step(min(first, 8 * longest))  # loads libraries and compares kernels, which takes memory once
            budget = SHARE * (memory.free() - state)
            n, taken = largest_that_fits(lambda n: memory.peak_of(lambda: step(n)), budget=budget, first=first)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"trainer.batch_tokens=auto: a training step with {first} events does not fit in the memory of {device}. Type: a "
                "smaller model.max_length or model.model_dim"
            ) from error
    return n, f"a step with long samples took up to {taken / GIB:.2f} GiB, and may take {budget / GIB:.2f} GiB"


def _step_of(
    processes: Processes,
    task: Task,
    model: nn.Module,
    embedding: EventEmbedding,
    dataset: EventDataset,
) -> Callable[[int], None]:
    """Return what trains on at most so many events of the longest samples, short of the optimizer, and then evaluates as many:
    some tasks ask more of a model in evaluation than in training."""
    evaluated, device = dataset_of(task, "tuning"), processes.fabric.device

    def loss_of(chosen: EventDataset, n_events: int) -> Tensor:
        order = np.argsort(-chosen.lengths, kind="stable")
        # Samples are repeated where there are too few.
        rows = np.resize(order, max(1, n_events // int(padded_length(chosen.lengths).max())))
        with processes.fabric.autocast():
            return run_step(task, model, embedding, chosen[rows].to(device)).loss_sum / len(rows)

    def step(n_events: int) -> None:
        loss_of(dataset, n_events).backward()
        model.zero_grad()
        embedding.zero_grad()
        model.eval()
        embedding.eval()
        with torch.no_grad():
            loss_of(evaluated, n_events)
        model.train()
        embedding.train()

    return step


@contextmanager
def _unchanged(model: nn.Module, embedding: EventEmbedding, device: torch.device) -> Iterator[None]:
    """Train while inside, and leave random numbers, gradients, modes and what is trained as they were."""
    modes = {module: module.training for module in (*model.modules(), *embedding.modules())}
    learns = {p: p.requires_grad for p in (*model.parameters(), *embedding.parameters())}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.train()
        embedding.train()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, is_trained in learns.items():
                parameter.requires_grad_(is_trained)
            model.zero_grad()
            embedding.zero_grad()
