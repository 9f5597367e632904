"""Schedules of the learning rate, each the member behind one YAML of conf/trainer/schedule/."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    ReduceLROnPlateau,
    SequentialLR,
)

from ehr_embed.core.settings import ShareAbove0, Told, check_settings
from ehr_embed.training.protocol import Course, FollowsMetric, Schedule


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """Multiplies the rate by `factor` after `patience` epochs in which the monitored metric did not improve.

    Raises:
        UserError: `patience` is below 0, or `factor` is not between 0 and 1.
    """

    patience: Annotated[int, Field(ge=0)] = 3
    factor: Annotated[float, Field(gt=0, lt=1), Told("a factor between 0 and 1", example="0.5")] = 0.5

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "trainer.schedule", only_rules=True)

    def after_warmup(self, optimizer: Optimizer, course: Course) -> None:
        """Leave the rates alone between epochs."""

    def by_metric(self, optimizer: Optimizer, course: Course) -> ReduceLROnPlateau:
        """Return torch's scheduler, which goes down to `min_learning_rate`."""
        mode: Any = "max" if course.is_higher_better else "min"
        return ReduceLROnPlateau(
            optimizer, mode=mode, factor=self.factor, patience=self.patience, min_lr=course.min_learning_rate
        )


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the peak to `min_learning_rate`, which it reaches at the last step (arXiv:1608.03983)."""

    def after_warmup(self, optimizer: Optimizer, course: Course) -> LRScheduler:
        """Return torch's scheduler."""
        return CosineAnnealingLR(optimizer, T_max=course.steps_after_warmup, eta_min=course.min_learning_rate)


@dataclass(frozen=True)
class Constant:
    """The peak until the end."""

    def after_warmup(self, optimizer: Optimizer, course: Course) -> None:
        """Leave the rates alone."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """The peak, then a line down to `min_learning_rate` over the last `decay_share` of the steps after warm-up (arXiv:2405.18392).

    Raises:
        UserError: `decay_share` is not in (0, 1].
    """

    decay_share: ShareAbove0 = 1.0

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "trainer.schedule", only_rules=True)

    def after_warmup(self, optimizer: Optimizer, course: Course) -> LRScheduler:
        """Return a scheduler with a closed form per group, since the least rate is the same for all and the peaks are not."""
        n = course.steps_after_warmup

        def factor_of(peak: float) -> Any:
            least = min(1.0, course.min_learning_rate / peak) if peak else 1.0
            return lambda step: max(least, 1 - (1 - least) * self.decayed(step / n))

        return LambdaLR(optimizer, [factor_of(group["initial_lr"]) for group in optimizer.param_groups])

    def decayed(self, share: float) -> float:
        """Return how far the line has come down, 0 to 1, after a share of the steps.

        >>> Linear().decayed(0.25), Linear(decay_share=0.2).decayed(0.7), round(Linear(decay_share=0.2).decayed(0.9), 3)
        (0.25, 0.0, 0.5)
        """
        return min(1.0, max(0.0, (share - 1) / self.decay_share + 1))


BY_NAME = {"plateau": Plateau, "cosine": Cosine, "constant": Constant}
"""The schedules that `trainer.schedule` takes by name, as in earlier versions; `core.moved.SCHEDULES` says the same for records.
Any other schedule is chosen by its YAML, and needs no entry."""


def start(schedule: Schedule, optimizer: Any, course: Course) -> tuple[LRScheduler, LinearLR, ReduceLROnPlateau | None]:
    """Return a scheduler per step (warm-up, then the schedule's), the warm-up inside it, and a scheduler per epoch or None.

    Args:
        schedule: the member.
        optimizer: optimizer whose learning rates are at their peaks, and are scheduled.
        course: the training.
    """
    warmup = LinearLR(optimizer, start_factor=1 / (course.warmup_steps + 1), total_iters=course.warmup_steps)
    after = schedule.after_warmup(optimizer, course)
    by_metric = schedule.by_metric(optimizer, course) if isinstance(schedule, FollowsMetric) else None
    if after is None:
        return warmup, warmup, by_metric
    return SequentialLR(optimizer, [warmup, after], milestones=[course.warmup_steps]), warmup, by_metric
