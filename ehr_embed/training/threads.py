"""The number of CPU threads of one training run: the same in all its processes and in all its starts."""

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
"""Share of the first epoch's events per second below which an epoch is remarked on."""


def use_threads_of_run(settings: TrainerSettings, processes: Processes, kept: int | None) -> None:
    """Choose the number of threads that every process of a run computes with, as `core.threads.choose` does.

    On a GPU, `trainer.threads=auto` leaves torch's number as it is.

    Args:
        processes: all of them call this function; they agree on the least number that any of them chose.
        kept: the number that the run's checkpoint has, None without a checkpoint.
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
        device: where the model is trained.
        history: the rows of the epochs before, of earlier starts too.
    """

    device: torch.device
    history: Sequence[Mapping[str, Any]]
    is_said: bool = False

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Judge an epoch's row of metrics."""
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
