"""Whitening of event vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ehr_embed.core.errors import UserError


class Whitening(nn.Module):
    """Principal components of the vectors, each divided by the root of its variance.

    Sentence vectors of one domain lie close together: what tells two laboratory tests apart is small beside what all of them
    share, and a linear map takes long to find it (Su et al. 2021, arXiv:2103.15316). Shrinkage keeps components that hardly
    vary, mostly noise, from counting as much as the first. The identity until it is fitted; what was fitted is part of the
    `state_dict`, so that vectors of another vocabulary are mapped as those that the model was trained on.

    Args:
        dim: width E of the vectors.
        shrinkage: share of the mean variance that is added to each variance.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, dim: int, shrinkage: float = 0.1) -> None:
        super().__init__()
        if shrinkage < 0:
            raise UserError(f"model.shrinkage={shrinkage}: expected 0 or more, a share of the mean variance.")
        self.shrinkage = shrinkage
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("matrix", torch.eye(dim))

    @torch.no_grad()
    def fit(self, vectors: Tensor) -> None:
        """Fit to vectors (V, E). Directions in which they do not vary are mapped to zero; one vector fits nothing."""
        x_VE = vectors.double()
        mean = x_VE.mean(0)
        variance, directions = torch.linalg.eigh((x_VE - mean).T @ (x_VE - mean) / len(x_VE))
        varies = variance > 1e-9 * variance.max()
        if not bool(varies.any()) or len(x_VE) < 2:
            return
        variance, directions = variance[varies].flip(0), directions.T[varies].flip(0)
        shrunk = variance + self.shrinkage * variance.mean()
        # The mean square of what comes out is one.
        shrunk = shrunk * (variance / shrunk).sum() / len(mean)
        self.mean.copy_(mean)
        self.matrix.zero_()
        self.matrix[:, : len(directions)] = (directions / shrunk.sqrt().unsqueeze(1)).T

    def forward(self, vectors: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        return (vectors - self.mean) @ self.matrix
