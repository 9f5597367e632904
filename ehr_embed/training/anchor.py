"""A pull of the weights towards those that a run starts from, so that fine-tuning forgets little."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Anchor:
    """Decay towards the weights of the start in place of zero (L2-SP, Li et al. 2018, arXiv:1802.01483), apart from the gradient as
    AdamW's decay is: after a step at the learning rate r each weight goes the share min(1, r * pull) of its way back.

    Args:
        parameters: those that learn, as they start.
        pull: strength, 0 or more.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], pull: float) -> None:
        self.pull = pull
        self.parameters = [p for p in parameters if p.requires_grad]
        self.start: list[Tensor] = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def draw_back(self, learning_rate: float) -> None:
        """Draw the weights back after a step at this learning rate.

        >>> weight = nn.Parameter(torch.tensor([1.0]))
        >>> anchor = Anchor([weight], pull=50.0)
        >>> _ = weight.data.fill_(3.0)
        >>> anchor.draw_back(0.01)
        >>> weight.item()
        2.0
        """
        for parameter, start in zip(self.parameters, self.start, strict=True):
            parameter.lerp_(start, min(1.0, learning_rate * self.pull))
