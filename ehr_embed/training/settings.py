"""The settings of the training loop, which are checked when they are built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ehr_embed.core.errors import UserError, check_range, unknown_name
from ehr_embed.core.threads import AUTO, check_threads
from ehr_embed.data.batches import BUCKET_BATCHES
from ehr_embed.data.device_events import DATA_DEVICES
from ehr_embed.training.optimizer import check_optimizer, with_options
from ehr_embed.training.precision import choose_precision
from ehr_embed.training.processes import ACCELERATORS, MAX_DEVICES, MAX_NODES, STRATEGIES, Processes, launch
from ehr_embed.training.protocol import MakesOptimizer, Schedule
from ehr_embed.training.schedules import BY_NAME, Plateau

KEPT = ("best", "last")
TEACHERS = ("gbm",)
MAX_BOOTSTRAP, MAX_WORKERS = 1_000_000, 1024


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of the training loop; conf/trainer/default.yaml explains each key.

    `schedule` may be one of the names that earlier versions knew, and `betas` and `scheduler_patience` are where these versions had
    options of the optimizer and of the schedule; they become part of `optimizer` and `schedule`.

    Raises:
        UserError: a setting is unknown or out of range.
    """

    epochs: int = 50
    batch_size: int | None = 32
    batch_tokens: int = 16_384
    bucket_batches: int = BUCKET_BATCHES
    accumulate: int = 1
    learning_rate: float = 1e-4
    min_learning_rate: float = 1e-6
    weight_decay: float = 0.01
    optimizer: MakesOptimizer = torch.optim.AdamW
    betas: Sequence[float] | None = None
    ema: float | None = None
    teacher: str | None = None
    teacher_share: float = 0.5
    warmup_steps: float = 100
    schedule: Schedule | str = field(default_factory=Plateau)
    scheduler_patience: int | None = None
    clip_norm: float = 1.0
    patience: int | None = 10
    keep: str = "best"
    save_every: int = 10
    checkpoint_every: int | None = 500
    n_bootstrap: int = 1000
    num_workers: int = 0
    data_device: str = "auto"
    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"
    precision: str = "auto"
    freeze: str | None = None
    layer_decay: float = 1.0
    compile: bool = False
    profile: bool = False
    threads: int | str = AUTO

    def __post_init__(self) -> None:
        self._take_older_keys()
        if not isinstance(self.schedule, Schedule):
            raise UserError(
                f"trainer.schedule={self.schedule}: expected a mapping with _target_ that names a class with `after_warmup`, as "
                "the files of conf/trainer/schedule/ are. Type: trainer/schedule=cosine"
            )
        check_optimizer(self.optimizer, weight_decay=self.weight_decay)
        choose_precision(self.precision, self.accelerator)
        if self.keep not in KEPT:
            raise unknown_name("trainer.keep", self.keep, KEPT)
        if self.keep == "last" and self.patience is not None:
            raise UserError(
                f"trainer.keep=last with trainer.patience={self.patience}: where tuning chooses no epoch, it does not end training "
                "either. Type: trainer.patience=null"
            )
        if self.ema is not None and not 0 <= self.ema < 1:
            raise UserError(f"trainer.ema={self.ema}: expected a decay in [0, 1) such as 0.99, or null.")
        if self.ema is not None and self.strategy == "fsdp":
            raise UserError(
                "trainer.ema with trainer.strategy=fsdp: averages of weights that are spread are not supported. "
                "Type: trainer.ema=null or trainer.strategy=ddp"
            )
        if self.teacher not in (None, *TEACHERS):
            raise unknown_name("trainer.teacher", self.teacher, ["null", *TEACHERS])
        if not 0 <= self.teacher_share <= 1:
            raise UserError(f"trainer.teacher_share={self.teacher_share}: expected a share in [0, 1].")
        if self.freeze not in (None, "body"):
            raise unknown_name("trainer.freeze", self.freeze, ["null", "body"])
        if not 0 < self.layer_decay <= 1:
            raise UserError(
                f"trainer.layer_decay={self.layer_decay}: expected a factor in (0, 1]; 1 = one rate for all."
            )
        for name in (
            "warmup_steps",
            "learning_rate",
            "min_learning_rate",
            "weight_decay",
            "clip_norm",
        ):
            check_range(f"trainer.{name}", getattr(self, name), 0)
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            raise UserError(
                f"trainer.warmup_steps={self.warmup_steps}: expected a whole number of steps, or a share of all steps below 1."
            )
        check_threads("trainer.threads", self.threads)
        check_range("trainer.n_bootstrap", self.n_bootstrap, 0, MAX_BOOTSTRAP)
        check_range("trainer.num_workers", self.num_workers, 0, MAX_WORKERS, remedy="0 builds batches in this process.")
        if self.data_device not in DATA_DEVICES:
            raise unknown_name("trainer.data_device", self.data_device, DATA_DEVICES)
        if self.accelerator not in ACCELERATORS:
            raise unknown_name("trainer.accelerator", self.accelerator, ACCELERATORS)
        check_range("trainer.devices", self.devices, 1, MAX_DEVICES)
        check_range("trainer.nodes", self.nodes, 1, MAX_NODES)
        if self.strategy not in STRATEGIES:
            raise unknown_name("trainer.strategy", self.strategy, STRATEGIES)
        if self.strategy == "fsdp" and self.precision == "16-mixed":
            raise UserError(
                "trainer.strategy=fsdp with trainer.precision=16-mixed: the gradient scaling of float16 does not work "
                "with sharded gradients. Type: trainer.precision=bf16-mixed"
            )
        if self.epochs < 0:
            raise UserError(f"trainer.epochs={self.epochs}: expected 0 (only evaluate what init_from names) or more.")
        for name in ("batch_size", "batch_tokens", "bucket_batches", "accumulate", "patience", "save_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"trainer.{name}={getattr(self, name)}: expected 1 or more.")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise UserError(f"trainer.checkpoint_every={self.checkpoint_every}: expected 1 or more steps, or null.")

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
        if self.scheduler_patience is not None:
            check_range("trainer.scheduler_patience", self.scheduler_patience, 0)
            if isinstance(schedule, Plateau):
                schedule = replace(schedule, patience=self.scheduler_patience)
        if self.betas is not None and callable(optimizer):
            if len(self.betas) != 2 or any(not 0 <= beta < 1 for beta in self.betas):
                raise UserError(f"trainer.betas={list(self.betas)}: expected two numbers in [0, 1), as in [0.9,0.999].")
            optimizer = with_options(optimizer, betas=tuple(self.betas))
        for name, value in (
            ("schedule", schedule),
            ("optimizer", optimizer),
            ("betas", None),
            ("scheduler_patience", None),
        ):
            object.__setattr__(self, name, value)

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
