"""The processes of one run: started here or by torchrun or Slurm, and what they tell each other.

Each builds the same model and reads the same store; of every group of batches each has its own. Rank 0 writes the files.
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
from typing import Any, Literal, TypeVar, cast

import cloudpickle
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from lightning_fabric.strategies import DDPStrategy, Strategy
from torch import Tensor, distributed, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.launchers import end_with_parent, is_torchrun, n_launched
from ehr_embed.core.stopping import Stopped, StopRequest, stop_requests, stopped_by
from ehr_embed.training.precision import precision_plugin
from ehr_embed.training.sharding import FullyShardedStrategy

T = TypeVar("T")
STRATEGIES = ("auto", "ddp", "fsdp")
ACCELERATORS = ("auto", "cpu", "cuda", "gpu")
MAX_DEVICES, MAX_NODES = 1024, 65_536
POLL_S = 0.5
GRACE_S = 60.0
"""From the first process that failed to the end of the others: time to close a tracker, or to wait in vain for the first."""
END_S = 5.0
"""From SIGTERM to SIGKILL."""
TIMEOUT = timedelta(days=7)
"""Longest wait on the host: rank 0 builds the store, embeds, evaluates and draws while the others wait."""


class Processes:
    """What the processes of a run tell each other, over the network between hosts; with one process, itself.

    Args:
        fabric: launched.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.rank, self.size = fabric, fabric.global_rank, fabric.world_size
        # A group of its own, since a word through the GPUs' would wait for the work queued on them.
        self._group = distributed.new_group(backend="gloo", timeout=TIMEOUT) if self.size > 1 else None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self._group)
        return values

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        if self._group is None:
            return number
        distributed.all_reduce(found := torch.tensor(number), op=distributed.ReduceOp.MAX, group=self._group)
        return int(found)

    def means(self, numbers: Sequence[float]) -> list[float]:
        """The mean over the ranks of each number."""
        if self._group is None:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(found, group=self._group)
        return (found / self.size).tolist()

    def total(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks of a tensor on their devices, which may be overwritten; the host does not wait for it."""
        if self.size > 1:
            distributed.all_reduce(x)
        return x

    def share(self, model: nn.Module) -> None:
        """Give every rank the weights and buffers of rank 0: what was fitted to vectors may differ between kinds of machines."""
        if self._group is not None:
            for x in (*model.parameters(), *model.buffers()):
                distributed.broadcast(whole := x.detach().contiguous(), src=0, group=self._group)
                x.detach().copy_(whole)

    def first(self, function: Callable[[], T]) -> T:
        """What `function` returns on this rank, called on rank 0 before the others, which find what it has made."""
        made: list[T] = []
        self.on_first(lambda: made.append(function()))
        return made[0] if made else function()

    def on_first(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, on every rank.

        Raises:
            Exception: on every rank, what `function` raised.
        """
        if self._group is None:
            return function()
        result, failure = None, None
        if self.is_first:
            try:
                result = function()
            except Exception as error:  # none may wait for an answer that will not come
                failure = error
        sent = [result, None if failure is None else _portable(failure)]
        distributed.broadcast_object_list(sent, src=0, group=self._group)
        if (raised := failure or sent[1]) is not None:
            raise cast("Exception", raised)
        return cast("T", sent[0])


def launch(*, accelerator: str, precision: str, devices: int, nodes: int, strategy: str) -> Processes:
    """Join this run's processes (of one, alone) and choose its devices; `trainer.*` in conf/ says what the words mean.

    Args:
        precision: not `auto`.

    Raises:
        UserError: processes and devices that do not fit together.
    """
    n = devices * nodes
    if (launched := n_launched()) > 1 and launched != n:
        raise UserError(
            f"this is one of {launched} processes, but trainer.devices={devices} x trainer.nodes={nodes} is {n}: each would train "
            "a run of its own in the same folder. Type both as torchrun or srun has them, or start one process"
        )
    if n > 1 and launched == 1:
        raise UserError(
            f"trainer.devices={devices} and trainer.nodes={nodes} need {n} processes, and this is one alone. On each node type: "
            f"torchrun --nnodes={nodes} --nproc-per-node={devices} --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT train.py ..."
        )
    if accelerator == "auto":  # Fabric's would take Apple's GPU, which has no float64
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
    if n > 1:  # said, since Fabric would take an interactive step of Slurm's for a process alone
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
    # A user's model may leave parameters unused in a batch, on one rank and not on another. Buffers are never learned.
    return DDPStrategy(find_unused_parameters=True, gradient_as_bucket_view=True, broadcast_buffers=False)


def run_ranks(function: Callable[[], T], n: int) -> T:
    """Call `function` in `n` processes of this machine, in an environment as torchrun gives it.

    A signal to this process reaches all of them. When one fails, the others are ended.

    Returns:
        What rank 0 returned.

    Raises:
        Exception: what the first that failed raised.
        UserError: one was killed.
    """
    context, port = get_context("spawn"), find_free_network_port()
    payload = cloudpickle.dumps(function)
    processes, results = [], {}
    # DDP's advice on `find_unused_parameters`, in every process; read when torch is loaded there.
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
    """SIGTERM to what still runs, so that trackers are closed, then SIGKILL."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    deadline = time.monotonic() + END_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()


def _wait(waiting: dict[Connection, int], processes: list[Any], stop: StopRequest) -> Any:
    """Rank 0's result, once all have ended; raises what the first that failed raised."""
    waiting, result, first_error, deadline, is_told = dict(waiting), None, None, float("inf"), False
    while waiting and time.monotonic() < deadline:
        if stop.name and not is_told:
            for process in processes:
                process.terminate()  # a terminal's Ctrl-C has reached them already, and SIGTERM may come twice
            is_told = True
        for receive in connection.wait(list(waiting), timeout=POLL_S):
            rank = waiting.pop(cast("Connection", receive))
            try:
                value, error = cast("Connection", receive).recv()
            except EOFError:
                processes[rank].join()
                value, error = None, _killed(rank, processes[rank].exitcode)
                if stop.name:  # which came before Python listened there
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
    """Body of a process of `run_ranks`."""
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
    """An error as another process can read it: with its traceback, unless it has a message for the user."""
    if isinstance(error, UserError | Stopped):
        return error
    where = "".join(traceback.format_exception(error))
    try:
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:  # whatever a library's exception needs to be built again
        return RuntimeError(where)
    error.add_note(where)
    return error
