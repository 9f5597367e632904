"""Starts and connects the processes of one run, which are started here, by torchrun or by Slurm.

Every process builds the same model and reads the same store, and trains on its own part of the batches. Rank 0 writes
the files.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from typing import Annotated, Any, Literal, TypeVar, cast

import cloudpickle
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from lightning_fabric.strategies import DDPStrategy, Strategy
from pydantic import Field
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ehr_embed.core.errors import UserError
from ehr_embed.core.launchers import end_with_parent, is_torchrun, n_launched
from ehr_embed.core.settings import OneOf
from ehr_embed.core.stopping import Stopped, StopRequest, stop_requests, stopped_by
from ehr_embed.models.protocol import declarations
from ehr_embed.training.precision import precision_plugin
from ehr_embed.training.sharding import FullyShardedStrategy

T = TypeVar("T")
StrategyName = Annotated[str, OneOf("auto", "ddp", "fsdp")]
Accelerator = Annotated[str, OneOf("auto", "cpu", "cuda", "gpu")]
Devices = Annotated[int, Field(ge=1, le=1024)]
Nodes = Annotated[int, Field(ge=1, le=65_536)]
PACKAGE = __name__.partition(".")[0]
POLL_S = 0.5
GRACE_S = 60.0
"""Seconds between the failure of the first process and the end of the others, in which a tracker can be closed."""
END_S = 5.0
"""Seconds between SIGTERM and SIGKILL."""
TIMEOUT = timedelta(days=7)
"""Longest wait of a process for the others, which wait while rank 0 builds the store, embeds, evaluates and plots."""


class Processes:
    """Exchanges values between the processes of a run, over the network between hosts; a single process keeps its own.

    Args:
        fabric: a Fabric that was launched.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.rank, self.size = fabric, fabric.global_rank, fabric.world_size
        # A group of its own on the hosts, because a message through the GPUs' group would wait for their queued work.
        self._group = distributed.new_group(backend="gloo", timeout=TIMEOUT) if self.size > 1 else None
        self._before: tuple[Any, Tensor] | None = None

    @property
    def is_first(self) -> bool:
        """Return whether this process is rank 0, which writes the files."""
        return self.rank == 0

    def refuse_several(self, what: str, remedy: str = "Type: trainer.devices=1") -> None:
        """Refuse several processes for what one process does.

        Args:
            what: subject and verb of the sentence, such as "GBM is fitted".
            remedy: what to type.

        Raises:
            UserError: the run has several processes.
        """
        if self.size > 1:
            raise UserError(f"{what} in one process, but this run has {self.size}. {remedy}")

    def gather(self, value: T) -> list[T]:
        """Return the value of every rank, in the order of the ranks."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self._group)
        return values

    def largest(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        if self._group is None:
            return number
        distributed.all_reduce(found := torch.tensor(number), op=distributed.ReduceOp.MAX, group=self._group)
        return int(found)

    def largest_before(self, number: int) -> int:
        """Return the largest of the numbers that the ranks gave at the previous call, 0 at the first; a single process gets its own
        number back at once.

        The exchange goes on while the caller computes, so that no rank waits for the others in each step; all get the same answer
        at the same call.
        """
        if self._group is None:
            return number
        before, found = self._before, torch.tensor(number)
        work = distributed.all_reduce(found, op=distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._before = (work, found)
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])

    def means(self, numbers: Sequence[float]) -> list[float]:
        """Return the mean of each number over the ranks."""
        if self._group is None:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(found, group=self._group)
        return (found / self.size).tolist()

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks, without making the host wait; `x` may be overwritten."""
        if self.size > 1:
            distributed.all_reduce(x)
        return x

    def wrap(self, model: nn.Module, task: Any) -> Any:
        """Return the model as it trains on the task together with the other processes' models."""
        if isinstance(strategy := self.fabric.strategy, _OwnDDP):
            strategy.learns_all = learns_all(model, task)
        return self.fabric.setup_module(model)

    def share(self, model: nn.Module) -> None:
        """Give every rank the weights and buffers of rank 0, because a fit to vectors may differ between machines."""
        if self._group is not None:
            for x in (*model.parameters(), *model.buffers()):
                distributed.broadcast(whole := x.detach().contiguous(), src=0, group=self._group)
                x.detach().copy_(whole)

    def first(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and then on the others, which find the files that it made; return its result."""
        made: list[T] = []
        self.on_first(lambda: made.append(function()))
        return made[0] if made else function()

    def on_first(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its result on every rank.

        Raises:
            Exception: the error that `function` raised on rank 0, on every rank.
        """
        if self._group is None:
            return function()
        result, failure = None, None
        if self.is_first:
            try:
                result = function()
            except Exception as error:  # the other ranks must get an answer, or they would wait without end
                failure = error
        sent = [result, None if failure is None else _portable(failure)]
        distributed.broadcast_object_list(sent, src=0, group=self._group)
        if (raised := failure or sent[1]) is not None:
            raise cast("Exception", raised)
        return cast("T", sent[0])


def launch(*, accelerator: str, precision: str, devices: int, nodes: int, strategy: str) -> Processes:
    """Join the processes of this run and choose their devices.

    Args:
        accelerator, devices, nodes, strategy: the keys of that name in conf/trainer/default.yaml.
        precision: one of `PRECISIONS` except `auto`.

    Raises:
        UserError: the number of processes or GPUs does not match `devices` and `nodes`.
    """
    n = devices * nodes
    if (launched := n_launched()) > 1 and launched != n:
        raise UserError(
            f"this is one of {launched} processes, but trainer.devices={devices} x trainer.nodes={nodes} is {n}: each "
            "process would train a run of its own in the same folder. Set both keys to the numbers given to torchrun "
            "or srun, or start one process"
        )
    if n > 1 and launched == 1:
        raise UserError(
            f"trainer.devices={devices} and trainer.nodes={nodes} need {n} processes, and only this one runs. "
            f"On each node type: torchrun --nnodes={nodes} --nproc-per-node={devices} --rdzv-backend=c10d "
            "--rdzv-endpoint=HOST:PORT train.py ..."
        )
    if accelerator == "auto":  # Fabric's own "auto" would take Apple's GPU, which has no float64
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator in ("cuda", "gpu") and (found := torch.cuda.device_count()) < devices:
        remedy = "Type: trainer.devices=FEWER, or trainer.accelerator=cpu; in a search n_jobs=1 leaves a trial all GPUs"
        if launched > 1:
            remedy = "Let each task see all GPUs of its machine: srun --gpus-per-node=N without --gpus-per-task"
        raise UserError(
            f"trainer.devices={devices} on GPUs, but torch finds {found} here, and each process needs its own. {remedy}"
        )
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    plugin = precision_plugin(accelerator, precision)
    plugins: list[Any] = [] if plugin is None else [plugin]
    if n > 1:  # set here, because Fabric would take an interactive step of Slurm for a single process
        plugins.append(TorchElasticEnvironment() if is_torchrun() else SLURMEnvironment(auto_requeue=False))
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=_strategy(strategy, n),
            precision="32-true" if plugin is None else None,
            plugins=plugins,
        )
    except (RuntimeError, ValueError) as error:
        if n == 1:
            raise
        raise UserError(f"the processes of this run do not fit together: {' '.join(str(error).split())}") from error
    fabric.launch()
    return Processes(fabric)


