"""Integrated gradients on event vectors: attribute a prediction to the events of a record (Sundararajan et al. 2017,
arXiv:1703.01365).

The baseline is a record of average events: each event's vector is replaced by the mean vector of the events in train, each
numeric value by the median, and the times and the number of events stay. A zero vector would be a worse baseline: no event in train
has it, and since the models normalise each vector, the prediction would change only in a small step next to zero.
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
"""Function from the model inputs of B samples to the scores (B,) that are explained."""


@dataclass(frozen=True)
class Attribution:
    """Attribution of one sample's score to the T positions of its sequence.

    Attributes:
        events: (T,) float64 attributions, which add up to `score - baseline_score` except for `gap`; 0 at padding.
        score: score of the record.
        baseline_score: score of as many average events at the same times.
        gap: |sum of events - (score - baseline_score)|, the numerical error of the integral.
        n_steps: number of points at which the gradient was evaluated.
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
    """Attribute a score to the events of one sample; the attribution of an event sums over its vector and its numeric value.

    The integral along the straight path from the baseline is a Gauss-Legendre sum, whose points are doubled until the gap is
    within the tolerance.

    Args:
        score: differentiable score to explain.
        inputs: model inputs of one sample, with `embeddings` (1, T, E), `padding_mask` (1, T) True = event, and for some models
            `values` (1, T), standardised so that 0 is the median.
        baseline: (E,) vector of the average event.
        n_steps: number of points at the first attempt.
        max_steps: largest number of points.
        tolerance: largest accepted gap, as a share of the change of the score; absolute where the change is below 1.

    Raises:
        UserError: the score does not depend on the event vectors, or `max_steps` points do not reach the tolerance.
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
    """Return the path integral (T,) of gradient times path for each event, summed over its vector and its numeric value."""
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
            "the prediction does not depend on the event vectors, so it cannot be attributed to them: this model reads tokens or "
            "counts, or has no gradient. Use a run of model=encoder or model=decoder."
        )
    return total.numpy()
