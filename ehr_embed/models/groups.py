"""Reductions of the N events of a batch over G groups."""

from __future__ import annotations

import torch
from torch import Tensor

from ehr_embed.core.transfer import grouped, reads_freely


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

    def only(self, keep_N: Tensor, x_N: Tensor) -> tuple[Groups, Tensor]:
        """Return the groups of the events at `keep_N` (N,) bool and their numbers of `x_N` (N,).

        On a GPU, where counting would make the host wait, all events stay; the others belong to no group there and have the
        number 0, since a NaN would stay one in the backward pass, where it is multiplied by a gradient of 0.
        """
        if reads_freely(keep_N.device):
            return Groups(self.group_N[keep_N], self.n_groups), x_N[keep_N]
        group_N = torch.where(keep_N, self.group_N, self.n_groups)
        return Groups(group_N, self.n_groups), x_N.masked_fill(~keep_N, 0.0)

    def within(self, number_N: Tensor, n_numbers: int) -> Groups:
        """Return `n_numbers` groups in place of each, by a number (N,) of each event from 0 to `n_numbers` - 1."""
        n_groups = self.n_groups * n_numbers
        return Groups((self.group_N * n_numbers + number_N).clamp(max=n_groups), n_groups)

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

    def greatest(self, number_N: Tensor) -> Tensor:
        """Return the greatest of whole numbers (N,) from 0 on per group, (G,) int64; -1 for an empty group."""
        found = number_N.new_full((self.n_groups + 1,), -1)
        return found.scatter_reduce(0, self.group_N, number_N, "amax")[:-1]

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


def grouped_by(key_N: Tensor, n_keys: int) -> tuple[Tensor, Groups]:
    """Return the distinct keys (G,) in ascending order, and the groups of the events that have them.

    Where counting would make the host wait, there are as many groups as there could be: one per key or per event, whichever are
    fewer. A group without events has the key `n_keys`, and so has an event that belongs to none.

    Args:
        key_N: (N,) int64, from 0 to `n_keys` - 1; on a GPU `n_keys` too.
        n_keys: number of keys that there can be.

    >>> keys, groups = grouped_by(torch.tensor([7, 3, 7]), 9)
    >>> keys.tolist(), groups.group_N.tolist()
    ([3, 7], [1, 0, 1])
    """
    if reads_freely(key_N.device):
        if n_keys > 2 * len(key_N):  # sorting few events is faster than counting those of each key
            key_G, group_N = key_N.unique(return_inverse=True)
            return key_G, Groups(group_N, len(key_G))
        is_there = key_N.bincount(minlength=n_keys) > 0
        key_G = is_there.nonzero().squeeze(1)
        return key_G, Groups((is_there.long().cumsum(0) - 1)[key_N], len(key_G))
    if n_keys > len(key_N):
        key_G, group_N = grouped(key_N, n_keys)
        return key_G, Groups(group_N, len(key_G))
    every = torch.arange(n_keys, device=key_N.device)
    is_there = torch.zeros(n_keys + 1, dtype=torch.bool, device=key_N.device).index_fill(0, key_N, True)[:-1]
    return torch.where(is_there, every, n_keys), Groups(key_N, n_keys)
