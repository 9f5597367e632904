"""A model whose weights, gradients and optimizer state are spread over the processes (fully sharded data parallel).

`torch.distributed.fsdp.fully_shard` (FSDP2; Zhao et al. 2023, arXiv:2304.11277): each process keeps a part of every tensor, a
DTensor, and has the whole of a block while it computes with it. Checkpoints hold whole tensors, as those of one process do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning_fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


class FullyShardedStrategy(ModelParallelStrategy):
    """Shards every block of a model, and the rest of it as one.

    Args:
        n_processes: over which to spread.
    """

    def __init__(self, n_processes: int) -> None:
        super().__init__(shard, data_parallel_size=n_processes, tensor_parallel_size=1)

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_norm: float | int,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clip by the norm over all gradients, spread or not: torch's own does not take both together."""
        self.precision.unscale_gradients(optimizer)
        parameters: list[Tensor] = [p for p in self.precision.main_params(optimizer) if p.grad is not None]
        spread, others = _divided(parameters)
        norms = []
        for part in (spread, others):
            gradients = [p.grad for p in part if p.grad is not None]
            if gradients:
                norms.append(whole_tensor(torch.nn.utils.get_total_norm(gradients, norm_type, error_if_nonfinite)))
        total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        for part in (spread, others):
            torch.nn.utils.clip_grads_with_norm_(part, max_norm, total)
        return total


def _divided(tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those that are spread, and the others."""
    spread: list[Tensor] = []
    others: list[Tensor] = []
    for x in tensors:
        (spread if isinstance(x, DTensor) else others).append(x)
    return spread, others


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Spread a model over `data_parallel`: each member of its module lists, innermost first, then what is left."""
    data_parallel = mesh["data_parallel"]
    for block in blocks_of(model):
        fully_shard(block, mesh=data_parallel)
    fully_shard(model, mesh=data_parallel)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Members of a model's module lists, innermost first: what is repeated."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in reversed(lists) for block in blocks]


def whole_tensor(x: Tensor) -> Tensor:
    """The whole of a spread tensor, on every process (all must ask); another as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def own_part(x: Tensor) -> Tensor:
    """Return this process's part of a spread tensor, which shares its memory; another tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(tree: Any, *, is_kept: bool) -> Any:
    """Nested state with every spread tensor whole, one after the other, on the CPU where `is_kept`; None elsewhere."""

    def gather(x: Any) -> Any:
        if not isinstance(x, DTensor):
            return x
        full = x.full_tensor()
        return full.cpu() if is_kept else None

    return tree_map(gather, tree)


def spread_as(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, spread as `like` is; as it is where `like` is whole or of another shape."""
    if not isinstance(like, DTensor) or like.shape != value.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """`load_state_dict` of whole tensors into a model that may be spread.

    Raises:
        RuntimeError: names or shapes that are not the model's.
    """
    own = model.state_dict()
    model.load_state_dict(
        {name: spread_as(value, own[name]) if isinstance(value, Tensor) and name in own else value
         for name, value in weights.items()}
    )  # fmt: skip


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict` of whole tensors into an optimizer whose parameters may be spread.

    Raises:
        ValueError: groups of other sizes.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    of_number = dict(zip(numbers, parameters, strict=False))
    moments = {
        number: {
            name: spread_as(x, of_number[number]) if isinstance(x, Tensor) and number in of_number else x
            for name, x in moments.items()
        }
        for number, moments in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": moments})
