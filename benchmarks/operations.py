"""Operations that a training step starts on a GPU, counted without one: each costs a launch, whatever the size of the batch.

    python -m benchmarks.operations
    python -m benchmarks.operations --pretrain 1 --layers 10 --model-dim 640

The step runs on tensors without data, so that it takes the way of a GPU wherever the two differ; operations that only view a
tensor are not counted, nor is the optimizer, which is one fused operation per few hundred parameters. There is no autocast on such
tensors and no packing, so that copies to half precision are missing and attention is that of padded batches. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import parser, report
from benchmarks.training import SIZES, Sides, dataset_of
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.decoder import Decoder
from ehr_embed.models.encoder import Encoder
from ehr_embed.tasks.protocol import run_step

META = torch.device("meta")
VIEWS = frozenset({
    "view", "_unsafe_view", "transpose", "t", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach", "split",
    "split_with_sizes", "unbind", "alias", "as_strided", "_reshape_alias", "diagonal", "empty", "empty_like", "new_empty", "unfold",
})  # fmt: skip


class Counted(TorchDispatchMode):
    """Counts the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket._qualified_op_name.partition("::")[2]
        self.names[name] += name not in VIEWS
        return function(*args, **(kwargs or {}))


def counted(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The operations of each part of a step."""
    sides = Sides(folder, options, with_files=False)
    task, kind = sides.task, Decoder if options.pretrain else Encoder
    model = kind(**sides.sizes, max_length=options.context).train().to(META)
    embedding = EventEmbedding(sides.table).to(META)
    dataset = task.dataset("train", np.random.default_rng(0))
    parts: dict[str, Counter[str]] = {}
    with Counted() as parts_of_batch:
        batch = dataset.on(META)[np.arange(min(len(dataset), 32))]
    parts["batch"] = parts_of_batch.names
    run_step(task, model, embedding, batch)  # fills what is kept for later steps
    with Counted() as forward:
        result = run_step(task, model, embedding, batch)
    parts["forward"] = forward.names
    with Counted() as backward:
        result.loss_sum.backward()
    parts["backward"] = backward.names
    total = sum((names for names in parts.values()), Counter[str]())
    return {
        "operations": {name: sum(names.values()) for name, names in parts.items()} | {"step": sum(total.values())},
        "most": dict(total.most_common(8)),
        "n_parameters": sum(p.numel() for p in model.parameters()),
    }


def main(arguments: list[str] | None = None) -> None:
    """Count and print."""
    options = parser(__doc__, subjects=200, **SIZES).parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = counted(options, Path(folder))
    sizes = {name: getattr(options, name) for name in ("model_dim", "layers", "context", "pretrain", "codes")}
    report("operations", found | sizes, dataset=dataset_of(options), device="cpu")


if __name__ == "__main__":
    main()
