"""Quantile normalisation: each number becomes the normal score of its rank among train's."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ehr_embed.core.transfer import reads_freely

MIN_VALUES = 20
"""A column with fewer numbers in train says too little about ranks; all its numbers become 0."""
N_KNOTS = 256
"""Distinct numbers per column whose ranks are kept exactly; between them ranks are interpolated."""
LEAST_RANK = 0.003


class QuantileNormal(nn.Module):
    """Phi^-1 of the mid-rank of a number among train's numbers of the same column, clipped to [0.003, 0.997] before.

    The mid-rank is (numbers below + numbers not above) / (2 n), so that equal numbers share one. Missing numbers become 0, as do
    those of columns with under `MIN_VALUES` numbers. Monotone changes of a column's scale before `fit` change nothing.

    Args:
        n_columns: columns F.

    >>> normal = QuantileNormal(1)
    >>> normal.fit(torch.zeros(41, dtype=torch.int64), torch.arange(41.0))
    >>> normal(torch.zeros(3, dtype=torch.int64), torch.tensor([20.0, -5.0, float("nan")])).round(decimals=2).tolist()
    [0.0, -2.75, 0.0]
    """

    knots: Tensor
    keys: Tensor
    below: Tensor
    upto: Tensor
    offsets: Tensor

    def __init__(self, n_columns: int) -> None:
        super().__init__()
        for name in ("knots", "below", "upto"):
            self.register_buffer(name, torch.zeros(0), persistent=False)
        self.register_buffer("keys", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("offsets", torch.zeros(n_columns + 1, dtype=torch.int64), persistent=False)

    @property
    def n_columns(self) -> int:
        """Return the number F of columns."""
        return len(self.offsets) - 1

    @torch.no_grad()
    def fit(self, columns: Tensor, numbers: Tensor, weights: Tensor | None = None) -> None:
        """Take train's numbers (N,), each of a column (N,) int64, each counted `weights` (N,) times; NaN counts as absent."""
        keep = ~numbers.isnan()
        weights = torch.ones(len(numbers)) if weights is None else weights
        column_N, x_N, weight_N = (x[keep].cpu().numpy() for x in (columns, numbers.float(), weights.double()))
        order = np.lexsort((x_N, column_N))
        column_N, x_N, weight_N = column_N[order], x_N[order], weight_N[order]
        starts = np.flatnonzero(np.r_[True, (np.diff(column_N) != 0) | (np.diff(x_N) != 0)][: len(x_N)])
        total = np.add.reduceat(weight_N, starts) if len(starts) else np.zeros(0)
        column_K, x_K = column_N[starts], x_N[starts]
        n_F = np.bincount(column_K, weights=total, minlength=self.n_columns)
        before_F = np.concatenate([np.zeros(1), np.cumsum(n_F)[:-1]])
        after_K = np.cumsum(total) - before_F[column_K]
        share_K = n_F[column_K]
        below_K, upto_K = (after_K - total) / share_K, after_K / share_K
        kept = (share_K >= MIN_VALUES) & _chosen(column_K, below_K, upto_K, self.n_columns)
        device = self.offsets.device
        for name, array in (("knots", x_K), ("below", below_K), ("upto", upto_K)):
            setattr(self, name, torch.from_numpy(array[kept].astype(np.float32)).to(device))
        counts = np.bincount(column_K[kept], minlength=self.n_columns)
        self.offsets = torch.from_numpy(np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])).to(device)
        self._sort()

    @torch.no_grad()
    def forward(self, columns: Tensor, numbers: Tensor) -> Tensor:
        """Return normal scores, float32 in the shape of `numbers`, to which the shape of their `columns` broadcasts."""
        columns, x = columns.expand(numbers.shape), numbers.float()
        first, stop = self.offsets[columns], self.offsets[columns + 1]
        is_known, counts = (stop > first) & ~x.isnan(), reads_freely(x.device)
        if not len(self.knots) or (counts and not bool(is_known.any())):
            return torch.zeros_like(x)
        if counts:
            columns, first, stop, x_N = columns[is_known], first[is_known], stop[is_known], x[is_known]
        else:  # the other numbers get any score, which is replaced below
            x_N = x.masked_fill(~is_known, 0.0)
        low = torch.searchsorted(self.keys, _key(columns, x_N), right=True)  # the first knot above x, or `stop`
        left, right = (low - 1).clamp(min=0), low.clamp(max=len(self.knots) - 1)
        has_left, has_right = low > first, low < stop
        x_left, x_right = self.knots[left], self.knots[right]
        rank_left = torch.where(has_left, self.upto[left], 0.0)
        rank_right = torch.where(has_right, self.below[right], 1.0)
        share = ((x_N - x_left) / (x_right - x_left)).nan_to_num(0.0, 0.0, 0.0)
        share = torch.where(has_left & has_right, share, 0.0)
        rank = rank_left + share * (rank_right - rank_left)
        rank = torch.where(has_left & (x_left == x_N), (self.below[left] + self.upto[left]) / 2, rank)
        z_N = torch.special.ndtri(rank.clamp(LEAST_RANK, 1 - LEAST_RANK))
        return torch.zeros_like(x).masked_scatter(is_known, z_N) if counts else torch.where(is_known, z_N, 0.0)

    @torch.no_grad()
    def inverse(self, columns: Tensor, scores: Tensor) -> Tensor:
        """Return the numbers that have these normal scores, in the shape of `scores`; NaN where the score is NaN, and for
        columns without a table.

        >>> normal = QuantileNormal(1)
        >>> normal.fit(torch.zeros(41, dtype=torch.int64), torch.arange(41.0))
        >>> normal.inverse(torch.zeros(3, dtype=torch.int64), torch.tensor([0.0, -3.0, float("nan")])).tolist()
        [20.0, 0.0, nan]
        """
        columns, z = columns.expand(scores.shape), scores.float()
        first, stop = self.offsets[columns], self.offsets[columns + 1]
        is_known = (stop > first) & ~z.isnan()
        found = torch.full_like(z, float("nan"))
        if not bool(is_known.any()):
            return found
        first, stop = first[is_known], stop[is_known]
        rank = torch.special.ndtr(z[is_known])
        middle = (self.below + self.upto) / 2
        low, high = first, stop  # the first knot whose mid-rank exceeds the rank lies in [low, high]
        for _ in range(N_KNOTS.bit_length() + 1):
            at = (low + high) // 2
            is_below = (at < stop) & (middle[at.clamp(max=len(middle) - 1)] <= rank)
            is_open = low < high
            low = torch.where(is_open & is_below, at + 1, low)
            high = torch.where(is_open & ~is_below, at, high)
        left, right = (low - 1).clamp(min=0), low.clamp(max=len(middle) - 1)
        left, right = torch.where(low > first, left, right), torch.where(low < stop, right, left)
        share = ((rank - middle[left]) / (middle[right] - middle[left])).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
        # Half-way numbers between two of train's would be none of it: a column of whole numbers keeps whole numbers.
        is_frequent = (self.upto - self.below)[torch.stack([left, right])].amax(0) > 1 / N_KNOTS
        share = torch.where(is_frequent, share.round(), share)
        found[is_known] = self.knots[left] + share * (self.knots[right] - self.knots[left])
        return found

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the tables; they are no buffers of the `state_dict`, since their lengths are fitted."""
        return {name: getattr(self, name).cpu() for name in ("knots", "below", "upto", "offsets")}

    def set_extra_state(self, state: Any) -> None:
        """Take the tables of another run."""
        device = self.offsets.device
        for name in ("knots", "below", "upto", "offsets"):
            setattr(self, name, state[name].to(device))
        self._sort()

    def _sort(self) -> None:
        """Give each knot its key, by which one search finds a number's place among the knots of its column."""
        columns = torch.arange(self.n_columns, device=self.offsets.device)
        self.keys = _key(columns.repeat_interleave(self.offsets.diff()), self.knots)


