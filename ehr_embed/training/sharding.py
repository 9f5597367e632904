"""Fully sharded data parallel training: weights, gradients and optimizer state are sharded over the processes.

The module uses `torch.distributed.fsdp.fully_shard` (FSDP2; Zhao et al. 2023, arXiv:2304.11277). Each process keeps a
part of every tensor, as a DTensor, and gathers a whole block only while it computes with the block. Checkpoints hold
whole tensors, as those of a single process do.
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
    """Shards each block of a model by itself, and the rest of the model as one unit.

    Args:
        n_processes: number of processes over which the model is sharded.
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
        """Clip by the norm over all gradients, sharded or not; torch's function does not accept both kinds together."""
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
    """Return the sharded tensors, and the others."""
    spread: list[Tensor] = []
    others: list[Tensor] = []
    for x in tensors:
        (spread if isinstance(x, DTensor) else others).append(x)
    return spread, others


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard a model over the mesh's `data_parallel`: each block by itself, innermost first, then the other parts."""
    data_parallel = mesh["data_parallel"]
    for block in blocks_of(model):
        fully_shard(block, mesh=data_parallel)
    fully_shard(model, mesh=data_parallel)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model, which are the members of its module lists, innermost first."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in reversed(lists) for block in blocks]


def whole_tensor(x: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, or another tensor unchanged; all processes must call the function."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def own_part(x: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, which shares its memory, or another tensor unchanged."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(tree: Any, *, is_kept: bool) -> Any:
    """Return nested state with every sharded tensor gathered; all processes must call the function.

    The tensors are gathered one after the other and moved to the CPU if `is_kept`; otherwise None takes their place.
    """

    def gather(x: Any) -> Any:
        if not isinstance(x, DTensor):
            return x
        full = x.full_tensor()
        return full.cpu() if is_kept else None

    return tree_map(gather, tree)


def spread_as(value: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor that every process has whole in the way `like` is sharded.

    The tensor is returned unchanged if `like` is not sharded or has another shape.
    """
    if not isinstance(like, DTensor) or like.shape != value.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Load a state dict of whole tensors into a model that may be sharded.

    Raises:
        RuntimeError: names or shapes differ from the model's.
    """
    own = model.state_dict()
    model.load_state_dict(
        {name: spread_as(value, own[name]) if isinstance(value, Tensor) and name in own else value
         for name, value in weights.items()}
    )  # fmt: skip


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict of whole tensors into an optimizer whose parameters may be sharded.

    Raises:
        ValueError: the sizes of the parameter groups differ.
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
    # The optimizer keeps its own way of computing a step, since a checkpoint may come from steps that were not fused.
    # Groups that the optimizer lacks stay as they are, so that torch refuses them.
    groups = [dict(group) for group in state["param_groups"]]
    for saved, own in zip(groups, optimizer.param_groups, strict=False):
        saved |= {name: own[name] for name in ("fused", "foreach") if name in own}
    optimizer.load_state_dict(state | {"state": moments, "param_groups": groups})