def _strategy(name: str, n_processes: int) -> Strategy | Literal["auto"]:
    if n_processes == 1:
        return "auto"
    if name == "fsdp":
        return FullyShardedStrategy(n_processes)
    return _OwnDDP(gradient_as_bucket_view=True, broadcast_buffers=False)  # buffers never change


class _OwnDDP(DDPStrategy):
    """DDP that looks for parameters without a gradient, a walk through the graph of each step, only where `learns_all` is False."""

    learns_all = False

    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        """Wrap the model."""
        self._ddp_kwargs["find_unused_parameters"] = not self.learns_all
        return super().setup_module(module)


def learns_all(model: nn.Module, task: Any) -> bool:
    """Return whether each parameter is sure to have a gradient in each step.

    This package's models have one in the steps of its tasks (`tests/training/test_no_wait.py`), unless they declare otherwise. A
    model of another package may leave parameters unused in a batch on some ranks, and a task of another package may leave some of
    the model's outputs out of its loss.
    """
    are_own = all(type(x).__module__.partition(".")[0] == PACKAGE for x in (model, task))
    return are_own and declarations(model).learns_all


def run_ranks(function: Callable[[], T], n: int) -> T:
    """Call `function` in `n` processes on this machine, with the environment variables that torchrun sets.

    A signal to this process reaches all of them. When one process fails, the others are ended.

    Returns:
        The result of rank 0.

    Raises:
        Exception: the error of the first process that failed.
        UserError: a process was killed.
    """
    context, port = get_context("spawn"), find_free_network_port()
    payload = cloudpickle.dumps(function)
    processes, results = [], {}
    # This hides DDP's advice on `find_unused_parameters`; each process reads the variable when it loads torch.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with stop_requests(is_deferred=True) as stop:
        try:
            for rank in range(n):
                receive, send = context.Pipe(duplex=False)
                process = context.Process(target=_rank, args=(payload, rank, n, port, send), name=f"rank {rank}")
                process.start()
                send.close()
                processes.append(process)
                results[receive] = rank
            return cast("T", _wait(results, processes, stop))
        finally:
            _end(processes)


