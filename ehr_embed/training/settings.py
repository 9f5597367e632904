"""The settings of the training loop, which are checked when they are built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from annotated_types import Len
from pydantic import Field

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.settings import Count, NotNegative, OneOf, Share, ShareBelow1, Told, check_settings
from ehr_embed.core.threads import Threads
from ehr_embed.data.bucket_sampler import BUCKET_BATCHES
from ehr_embed.data.device_events import DataDevice
from ehr_embed.training.optimizer import check_optimizer, with_options
from ehr_embed.training.precision import Precision, choose_precision
from ehr_embed.training.processes import (
    Accelerator,
    Devices,
    Nodes,
    Processes,
    StrategyName,
    launch,
)
from ehr_embed.training.protocol import MakesOptimizer, Schedule
from ehr_embed.training.schedules import BY_NAME, Plateau

AUTO = "auto"
N_BATCH_TOKENS = 16_384
"""Events per batch unless a setting says another number, and what `batch_tokens=auto` stands for on a CPU."""
BatchTokens = Annotated[
    Literal["auto"] | Annotated[int, Field(ge=1)],
    Told("auto, or 1 or more events", example="auto", remedy="auto chooses by the memory of the GPU."),
]

Compile = Annotated[Literal["head"] | bool, Told("true, false or head", example="false")]
Prefetch = Annotated[Literal["auto"] | bool, Told("auto, true or false", example="auto")]


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of the training loop; conf/trainer/default.yaml explains each key.

    `schedule` may be one of the names that earlier versions knew, and `betas` and `scheduler_patience` are where these versions had
    options of the optimizer and of the schedule; they become part of `optimizer` and `schedule`.

    Raises:
        UserError: a setting is unknown or out of range.
    """

    epochs: Annotated[int, Field(ge=0), Told("0 (only evaluate what init_from names) or more", example="50")] = 50
    min_steps: Annotated[Count | None, Told("1 or more steps, or null", example="300")] = None
    batch_size: Count | None = 32
    batch_tokens: BatchTokens = N_BATCH_TOKENS
    bucket_batches: Count = BUCKET_BATCHES
    accumulate: Count = 1
    learning_rate: NotNegative = 1e-4
    min_learning_rate: NotNegative = 1e-6
    weight_decay: NotNegative = 0.01
    optimizer: MakesOptimizer = torch.optim.AdamW
    betas: (
        Annotated[
            Sequence[ShareBelow1], Len(2, 2), Told("two numbers in [0, 1), as in [0.9,0.999]", example="[0.9,0.999]")
        ]
        | None
    ) = None
    pull: NotNegative = 0.0
    ema: Annotated[ShareBelow1 | None, Told("a decay in [0, 1) such as 0.99, or null", example="null")] = None
    teacher: Annotated[str, OneOf("gbm")] | None = None
    teacher_share: Share = 0.5
    teacher_trees: Annotated[Count | None, Told("1 or more trees, or null", example="330")] = 330
    warmup_steps: NotNegative = 100
    schedule: Schedule | str = field(default_factory=Plateau)
    scheduler_patience: Annotated[int, Field(ge=0)] | None = None
    clip_norm: NotNegative = 1.0
    patience: Count | None = 10
    keep: Annotated[str, OneOf("best", "last")] = "best"
    save_every: Count = 10
    checkpoint_every: Annotated[Count | None, Told("1 or more steps, or null", example="500")] = 500
    n_bootstrap: Annotated[int, Field(ge=0, le=1_000_000)] = 1000
    num_workers: Annotated[int, Field(ge=0, le=1024), Told(remedy="0 builds batches in this process.")] = 0
    data_device: DataDevice = "auto"
    prefetch: Prefetch = "auto"
    accelerator: Accelerator = "auto"
    devices: Devices = 1
    nodes: Nodes = 1
    strategy: StrategyName = "auto"
    precision: Precision = "auto"
    freeze: Annotated[str, OneOf("body")] | None = None
    layer_decay: Annotated[float, Field(gt=0, le=1), Told("a factor in (0, 1]; 1 = one rate for all")] = 1.0
    compile: Compile = False
    profile: bool = False
    threads: Threads = "auto"

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "trainer", only_rules=True)
        self._take_older_keys()
        if not isinstance(self.schedule, Schedule):
            raise UserError(
                f"trainer.schedule={self.schedule}: expected a mapping with _target_ that names a class with `after_warmup`, as "
                "the files of conf/trainer/schedule/ are. Type: trainer/schedule=cosine"
            )
        check_optimizer(self.optimizer, weight_decay=self.weight_decay)
        if self.keep == "last" and self.patience is not None:
            raise UserError(
                f"trainer.keep=last with trainer.patience={self.patience}: if tuning does not choose the epoch, it cannot stop "
                "training early either. Type: trainer.patience=null"
            )
        if self.ema is not None and self.strategy == "fsdp":
            raise UserError(
                "trainer.ema with trainer.strategy=fsdp: averages of weights that are spread over devices are not supported. "
                "Type: trainer.ema=null or trainer.strategy=ddp"
            )
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            raise UserError(
                f"trainer.warmup_steps={self.warmup_steps}: expected a whole number of steps, or a share of all steps below 1."
            )
        if self.pull and self.strategy == "fsdp":
            raise UserError(
                "trainer.pull with trainer.strategy=fsdp: a pull of weights that are spread over devices is not supported. "
                "Type: trainer.pull=0 or trainer.strategy=ddp"
            )
        if self.strategy == "fsdp" and self.batch_tokens == AUTO:
            raise UserError(
                "trainer.batch_tokens=auto with trainer.strategy=fsdp: a step is tried on one device, which may not hold the whole "
                f"model. Type: trainer.batch_tokens={N_BATCH_TOKENS}"
            )
        if self.strategy == "fsdp" and self.precision == "16-mixed":
            raise UserError(
                "trainer.strategy=fsdp with trainer.precision=16-mixed: the gradient scaling of float16 does not work "
                "with sharded gradients. Type: trainer.precision=bf16-mixed"
            )

    def _take_older_keys(self) -> None:
        """Put the values of the keys of earlier versions where they belong; `core.moved` does the same for configurations."""
        schedule, optimizer = self.schedule, self.optimizer
        if isinstance(schedule, str):
            if schedule not in BY_NAME:
                raise unknown_name(
                    "trainer.schedule",
                    schedule,
                    BY_NAME,
                    f"Any other by its YAML in trainer/schedule/: trainer/schedule={schedule}",
                )
            schedule = BY_NAME[schedule]()
        if self.scheduler_patience is not None and isinstance(schedule, Plateau):
            schedule = replace(schedule, patience=self.scheduler_patience)
        if self.betas is not None and callable(optimizer):
            optimizer = with_options(optimizer, betas=tuple(self.betas))
        for name, value in (
            ("schedule", schedule),
            ("optimizer", optimizer),
            ("betas", None),
            ("scheduler_patience", None),
        ):
            object.__setattr__(self, name, value)

    def epochs_of(self, n_batches: int) -> int:
        """Return the largest number of epochs of `n_batches` batches: `epochs`, or as many as `min_steps` steps take.

        >>> settings = TrainerSettings(epochs=6, min_steps=100)
        >>> settings.epochs_of(7), settings.epochs_of(50), TrainerSettings(epochs=0, min_steps=100).epochs_of(7)
        (15, 6, 0)
        """
        if self.min_steps is None or self.epochs == 0:
            return self.epochs
        return max(self.epochs, -(-self.min_steps // self.steps_of(n_batches)))

    def steps_of(self, n_batches: int) -> int:
        """Return the number of optimizer steps of an epoch of `n_batches` batches, at least 1."""
        return max(1, -(-n_batches // self.accumulate))

    @property
    def batch_key(self) -> str:
        """Return the name of the setting that bounds the size of a batch."""
        return "trainer.batch_tokens" if self.batch_size is None else "trainer.batch_size"

    @property
    def most_batch_tokens(self) -> int:
        """Return the most events per batch; for `auto`, before `training.batch_tokens` has chosen a number, `N_BATCH_TOKENS`."""
        return N_BATCH_TOKENS if self.batch_tokens == AUTO else int(self.batch_tokens)

    def launch(self) -> Processes:
        """Join the processes that train together and choose their devices, see `ehr_embed.training.processes.launch`."""
        return launch(
            accelerator=self.accelerator,
            precision=choose_precision(self.precision, self.accelerator),
            devices=self.devices,
            nodes=self.nodes,
            strategy=self.strategy,
        )
