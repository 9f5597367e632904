"""The settings of the training loop, which are checked when they are built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Len
from pydantic import Field

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import Count, NotNegative, OneOf, Share, ShareBelow1, Told, check_settings
from ehr_embed.core.threads import Threads
from ehr_embed.data.device_events import DataDevice
from ehr_embed.training.optimizer import SCHEDULES
from ehr_embed.training.precision import Precision, choose_precision
from ehr_embed.training.processes import (
    Accelerator,
    Devices,
    Nodes,
    Processes,
    StrategyName,
    launch,
)


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of the training loop; conf/trainer/default.yaml explains each key.

    Raises:
        UserError: a setting is unknown or out of range.
    """

    epochs: Annotated[int, Field(ge=0), Told("0 (only evaluate what init_from names) or more", example="50")] = 50
    batch_size: Count | None = 32
    batch_tokens: Count = 16_384
    accumulate: Count = 1
    learning_rate: NotNegative = 1e-4
    min_learning_rate: NotNegative = 1e-6
    weight_decay: NotNegative = 0.01
    betas: Annotated[
        Sequence[ShareBelow1], Len(2, 2), Told("two numbers in [0, 1), as in [0.9,0.999]", example="[0.9,0.999]")
    ] = (0.9, 0.999)
    ema: Annotated[ShareBelow1 | None, Told("a decay in [0, 1) such as 0.99, or null", example="null")] = None
    teacher: Annotated[str, OneOf("gbm")] | None = None
    teacher_share: Share = 0.5
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    schedule: Annotated[str, OneOf(*SCHEDULES)] = "plateau"
    scheduler_patience: Annotated[int, Field(ge=0)] = 3
    clip_norm: NotNegative = 1.0
    patience: Count | None = 10
    keep: Annotated[str, OneOf("best", "last")] = "best"
    save_every: Count = 10
    checkpoint_every: Annotated[Count | None, Told("1 or more steps, or null", example="500")] = 500
    n_bootstrap: Annotated[int, Field(ge=0, le=1_000_000)] = 1000
    num_workers: Annotated[int, Field(ge=0, le=1024), Told(remedy="0 builds batches in this process.")] = 0
    data_device: DataDevice = "auto"
    accelerator: Accelerator = "auto"
    devices: Devices = 1
    nodes: Nodes = 1
    strategy: StrategyName = "auto"
    precision: Precision = "auto"
    freeze: Annotated[str, OneOf("body")] | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1), Told("a factor in (0, 1]; 1 = one rate for all")] = 1.0
    compile: bool = False
    profile: bool = False
    threads: Threads = "auto"

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "trainer", only_rules=True)
        if self.keep == "last" and self.patience is not None:
            raise UserError(
                f"trainer.keep=last with trainer.patience={self.patience}: where tuning chooses no epoch, it does not end training "
                "either. Type: trainer.patience=null"
            )
        if self.ema is not None and self.strategy == "fsdp":
            raise UserError(
                "trainer.ema with trainer.strategy=fsdp: averages of weights that are spread are not supported. "
                "Type: trainer.ema=null or trainer.strategy=ddp"
            )
        if self.strategy == "fsdp" and self.precision == "16-mixed":
            raise UserError(
                "trainer.strategy=fsdp with trainer.precision=16-mixed: the gradient scaling of float16 does not work "
                "with sharded gradients. Type: trainer.precision=bf16-mixed"
            )

    @property
    def batch_key(self) -> str:
        """Return the name of the setting that bounds the size of a batch."""
        return "trainer.batch_tokens" if self.batch_size is None else "trainer.batch_size"

    def launch(self) -> Processes:
        """Join the processes that train together and choose their devices, see `ehr_embed.training.processes.launch`."""
        return launch(
            accelerator=self.accelerator,
            precision=choose_precision(self.precision, self.accelerator),
            devices=self.devices,
            nodes=self.nodes,
            strategy=self.strategy,
        )
