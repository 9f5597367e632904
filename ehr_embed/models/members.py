"""Members: several predictions that share most of their weights, as an ensemble inside one model (Wen et al. 2020,
arXiv:2002.06715).

A model with members gives logits (B, M, C). A task takes the mean of the members' losses and the mean of their probabilities.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ehr_embed.models.blocks import Dropout
from ehr_embed.models.heads import without_autocast


class MemberLinear(nn.Module):
    """y = s_m * (W (r_m * z)) + b_m: one matrix for all members, and three vectors per member.

    Args:
        in_dim, out_dim: widths.
        n_members: M.
    """

    def __init__(self, in_dim: int, out_dim: int, n_members: int) -> None:
        super().__init__()
        self.shared = nn.Linear(in_dim, out_dim, bias=False)
        self.scale_in = nn.Parameter(torch.ones(n_members, in_dim))
        self.scale_out = nn.Parameter(torch.ones(n_members, out_dim))
        self.bias = nn.Parameter(torch.zeros(n_members, out_dim))

    def forward(self, z_BMD: Tensor) -> Tensor:
        """Map (B, M, in_dim) to (B, M, out_dim)."""
        return self.scale_out * self.shared(self.scale_in * z_BMD) + self.bias


class MemberHead(nn.Module):
    """Layers of `MemberLinear`, ReLU and dropout, then a linear map to the classes per member, in float32.

    Args:
        model_dim: width D of what comes in.
        num_classes: C.
        n_members: M.
        n_layers: hidden layers.
        dropout: probability, after each.
    """

    def __init__(self, *, model_dim: int, num_classes: int, n_members: int, n_layers: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MemberLinear(model_dim, model_dim, n_members) for _ in range(n_layers))
        self.dropout = Dropout(dropout)
        bound = model_dim**-0.5
        self.classes = nn.Parameter(torch.empty(n_members, model_dim, num_classes).uniform_(-bound, bound))
        self.class_bias = nn.Parameter(torch.zeros(n_members, num_classes))

    def forward(self, z_BMD: Tensor) -> Tensor:
        """Map (B, M, D), or (B, D) for all members alike, to logits (B, M, C) float32."""
        if z_BMD.ndim == 2:
            z_BMD = z_BMD.unsqueeze(1).expand(-1, len(self.classes), -1)
        with without_autocast(z_BMD):
            z_BMD = z_BMD.float()
            for layer in self.layers:
                z_BMD = self.dropout(layer(z_BMD).relu())
            return torch.einsum("bmd,mdc->bmc", z_BMD, self.classes) + self.class_bias


def over_members(outputs: Tensor) -> Tensor:
    """Return the mean over members of (B, M, C); (B, C) stays as it is.

    >>> over_members(torch.tensor([[[0.25, 0.75], [0.5, 0.5]]])).tolist()[0]
    [0.375, 0.625]
    """
    return outputs.mean(1) if outputs.ndim == 3 else outputs


def loss_over_members(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    """Return `loss` of logits (B, C) and labels; of logits (B, M, C), the mean over members of each one's loss.

    >>> loss_over_members(lambda logits, labels: (logits[:, 0] - labels).abs(), torch.tensor([[[1.0], [3.0]]]), torch.zeros(1))
    tensor([2.])
    """
    if logits.ndim == 3:
        return torch.stack([loss(member, labels) for member in logits.unbind(1)]).mean(0)
    return loss(logits, labels)
