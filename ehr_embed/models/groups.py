"""Reductions of the N events of a batch over G groups."""

from __future__ import annotations

import torch
from torch import Tensor


class Groups:
    """Reduces numbers (N,) or (N, D) of events to one per group.

    Args:
        group_N: (N,) int64, the group of each event, from 0; `n_groups` for an event that belongs to none. The events of a group
            are in order of time.
        n_groups: the number G of groups; a group may be empty.

    >>> groups = Groups(torch.tensor([0, 2, 0]), 3)
    >>> groups.first(torch.tensor([7.0, 8.0, 9.0])).tolist(), groups.mean(torch.tensor([7.0, 8.0, 9.0])).tolist()
    ([7.0, nan, 8.0], [8.0, nan, 8.0])
    """

    def __init__(self, group_N: Tensor, n_groups: int) -> None:
        self.group_N, self.n_groups = group_N, n_groups

    def only(self, keep_N: Tensor) -> Groups:
        """Return the groups of the events at `keep_N` (N,) bool; the others belong to none."""
        return Groups(torch.where(keep_N, self.group_N, self.n_groups), self.n_groups)

    def count(self) -> Tensor:
        """Return the number of events per group, (G,) float64."""
        return self.total(torch.ones(len(self.group_N), dtype=torch.float64, device=self.group_N.device))

    def total(self, x_N: Tensor) -> Tensor:
        """Return the sum per group, (G, ...); 0 for an empty group."""
        return x_N.new_zeros(self.n_groups + 1, *x_N.shape[1:]).index_add(0, self.group_N, x_N)[:-1]

    def mean(self, x_N: Tensor) -> Tensor:
        """Return the mean per group, (G, ...); NaN for an empty group."""
        n_G = self.count().view(-1, *(1,) * (x_N.ndim - 1))
        return self.total(x_N) / n_G.to(x_N.dtype)  # 0 / 0 = NaN

    def extreme(self, x_N: Tensor, how: str) -> Tensor:
        """Return the minimum (`how="amin"`) or maximum (`"amax"`) per group, (G,); NaN for an empty group."""
        found = x_N.new_full((self.n_groups + 1,), float("nan"))
        return found.scatter_reduce(0, self.group_N, x_N, how, include_self=False)[:-1]

    def first(self, x_N: Tensor) -> Tensor:
        """Return the first number of each group, (G,); NaN for an empty group."""
        return self._at(x_N, "amin")

    def last(self, x_N: Tensor) -> Tensor:
        """Return the last number of each group, (G,); NaN for an empty group."""
        return self._at(x_N, "amax")

    def spread(self, x_G: Tensor) -> Tensor:
        """Give each event the number of its group, (G, ...) -> (N, ...); any number where it belongs to none."""
        return x_G[self.group_N.clamp(max=max(self.n_groups - 1, 0))]

    def _at(self, x_N: Tensor, how: str) -> Tensor:
        n = len(x_N)
        if not n:
            return x_N.new_full((self.n_groups,), float("nan"))
        place_G = self.extreme(torch.arange(n, dtype=torch.float64, device=x_N.device), how)
        return torch.where(place_G.isnan(), torch.nan, x_N[place_G.nan_to_num().long()])
