"""Reductions of the N events of a batch over G groups."""

from __future__ import annotations

import torch
from torch import Tensor


class Groups:
    """Reduces numbers (N,) or (N, D) of events to one per group.

    Args:
        group_N: (N,) int64, the group of each event; the events of a group are in order of time.
        n_groups: the number G of groups; a group may be empty.

    >>> groups = Groups(torch.tensor([0, 2, 0]), 3)
    >>> groups.first(torch.tensor([7.0, 8.0, 9.0])).tolist(), groups.mean(torch.tensor([7.0, 8.0, 9.0])).tolist()
    ([7.0, nan, 8.0], [8.0, nan, 8.0])
    """

    def __init__(self, group_N: Tensor, n_groups: int) -> None:
        self.group_N, self.n_groups = group_N, n_groups

    def count(self) -> Tensor:
        """Return the number of events per group, (G,) float64."""
        return self.total(torch.ones(len(self.group_N), dtype=torch.float64, device=self.group_N.device))

    def total(self, x_N: Tensor) -> Tensor:
        """Return the sum per group, (G, ...); 0 for an empty group."""
        return x_N.new_zeros(self.n_groups, *x_N.shape[1:]).index_add(0, self.group_N, x_N)

    def mean(self, x_N: Tensor) -> Tensor:
        """Return the mean per group, (G, ...); NaN for an empty group."""
        n_G = self.count().view(-1, *(1,) * (x_N.ndim - 1))
        return self.total(x_N) / n_G.to(x_N.dtype)  # 0 / 0 = NaN

    def extreme(self, x_N: Tensor, how: str) -> Tensor:
        """Return the minimum (`how="amin"`) or maximum (`"amax"`) per group, (G,); NaN for an empty group."""
        return x_N.new_full((self.n_groups,), float("nan")).scatter_reduce(
            0, self.group_N, x_N, how, include_self=False
        )

    def first(self, x_N: Tensor) -> Tensor:
        """Return the first number of each group, (G,); NaN for an empty group."""
        return self._at(x_N, "amin")

    def last(self, x_N: Tensor) -> Tensor:
        """Return the last number of each group, (G,); NaN for an empty group."""
        return self._at(x_N, "amax")

    def spread(self, x_G: Tensor) -> Tensor:
        """Give each event the number of its group, (G, ...) -> (N, ...)."""
        return x_G[self.group_N]

    def _at(self, x_N: Tensor, how: str) -> Tensor:
        n = len(x_N)
        place_G = self.extreme(torch.arange(n, dtype=torch.float64, device=x_N.device), how)
        found = x_N.new_full((self.n_groups,), float("nan"))
        filled = ~place_G.isnan()
        found[filled] = x_N[place_G[filled].long()]
        return found
