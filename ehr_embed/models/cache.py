"""A key-value cache for generation: each new event costs one event instead of the whole record."""

from __future__ import annotations

import torch
from torch import Tensor

from ehr_embed.models.blocks import Extend


class KeyValueCache:
    """Stores the keys and values of B sequences of different lengths, with up to S events each.

    Args:
        n_layers, batch_size, n_heads, n_events, head_dim: the sizes L, B, H, S and K.
        device, dtype: device and number format of the keys and values.

    Attributes:
        lengths: (B,) int64, the number of events of each sequence so far; the caller increases it after all layers have
            stored the new events.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        batch_size: int,
        n_heads: int,
        n_events: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (n_layers, batch_size, n_heads, n_events, head_dim)
        self.keys_LBHSK = torch.zeros(shape, device=device, dtype=dtype)
        self.values_LBHSK = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)

    def index_of(self, n_new: int) -> Tensor:
        """Return the indices of the next `n_new` events of each sequence, (B, n_new)."""
        return self.lengths[:, None] + torch.arange(n_new, device=self.lengths.device)

    def mask(self, n_new: int) -> Tensor:
        """Return the causal mask of the next `n_new` events over the stored events, (B, 1, n_new, S'), True = attend.

        S' is the length of the longest sequence with its new events. The padding after a shorter prompt lies beyond
        that prompt's length, so no event attends to it, and the events that follow overwrite it.
        """
        index_BT = self.index_of(n_new)
        stored = torch.arange(int(index_BT.max()) + 1, device=self.lengths.device)
        return (stored <= index_BT[:, :, None])[:, None]

    def extend_of(self, layer: int) -> Extend:
        """Return a function that stores a layer's new keys and values (B, H, T, K) and returns all, (B, H, S', K)."""

        def extend(k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
            index_BT = self.index_of(k_BHTK.shape[2])
            batch_B1 = torch.arange(len(self.lengths), device=self.lengths.device)[:, None]
            n_stored = int(index_BT.max()) + 1
            both = []
            for stored_LBHSK, new_BHTK in ((self.keys_LBHSK, k_BHTK), (self.values_LBHSK, v_BHTK)):
                stored_BHSK = stored_LBHSK[layer]
                stored_BHSK[batch_B1, :, index_BT] = new_BHTK.transpose(1, 2).to(stored_BHSK.dtype)
                both.append(stored_BHSK[:, :, :n_stored])
            return both[0], both[1]

        return extend

    def select(self, rows: Tensor) -> None:
        """Keep the sequences at `rows` (M,), in that order; a row may be named several times."""
        self.keys_LBHSK = self.keys_LBHSK[:, rows]
        self.values_LBHSK = self.values_LBHSK[:, rows]
        self.lengths = self.lengths[rows]
