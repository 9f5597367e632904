"""Attribute a prediction to the events of a record: by integrated gradients on event vectors (Sundararajan et al. 2017,
arXiv:1703.01365), or by occlusion (Zeiler and Fergus 2014, arXiv:1311.2901) for models whose vectors no gradient reaches.

The baseline of integrated gradients is a record of average events: each event's vector is replaced by the mean vector of the
events in train, each numeric value by the median, and the times and the number of events stay. A zero vector would be a worse
baseline: no event in train has it, and since the models normalise each vector, the prediction would change only in a small step
next to zero.
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
        events: (T,) float64 attributions; those of integrated gradients add up to `score - baseline_score` except for `gap`; 0 at
            padding.
        score: score of the record.
        baseline_score: score of as many average events at the same times; NaN by occlusion, which has no baseline.
        gap: |sum of events - (score - baseline_score)|, the numerical error of the integral; NaN by occlusion.
        n_steps: number of points at which the gradient was evaluated, or of records without some of their events.
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


@torch.no_grad()
def occlusion(score: Score, inputs: dict[str, Tensor], group_T: npt.NDArray[np.int64]) -> Attribution:
    """Attribute a score to groups of events of one sample: the score of the record less that of the record without the group.

    The events of a group share its attribution equally. Groups that say the same each get little, since the others remain; the
    attributions therefore do not add up to a difference of two scores.

    Args:
        score: score to explain; no gradient is needed.
        inputs: model inputs of one sample, (1, T) and (1, T, ...), and `rows` (U, E), which stay; `padding_mask` True = event.
        group_T: group of each event, (T,), such as the number of its code; what padding has is not read.
    """
    mask_T = inputs["padding_mask"][0].cpu().numpy()
    found, of_event, n_events = np.unique(group_T[mask_T], return_inverse=True, return_counts=True)
    places_N = np.flatnonzero(mask_T)
    full_score = float(score(inputs))
    changes = []
    for groups in np.array_split(np.arange(len(found)), -(-len(found) // POINTS_AT_ONCE)):
        # The remaining events are moved together, since no model expects padding between events.
        kept = [places_N[of_event != group] for group in groups]
        n_kept = torch.tensor([len(places) for places in kept])
        place_GT = torch.zeros(len(groups), max(int(n_kept.max()), 1), dtype=torch.int64)
        for row, places in enumerate(kept):
            place_GT[row, : len(places)] = torch.from_numpy(places)
        batch = {name: x if name == "rows" else x[0][place_GT.to(x.device)] for name, x in inputs.items()}
        is_event_GT = torch.arange(place_GT.shape[1]) < n_kept[:, None]
        batch["padding_mask"] = is_event_GT.to(inputs["padding_mask"].device)
        changes.append(full_score - score(batch).double().cpu().numpy())
    events = np.zeros(len(mask_T))
    events[mask_T] = (np.concatenate(changes) / n_events)[of_event]
    return Attribution(events, full_score, float("nan"), float("nan"), len(found))


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
            "counts, or has no gradient. Declare reads_vectors = False (or learns_vectors = False) in its class, and it is "
            "explained by leaving codes out; or use a run of model=encoder or model=decoder."
        )
    return total.numpy()
