"""The interfaces of the optimizer and of the schedule of the learning rate."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

log = logging.getLogger(__name__)


class MakesOptimizer(Protocol):
    """A class of torch.optim, or a subclass of `torch.optim.Optimizer`, with the options of its YAML.

    `trainer.learning_rate` and `trainer.weight_decay` belong to the trainer, which gives each group of parameters its own values as
    `lr` and `weight_decay`: weight decay spares biases and norms, and `trainer.layer_decay` lowers the rate of lower blocks. The
    options hold neither. The state is saved by `state_dict`, so it must be whatever the next step depends on.
    """

    def __call__(self, params: list[dict[str, Any]]) -> Optimizer:
        """Return the optimizer of groups with the keys `params`, `lr` and `weight_decay`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Course:
    """The training that a schedule is for.

    Attributes:
        total_steps: optimizer steps of all epochs, if patience does not end the training before.
        warmup_steps: the first of them, in which the rate rises on a line; the trainer does this for every schedule.
        min_learning_rate: least learning rate, `trainer.min_learning_rate`.
        is_higher_better: direction of the monitored metric.
    """

    total_steps: int
    warmup_steps: int
    min_learning_rate: float
    is_higher_better: bool

    @property
    def steps_after_warmup(self) -> int:
        """Return the number of steps after warm-up, at least 1."""
        return max(1, self.total_steps - self.warmup_steps)


@runtime_checkable
class Schedule(Protocol):
    """Sets the learning rates of all groups after warm-up; built with the options of its YAML, before the data are known."""

    def after_warmup(self, optimizer: Optimizer, course: Course) -> LRScheduler | None:
        """Return what changes the rates at every step after warm-up, counted from 0 there; None = they stay at their peaks.

        Args:
            optimizer: each of its groups has its peak as `initial_lr`.
            course: the training.
        """
        ...


@runtime_checkable
class FollowsMetric(Protocol):
    """A schedule that also changes the rates after an epoch, by the monitored metric on tuning."""

    def by_metric(self, optimizer: Optimizer, course: Course) -> ReduceLROnPlateau:
        """Return what is told the metric after every epoch from the end of warm-up on: torch's class or a subclass."""
        ...


def warmup_steps_of(asked: float, total_steps: int) -> int:
    """Return the number of steps of warm-up in a training of `total_steps`.

    A number below 1 is a share of all steps. Where warm-up would last as long as the whole training, so that the rate would never
    reach its peak, it takes half of the steps, and a warning says so.

    >>> warmup_steps_of(50, 400), warmup_steps_of(0.1, 400), warmup_steps_of(0, 400)
    (50, 40, 0)
    >>> warmup_steps_of(100, 80)
    40
    """
    if 0 < asked < 1:
        return round(asked * total_steps)
    if asked < max(total_steps, 1):
        return int(asked)
    log.warning(
        "trainer.warmup_steps=%d: the whole training has %d steps, in which the learning rate would never reach its peak, so "
        "warm-up takes half of them. To choose the share, type: trainer.warmup_steps=0.1",
        asked,
        total_steps,
    )
    return total_steps // 2
