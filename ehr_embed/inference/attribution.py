"""Integrated gradients on event vectors: how much each event of a record moves a prediction.

Sundararajan et al. 2017, arXiv:1703.01365. The baseline is the average event: every event's vector is replaced by the mean vector
of train's events, every number by the median, times and the number of events stay. A zero vector would be no event a model has
seen, and since models normalise each vector its scale means nothing to them: on the way from zero all change happens at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ehr_embed.core.errors import UserError

POINTS_AT_ONCE = 16
Score = Callable[[dict[str, Tensor]], Tensor]
"""Model inputs of B samples -> (B,), what is explained."""


@dataclass(frozen=True)
class Attribution:
    """Of one sample with T places.

    Attributes:
        events: (T,) float64; they add up to `score - baseline_score`, save for `gap`. Padding has 0.
        score, baseline_score: of the record, and of as many average events at the same times.
        gap: |sum of events - (score - baseline_score)|.
        n_steps: points of the path that it took.
    """

    events: npt.NDArray[np.float64]
    score: float
    baseline_score: float
    gap: float
    n_steps: int


def integrated_gradients(
    score: Score,
    inputs: dict[str, Tensor],
    baseline: Tensor,
    *,
    n_steps: int = 16,
    max_steps: int = 2048,
    tolerance: float = 0.01,
) -> Attribution:
    """Attribute a score to the events of one sample; an event's part is that of its vector and of its number.

    The integral along the straight path is a Gauss-Legendre sum, with twice as many points until it is complete.

    Args:
        score: what to explain, differentiable.
        inputs: of one sample, with `embeddings` (1, T, E), `padding_mask` (1, T) True = event, and maybe `values` (1, T).
        baseline: (E,) the vector in whose place each event's counts as moving nothing.
        n_steps: points to begin with.
        max_steps: points to give up at.
        tolerance: of the gap, as a share of the change of the score, or of 1 where it is smaller.

    Raises:
        UserError: the score does not depend on the event vectors, or `max_steps` do not suffice.
    """
    mask = inputs["padding_mask"].unsqueeze(-1)
    ends = {"embeddings": (torch.where(mask, baseline, inputs["embeddings"]), inputs["embeddings"])}
    if "values" in inputs:
        values = inputs["values"]
        ends["values"] = (torch.where(values.isnan(), values, torch.zeros_like(values)), values)
    with torch.no_grad():
        both = [{**inputs, **{name: pair[end] for name, pair in ends.items()}} for end in (0, 1)]
        baseline_score, full_score = (float(score(point)) for point in both)
    change = full_score - baseline_score
    while True:
        events = _integrate(score, inputs, ends, n_steps)
        gap = abs(float(events.sum()) - change)
        if gap <= tolerance * max(1.0, abs(change)):
            return Attribution(events, full_score, baseline_score, gap, n_steps)
        if 2 * n_steps > max_steps:
            raise UserError(
                f"attributions over {n_steps} steps add up to {events.sum():.4f}, the change of the log-odds is {change:.4f}: "
                f"the gap {gap:.4f} is above tolerance={tolerance}. Type: max_steps={4 * n_steps}, or a larger tolerance"
            )
        n_steps *= 2


def _integrate(
    score: Score, inputs: dict[str, Tensor], ends: dict[str, tuple[Tensor, Tensor]], n_steps: int
) -> npt.NDArray[np.float64]:
    """(T,) sums over the points of the path of weight times gradient times way, over each event's vector and number."""
    nodes, weights = np.polynomial.legendre.leggauss(n_steps)
    n_places = inputs["padding_mask"].shape[1]
    total, depends = torch.zeros(n_places, dtype=torch.float64), False
    for points in np.array_split(np.arange(n_steps), -(-n_steps // POINTS_AT_ONCE)):
        alpha = torch.as_tensor((nodes[points] + 1) / 2, dtype=torch.float32)
        weight = torch.as_tensor(weights[points] / 2, dtype=torch.float64)
        batch = {name: x.expand(len(points), *x.shape[1:]) for name, x in inputs.items()}
        leaves = {}
        for name, (start, stop) in ends.items():
            a = alpha.to(start.device).view(-1, *(1,) * (start.ndim - 1))
            leaves[name] = (start + a * (stop - start)).requires_grad_()
        result = score({**batch, **leaves})
        if not result.requires_grad:
            break
        gradients = torch.autograd.grad(result.sum(), list(leaves.values()), allow_unused=True)
        for (name, (start, stop)), gradient in zip(ends.items(), gradients, strict=True):
            if gradient is None:
                continue
            depends |= name == "embeddings" and bool(gradient.any())
            part = (gradient * (stop - start).nan_to_num()).double().cpu()
            part = part.sum(-1) if name == "embeddings" else part
            total += (weight[:, None] * part).sum(0)
    if not depends:
        raise UserError(
            "the prediction does not depend on the event vectors, so they cannot be said to move it: this model reads tokens or "
            "counts, or does not differentiate. Use a run of model=encoder or model=decoder."
        )
    return total.numpy()