def _key(columns_N: Tensor, x_N: Tensor) -> Tensor:
    """Return int64 keys that are in the order of columns, and within a column in that of the float32 numbers.

    The bits of a float, read as an integer, are in the order of the numbers; those of negative ones in the reverse order.

    >>> x = torch.tensor([-2.0, -1.0, -0.0, 0.0, 1e-40, 3.0, float("inf")])
    >>> bool((_key(torch.zeros(7, dtype=torch.int64), x).diff() >= 0).all())
    True
    >>> _key(torch.tensor([1]), x[:1]) > _key(torch.tensor([0]), x[-1:])
    tensor([True])
    """
    bits_N = (x_N + 0.0).view(torch.int32)  # -0.0 becomes 0.0, which equals it
    return (columns_N << 32) + torch.where(bits_N >= 0, bits_N, bits_N ^ 0x7FFFFFFF).long()


def _chosen(
    column_K: npt.NDArray[np.int64], below_K: npt.NDArray, upto_K: npt.NDArray, n_columns: int
) -> npt.NDArray[np.bool_]:
    """Return which distinct numbers become knots: all of a column with few, else those at which the rank passes a step of the grid,
    which every frequent number does, and each column's least and greatest."""
    n_distinct = np.bincount(column_K, minlength=n_columns)[column_K]
    is_end = np.r_[True, np.diff(column_K) != 0] | np.r_[np.diff(column_K) != 0, True] if len(column_K) else False
    grid = N_KNOTS - 2
    passes = np.floor(upto_K * grid + 1e-9) > np.floor(below_K * grid + 1e-9)
    return (n_distinct <= N_KNOTS) | passes | is_end
