"""Scales the gradient of a step to that of the mean loss over all its events or samples, however they are batched."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ehr_embed.tasks.protocol import StepResult
from ehr_embed.training.processes import Processes
from ehr_embed.training.sharding import own_part


class StepMean:
    """Turns sums of losses into the gradient of their mean over the batches of a step and over all processes.

    The number of events that a batch predicts is known only after its forward pass, and differs between the batches of
    a step. Each sum is therefore divided by the count of the step's first batches (one per process), and `finish`
    multiplies the gradients by the ratio of that count to the whole count. The early division keeps float16 gradients
    in range. If a step has one batch per process, the first count is the whole count and `finish` changes nothing.
    Counts stay on the device, so the host does not wait for them.

    Args:
        processes: processes that train together; their gradients are averaged.
        device: device of the model.
    """

    def __init__(self, processes: Processes, device: torch.device) -> None:
        self.processes, self.device = processes, device
        self._first: Tensor | None = None
        self._count = torch.zeros((), dtype=torch.float64, device=device)

    def loss(self, step: StepResult) -> Tensor:
        """Return the scaled loss of a batch, on which `backward` must be called."""
        if self._first is None:
            self._first = self._total(count_of(step, self.device))
        self._count = self._count + count_of(step, self.device)
        return step.loss_sum * (self.processes.size / self._first).to(step.loss_sum.dtype)

    def finish(self, parameters: Iterable[Tensor], *, n_batches: int) -> None:
        """Scale the gradients of `parameters`, already averaged over the processes, to those of the step's mean loss.

        Args:
            parameters: parameters with gradients.
            n_batches: number of batches of this process in the step.
        """
        assert self._first is not None
        if n_batches > 1:
            factor = self._first / self._total(self._count)
            gradients = [own_part(p.grad) for p in parameters if p.grad is not None]
            for gradient in gradients:
                gradient.mul_(factor)
        self._first, self._count = None, torch.zeros_like(self._count)

    def _total(self, count: Tensor) -> Tensor:
        """Return a count summed over the processes, at least 1."""
        return self.processes.total(count.clone()).clamp(min=1)


def count_of(step: StepResult, device: torch.device) -> Tensor:
    """Return a step's count as a float64 scalar on `device`, without waiting for it."""
    if isinstance(step.count, Tensor):
        return step.count.to(device, torch.float64)
    return torch.full((), step.count, dtype=torch.float64, device=device)
