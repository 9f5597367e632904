"""Groups the parameters by learning rate and weight decay, and builds the schedules of the learning rate."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, ReduceLROnPlateau, SequentialLR

from ehr_embed.core.errors import UserError
from ehr_embed.embedding.event_embedding import EventEmbedding

BLOCK = re.compile(r"body\.(?:\w+\.)*?(?:blocks|layers?|h)\.(\d+)\.")
SCHEDULES = ("plateau", "cosine", "constant")
LAST_NORMS = ("body.norm.", "body.final_norm.")


def parameter_groups(
    model: nn.Module,
    embedding: EventEmbedding,
    *,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float,
) -> list[dict[str, Any]]:
    """Return groups of parameters with their learning rate and weight decay, the head's first.

    Weight decay applies to matrices, and not to biases, norms and single vectors. With `layer_decay` d, the n-th block
    from the top learns at d^n times the head's learning rate, and the input learns like one more block below the first
    (Clark et al. 2020, arXiv:2003.10555, appendix A).

    The embedding is part of the input and has its learning rate. An element of a vector of norm one is about 1/sqrt(E),
    as is a weight of the projection that reads the vector, so a step changes both by about the same share. With
    `embedder.trainable=residual` the learned offset decays like a matrix, towards the vector of the text, where a token
    with few events should stay. A token vector that is learned as a whole does not decay, because towards zero it would
    lose the information of its text.

    Args:
        model: its parameters that require a gradient are grouped.
        embedding: token vectors, which may be learned.
        learning_rate: peak learning rate of the head.
        weight_decay: weight decay of the parameters that decay.
        layer_decay: factor per block, in (0, 1].

    Raises:
        UserError: `layer_decay` is below 1 and the model has no blocks that learn.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    n_layers = 1 + max((_block(name) for name, _ in named), default=-1)
    if layer_decay < 1 and not n_layers:
        raise UserError(
            f"trainer.layer_decay={layer_decay}: {type(model).__name__} has no blocks that learn, one above the other, so there "
            "is nothing to decay over. Type: trainer.layer_decay=1"
        )
    groups: dict[tuple[int, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        depth = 0 if not name.startswith("body.") or name.startswith(LAST_NORMS) else n_layers - _block(name)
        groups.setdefault((depth, parameter.ndim >= 2, False), []).append(parameter)
    # The embedding is a group of its own, because it stays whole when the model is sharded over processes.
    for parameter in embedding.parameters():
        if parameter.requires_grad:
            groups.setdefault((n_layers + 1, embedding.trainable == "residual", True), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay**depth,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (depth, decays, _), parameters in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def schedules(
    optimizer: Any,
    name: str,
    *,
    warmup_steps: int,
    total_steps: int,
    min_learning_rate: float,
    patience: int,
    is_higher_better: bool,
) -> tuple[Any, ReduceLROnPlateau | None]:
    """Return a scheduler per step (warm-up, then cosine or constant), and a scheduler per epoch for plateau, else None.

    Args:
        optimizer: optimizer whose learning rates are scheduled.
        name: one of `SCHEDULES`.
        warmup_steps: steps of linear warm-up.
        total_steps: steps of the whole training, at whose end cosine reaches its minimum.
        min_learning_rate: least learning rate of plateau and cosine.
        patience: epochs without improvement after which plateau halves the learning rate.
        is_higher_better: direction of the monitored metric, for plateau.
    """
    warmup = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    if name == "plateau":
        mode: Any = "max" if is_higher_better else "min"
        return warmup, ReduceLROnPlateau(optimizer, mode=mode, factor=0.5, patience=patience, min_lr=min_learning_rate)
    if name == "constant":
        return warmup, None
    after = CosineAnnealingLR(optimizer, T_max=max(1, total_steps - warmup_steps), eta_min=min_learning_rate)
    return SequentialLR(optimizer, [warmup, after], milestones=[warmup_steps]), None


def _block(name: str) -> int:
    """Return the index of a parameter's block, in the models of this project and of Hugging Face; -1 for no block.

    >>> _block("body.blocks.3.mlp.0.weight"), _block("body.input.project.weight")
    (3, -1)
    >>> _block("body.encoder.layer.5.output.dense.bias"), _block("body.embeddings.LayerNorm.bias"), _block("head.layers.0.w")
    (5, -1, -1)
    """
    found = BLOCK.match(name)
    return int(found[1]) if found else -1
