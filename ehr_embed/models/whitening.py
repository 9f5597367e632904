"""Whitening of event vectors: a linear map after which their components are uncorrelated."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ehr_embed.core.settings import Told, checked

Whiten = Annotated[bool | Literal["lift"], Told("true, lift or false", example="lift")]
Shrinkage = Annotated[float, Field(ge=0), Told("0 or more, a share of the mean variance")]

LEAST = 0.01
"""Share of the mean variance from which variances are lifted: a component with less, in which known texts hardly differ and unknown
texts may differ much, is multiplied by no more than a component of this variance."""


class Whitening(nn.Module):
    """Maps vectors to their principal components, each divided by the square root of its variance.

    Sentence vectors of one domain lie close together: the difference between two laboratory tests is small compared to
    the part that all tests share, and a linear map learns it slowly (Su et al. 2021, arXiv:2103.15316). Shrinkage
    prevents that components with little variance, mostly noise, count as much as the first. The module is the identity
    before `fit`. The fitted mean and matrix are part of the `state_dict`, so that vectors of another vocabulary are
    mapped in the same way.

    With `lifts` the components keep the order of their sizes: each variance is raised by `shrinkage` times the mean variance. What
    texts have in common still counts most, and a short training can tell texts apart by components that would hardly count.

    Args:
        dim: width E of the vectors.
        shrinkage: share of the mean variance that is added to each variance before a component is divided by its square root. With
            `lifts` it is added to the variance that the component keeps.
        lifts: whether variances are raised in place of made equal.
    """

    mean: Tensor
    matrix: Tensor

    @checked("model")
    def __init__(self, dim: int, shrinkage: Shrinkage = 0.1, lifts: bool = False) -> None:
        super().__init__()
        self.shrinkage, self.lifts = shrinkage, lifts
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("matrix", torch.eye(dim))

    @torch.no_grad()
    def fit(self, vectors: Tensor) -> None:
        """Fit the map to vectors (V, E).

        Directions without variance are mapped to zero. A single vector, or equal ones, leave the module as it is.
        """
        x_VE = vectors.double()
        mean = x_VE.mean(0)
        variance, directions = torch.linalg.eigh((x_VE - mean).T @ (x_VE - mean) / len(x_VE))
        varies = variance > 1e-9 * variance.max()
        if not bool(varies.any()) or len(x_VE) < 2:
            return
        variance, directions = variance[varies].flip(0), directions.T[varies].flip(0)
        shrunk = variance + self.shrinkage * variance.mean()
        if self.lifts:
            shrunk = (variance + LEAST * variance.mean()) / shrunk
        # Scale the variances so that the mean square of the mapped vectors' elements is one.
        shrunk = shrunk * (variance / shrunk).sum() / len(mean)
        self.mean.copy_(mean)
        self.matrix.zero_()
        self.matrix[:, : len(directions)] = (directions / shrunk.sqrt().unsqueeze(1)).T

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the whitened vectors, (..., E) -> (..., E)."""
        return (vectors - self.mean) @ self.matrix


def normalising(dim: int, whiten: Whiten, shrinkage: float) -> nn.Module:
    """Return what scales event vectors (..., E): a `Whitening`, which lifts for `whiten="lift"` and after which the elements of the
    vectors it was fitted to have a mean square of one, or for `whiten=False` a layer norm, which brings each vector to unit
    variance."""
    return Whitening(dim, shrinkage, lifts=whiten == "lift") if whiten else nn.LayerNorm(dim)
