"""Groups the parameters by learning rate and weight decay, and builds their optimizer."""

from __future__ import annotations

import re
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.protocol import body_or_none

BLOCK = re.compile(r"body\.(?:\w+\.)*?(?:blocks|layers?|h)\.(\d+)\.")
LAST_NORMS = ("body.norm.", "body.final_norm.")
TRAINERS_OWN = {
    "params": "model=NAME",
    "lr": "trainer.learning_rate=RATE",
    "weight_decay": "trainer.weight_decay=DECAY",
}
"""Arguments of an optimizer that the trainer gives, with what a user types for them."""


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
    # With one rate for all, the groups stay those of earlier versions, whose optimizer states are in checkpoints.
    block_of = blocks_by_name(model) if layer_decay < 1 else {name: _block(name) for name, _ in named}
    n_layers = 1 + max((block_of[name] for name, _ in named), default=-1)
    if layer_decay < 1 and not n_layers:
        raise UserError(
            f"trainer.layer_decay={layer_decay}: {type(model).__name__} has no stack of trainable blocks, whose learning rates "
            "could differ. Type: trainer.layer_decay=1"
        )
    groups: dict[tuple[int, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        depth = 0 if not name.startswith("body.") or name.startswith(LAST_NORMS) else n_layers - block_of[name]
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


def build_optimizer(make: Any, groups: list[dict[str, Any]]) -> Optimizer:
    """Return the optimizer of parameter groups; an optimizer of torch that has a fused form takes it.

    Args:
        make: an optimizer without its parameters, see `MakesOptimizer`; `functools.partial` holds its options.
        groups: those of `parameter_groups`.
    """
    kind, options = kind_of(make), options_of(make)
    if "fused" in _parameters(kind) and kind.__module__.startswith("torch.optim") and "fused" not in options:
        options["fused"] = True
    optimizer: Optimizer = kind(groups, **options)
    return optimizer


def kind_of(make: Any) -> Any:
    """Return the class or function behind an optimizer without its parameters.

    >>> kind_of(partial(torch.optim.SGD, momentum=0.9)).__name__
    'SGD'
    """
    return make.func if isinstance(make, partial) else make


def with_options(make: Any, **options: Any) -> Any:
    """Return an optimizer without its parameters with further options; those given here win."""
    return partial(kind_of(make), **(options_of(make) | options))


def options_of(make: Any) -> dict[str, Any]:
    """Return the options of an optimizer without its parameters; torch documents pairs of numbers as tuples."""
    options = dict(make.keywords) if isinstance(make, partial) else {}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def check_optimizer(make: Any, *, weight_decay: float) -> None:
    """Refuse an optimizer that cannot be built, by building it for one weight.

    Args:
        make: an optimizer without its parameters.
        weight_decay: that of the trainer.

    Raises:
        UserError: it is no optimizer, its options are wrong or the trainer's, or it knows no weight decay and is asked for one.
    """
    if not callable(make):
        raise UserError(
            f"trainer.optimizer={make}: expected a mapping with _target_, as the files of conf/trainer/optimizer/ are. "
            "Type: trainer/optimizer=adamw"
        )
    kind, options = kind_of(make), options_of(make)
    name = getattr(kind, "__name__", str(kind))
    for key, own in TRAINERS_OWN.items():
        if key in options:
            raise UserError(
                f"trainer.optimizer.{key}={options[key]}: the trainer gives each group of parameters its own. Type: {own}"
            )
    parameters = _parameters(kind)
    takes_all = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    if unknown := [key for key in options if key not in parameters and not takes_all]:
        raise unknown_name(
            f"key of trainer.optimizer for {name}:", unknown[0], [key for key in parameters if key != "params"]
        )
    group: dict[str, Any] = {"params": [nn.Parameter(torch.zeros(1, 1))], "lr": 1e-4, "weight_decay": 0.0}
    try:
        optimizer = kind([group], **options)
    except Exception as error:  # a class of torch or of one's own may raise anything for options that do not suit it
        shown = ", ".join(
            f"{key}={list(value) if isinstance(value, tuple) else value}" for key, value in options.items()
        )
        raise UserError(
            f"trainer.optimizer: {name}({shown}) cannot be built for a weight ({type(error).__name__}: {error}). Check the "
            "keys of its YAML under conf/trainer/optimizer/."
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise UserError(
            f"trainer.optimizer: {name} gives a {type(optimizer).__name__}, expected a torch.optim.Optimizer, whose groups the "
            "schedule changes and whose state the checkpoints hold. Type: trainer/optimizer=adamw"
        )
    if weight_decay > 0 and "weight_decay" not in optimizer.defaults:
        raise UserError(
            f"trainer.weight_decay={weight_decay}: {name} has no weight decay, so the key would have no effect. "
            "Type: trainer.weight_decay=0"
        )


def _parameters(kind: Any) -> dict[str, Parameter]:
    return dict(signature(kind).parameters)


def blocks_by_name(model: nn.Module) -> dict[str, int]:
    """Return the index of the block of each parameter, -1 for a parameter in no block.

    Blocks are known by the usual names of their list. In a body that has none of these names they are the members of its
    longest `nn.ModuleList`.

    >>> class Tower(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         floors = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(2))
    ...         self.body = nn.ModuleDict({"entrance": nn.Linear(1, 1, bias=False), "floors": floors})
    >>> blocks_by_name(Tower())
    {'body.entrance.weight': -1, 'body.floors.0.weight': 0, 'body.floors.1.weight': 1}
    """
    names = [name for name, _ in model.named_parameters()]
    found = {name: _block(name) for name in names}
    if (body := body_or_none(model)) is None or max(found.values(), default=-1) >= 0:
        return found
    lists = [(name, module) for name, module in body.named_modules() if isinstance(module, nn.ModuleList)]
    longest, _ = max(lists, key=lambda item: len(item[1]), default=("", None))
    prefix = f"body.{longest}."
    inside = {
        name: name.removeprefix(prefix).partition(".")[0] for name in names if longest and name.startswith(prefix)
    }
    return {name: int(inside.get(name, -1)) for name in names}


def _block(name: str) -> int:
    """Return the index of a parameter's block, in the models of this project and of Hugging Face; -1 for no block.

    >>> _block("body.blocks.3.mlp.0.weight"), _block("body.input.project.weight")
    (3, -1)
    >>> _block("body.encoder.layer.5.output.dense.bias"), _block("body.embeddings.LayerNorm.bias"), _block("head.layers.0.w")
    (5, -1, -1)
    """
    found = BLOCK.match(name)
    return int(found[1]) if found else -1
