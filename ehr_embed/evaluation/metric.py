"""Declaration of a metric: its name and direction. This module does not import torch, so that a search starts fast."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ehr_embed.core.errors import UserError, unknown_name


@dataclass(frozen=True)
class Metric:
    """A number that a task measures on a split.

    Attributes:
        name: key of the metric in metrics.json.
        is_higher_better: direction of the metric, by which checkpoints, schedules and searches choose.
        needs: `values` if the metric exists only for events that carry values; None = it always exists.
        is_ranking: whether the metric depends on the order of the predictions alone, so that its values on two datasets can be
            compared. A metric with a threshold cannot, since each dataset's tuning split chooses its own.
    """

    name: str
    is_higher_better: bool
    needs: Literal["values"] | None = None
    is_ranking: bool = False


def metric_named(name: str, metrics: Iterable[Metric]) -> Metric:
    """Return the metric with this name among the metrics of a task.

    Raises:
        UserError: the task has no metric with this name, or the name is that of a metric on held_out.

    >>> own = (Metric("auroc", True), Metric("brier", False))
    >>> metric_named("brier", own).is_higher_better
    False
    >>> metric_named("held_out.auroc", own)
    Traceback (most recent call last):
    ehr_embed.core.errors.UserError: task.monitor=held_out.auroc: expected a metric on tuning. A model that held_out has chosen \
can no longer be judged on held_out. Type: task.monitor=auroc
    """
    by_name = {metric.name: metric for metric in metrics}
    if name not in by_name:
        if name.startswith("held_out"):
            plain = name.removeprefix("held_out").lstrip("./")
            raise UserError(
                f"task.monitor={name}: expected a metric on tuning. A model that held_out has chosen can no longer be "
                "judged on held_out. "
                f"Type: task.monitor={plain if plain in by_name else next(iter(by_name))}"
            )
        raise unknown_name("task.monitor", name, tuple(by_name))
    return by_name[name]


def title_of(name: str) -> str:
    """Return the name of a metric or a split for people, with abbreviations in capitals and spaces in place of underscores.

    >>> title_of("held_out"), title_of("auroc"), title_of("time_loss")
    ('held out', 'AUROC', 'time loss')
    """
    return name.upper() if name in {"auroc", "auprc", "f1", "ece"} else name.replace("_", " ")
