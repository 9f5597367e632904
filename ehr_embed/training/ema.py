"""An exponential moving average of the weights, with which a run predicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages of parameters, which may take their places for as long as something is predicted.

    After step t an average a becomes d a + (1 - d) w with d = min(decay, (1 + t) / (10 + t)), so that the first steps, which lead
    away from random weights, are soon forgotten.

    Args:
        parameters: those that learn.
        decay: d of later steps, in [0, 1).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = [p for p in parameters if p.requires_grad]
        self.averages: list[Tensor] = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`, counted from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.lerp_(parameter.detach(), weight)

    @torch.no_grad()
    def take(self) -> None:
        """Set the averages to the present weights."""
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.copy_(parameter.detach())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Use the averages in place of the weights while inside, and restore the weights afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.data, self.averages[i] = self.averages[i], parameter.data