def _end(processes: list[Any]) -> None:
    """End the processes that still run: with SIGTERM, so that trackers are closed, and then with SIGKILL."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    deadline = time.monotonic() + END_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()


def _wait(waiting: dict[Connection, int], processes: list[Any], stop: StopRequest) -> Any:
    """Wait for all processes and return the result of rank 0, or raise the error of the first process that failed."""
    waiting, result, first_error, deadline, is_told = dict(waiting), None, None, float("inf"), False
    while waiting and time.monotonic() < deadline:
        if stop.name and not is_told:
            for process in processes:
                process.terminate()  # harmless after a terminal's Ctrl-C, which has reached the processes already
            is_told = True
        for receive in connection.wait(list(waiting), timeout=POLL_S):
            rank = waiting.pop(cast("Connection", receive))
            try:
                value, error = cast("Connection", receive).recv()
            except EOFError:
                processes[rank].join()
                value, error = None, _killed(rank, processes[rank].exitcode)
                if stop.name:  # the signal came before Python in the process could handle it
                    error = stopped_by(stop.name)
            if rank == 0:
                result = value
            if error is not None and first_error is None:
                first_error, deadline = error, time.monotonic() + GRACE_S
    if first_error is not None:
        raise first_error
    for process in processes:
        process.join(GRACE_S)
    return result


def _killed(rank: int, code: int | None) -> UserError:
    why = f"was killed by signal {-code}" if code and code < 0 else f"ended with exit code {code}"
    if code == -9:
        why += ", as Linux does when memory runs out"
    return UserError(
        f"the process of rank {rank} {why}, so the others cannot go on. The same command continues from the last checkpoint; with "
        "too little memory type: resume=force trainer.batch_tokens=SMALLER, or trainer.devices=FEWER"
    )


def _rank(payload: bytes, rank: int, n: int, port: int, send: Connection) -> None:
    """Run as one process of `run_ranks`, and send the result or the error to its parent."""
    end_with_parent()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(n),
        LOCAL_WORLD_SIZE=str(n),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID=str(port),
    )
    torch.set_num_threads(max(1, torch.get_num_threads() // n))
    result, failure = None, None
    try:
        result = cloudpickle.loads(payload)()
    except (Exception, KeyboardInterrupt) as error:
        failure = _portable(error)
    send.send((result, failure))
    send.close()
    if distributed.is_initialized() and failure is None:
        distributed.destroy_process_group()


def _portable(error: BaseException) -> BaseException:
    """Return an error that another process can unpickle, with its traceback unless it is a message for the user."""
    if isinstance(error, UserError | Stopped):
        return error
    where = "".join(traceback.format_exception(error))
    try:
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:  # the exceptions of some libraries cannot be unpickled
        return RuntimeError(where)
    error.add_note(where)
    return error
