"""Training steps a second without padding (ehr_embed/models/packing.py) against the same steps with it.

    python -m benchmarks.packing --device cuda
    python -m benchmarks.packing --device cuda --longest 2048 --batch 16 --padding-percent 40

An untrained encoder of the default size on one batch of random events, forward and backward pass in bfloat16; the lengths of its
records are spread evenly, so that the longest is `--longest` and the padding what is asked for. Both ways alternate; `ratio` is the
median of the pairs' ratios. On a CPU, where the trainer keeps the padding, attention without it is one record at a time.
"""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import alternate, parser, ratio, report, seconds
from ehr_embed.models.encoder import Encoder

EMBEDDING_DIM = 384


def random_batch(n_rows: int, longest: int, padding_percent: int) -> dict[str, Tensor]:
    """Inputs of a model whose rows are about so much padding, up to 50 %."""
    lengths_B = torch.linspace(longest * (1 - padding_percent / 50), longest, n_rows).round().long().clamp(min=1)
    mask_BT = torch.arange(longest) < lengths_B[:, None]
    return {
        "embeddings": torch.randn(n_rows, longest, EMBEDDING_DIM),
        "padding_mask": mask_BT,
        "places": mask_BT.flatten().nonzero().squeeze(1),
        "sequence_starts": F.pad(lengths_B.cumsum(0), (1, 0)).int(),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    options = parser(
        __doc__, batch=32, longest=512, padding_percent=6, steps=10, repeats=10, model_dim=256, layers=6
    ).parse_args(arguments)
    torch.manual_seed(0)
    inputs = {
        name: x.to(options.device)
        for name, x in random_batch(options.batch, options.longest, options.padding_percent).items()
    }
    model = Encoder(
        embedding_dim=EMBEDDING_DIM,
        num_classes=2,
        model_dim=options.model_dim,
        n_layers=options.layers,
        max_length=options.longest,
    ).to(options.device)
    model.train()

    def steps() -> None:
        for _ in range(options.steps):
            model.zero_grad()
            with torch.autocast(options.device.split(":")[0], dtype=torch.bfloat16):
                loss = model(inputs).float().square().mean()
            loss.backward()

    def side(packs: bool) -> float:
        model.body.packs = packs
        return seconds(steps, options.device)

    sides = {"packed": lambda: side(True), "padded": lambda: side(False)}
    for warm_up in sides.values():
        warm_up()
    measured = alternate(sides, options.repeats)
    n_events, n_places = len(inputs["places"]), inputs["padding_mask"].numel()
    per_side = {f"events_per_s_{k}": options.steps * n_events / statistics.median(x) for k, x in measured.items()}
    report(
        "packing",
        per_side
        | {"ratio": ratio(measured["padded"], measured["packed"]), "padding_share": 1 - n_events / n_places}
        | {name: getattr(options, name) for name in ("batch", "longest", "steps", "repeats", "model_dim", "layers")},
        dataset="random events",
        device=options.device,
    )


if __name__ == "__main__":
    main()
