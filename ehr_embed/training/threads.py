"""Chooses the number of CPU threads of a training run, which is the same in all its processes and after each resume."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ehr_embed.core.launchers import n_launched
from ehr_embed.core.threads import AUTO, choose, use
from ehr_embed.training.processes import Processes
from ehr_embed.training.settings import TrainerSettings

log = logging.getLogger(__name__)
RATE = "train/events_per_s"
SLOW = 0.4
"""Share of the first epoch's events per second below which a slow epoch causes a warning."""


def use_threads_of_run(settings: TrainerSettings, processes: Processes, kept: int | None) -> None:
    """Set the number of threads of every process of a run, chosen by `core.threads.choose`.

    All processes must call this function; they agree on the least number that any of them chose. On a GPU,
    `trainer.threads=auto` leaves torch's number unchanged.

    Args:
        settings: settings of the training loop.
        processes: processes of the run.
        kept: number of threads in the run's checkpoint; None without a checkpoint.
    """
    if processes.fabric.device.type != "cpu" and settings.threads == AUTO:
        return
    here = max(1, n_launched() // settings.nodes)
    choice = choose(settings.threads, kept=kept, n_processes=here)
    agreed = -processes.largest(-choice.n)
    use(choice if agreed == choice.n else replace(choice, n=agreed, reason="as another process of this run chose"))


@dataclass
class SlowEpochWarning:
    """Warns once when an epoch on a CPU runs far slower than the first one did.

    Args:
        device: device on which the model is trained.
        history: rows of metrics of the earlier epochs, those before a resume included.
        is_said: whether the warning was given.
    """

    device: torch.device
    history: Sequence[Mapping[str, Any]]
    is_said: bool = False

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Check an epoch's row of metrics, and warn if the epoch was slow."""
        first = (self.history[0] if self.history else row).get(RATE)
        if self.is_said or self.device.type != "cpu" or not first or row[RATE] >= SLOW * first:
            return
        self.is_said = True
        n = torch.get_num_threads()
        remedy = "it will be faster when that has ended"
        if n > 1:
            remedy = (
                f"{n} threads wait for each other there. Stop this run (Ctrl-C or SIGTERM saves it), then type the same command "
                f"with trainer.threads={max(1, n // 2)}, which goes on here"
            )
        log.warning(
            "epoch %d ran at %s events/s and the first at %s: other programs are using the CPU, and %s",
            row["epoch"], f"{row[RATE]:,.0f}", f"{first:,.0f}", remedy,
        )  # fmt: skip
