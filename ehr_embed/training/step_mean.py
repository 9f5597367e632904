"""The gradient of a step as that of the mean loss over all events or samples the step saw, in whatever batches they came."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ehr_embed.tasks.protocol import StepResult
from ehr_embed.training.processes import Processes
from ehr_embed.training.sharding import own_part


class StepMean:
    """Turns sums of losses into the gradient of their mean over the batches of a step and over all processes.

    How many events a batch predicts is known after its forward pass only, and the batches of a step may differ. So each sum is
    divided by the count of the step's first batches (one per process), and `finish` multiplies the gradients by what that count
    was of the whole. Dividing at once keeps the gradients of float16 in range; where a step has one batch per process the first
    count is the whole, and the gradients stay as they are. Counts stay on the device, so no host waits for them.

    Args:
        processes: that train together; each gets the mean of the others' gradients.
        device: where the model is.
    """

    def __init__(self, processes: Processes, device: torch.device) -> None:
        self.processes, self.device = processes, device
        self._first: Tensor | None = None
        self._count = torch.zeros((), dtype=torch.float64, device=device)

    def loss(self, step: StepResult) -> Tensor:
        """Return what to call `backward` on for a batch's sum."""
        if self._first is None:
            self._first = self._total(count_of(step, self.device))
        self._count = self._count + count_of(step, self.device)
        return step.loss_sum * (self.processes.size / self._first).to(step.loss_sum.dtype)

    def finish(self, parameters: Iterable[Tensor], *, n_batches: int) -> None:
        """Make the gradients of `parameters`, averaged over the processes before, those of the step's mean.

        Args:
            n_batches: of this process in the step.
        """
        assert self._first is not None
        if n_batches > 1:
            factor = self._first / self._total(self._count)
            gradients = [own_part(p.grad) for p in parameters if p.grad is not None]
            for gradient in gradients:
                gradient.mul_(factor)
        self._first, self._count = None, torch.zeros_like(self._count)

    def _total(self, count: Tensor) -> Tensor:
        """Return a count summed over the processes, 1 where nothing was counted."""
        return self.processes.total(count.clone()).clamp(min=1)


def count_of(step: StepResult, device: torch.device) -> Tensor:
    """Return a step's count as a float64 scalar on `device`, without waiting for it."""
    if isinstance(step.count, Tensor):
        return step.count.to(device, torch.float64)
    return torch.full((), step.count, dtype=torch.float64, device=device)
