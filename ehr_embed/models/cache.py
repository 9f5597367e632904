"""A key-value cache for generation: each new event costs one event instead of the whole record.

Shapes: P prompts, R = P * n futures, n of each prompt one after the other; H heads, K head width, S events of the longest prompt,
U new events of each future.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ehr_embed.models.blocks import Attend, attention


class KeyValueCache:
    """Stores the keys and values of prompts once, and of each prompt's futures beside them.

    The first events are the P prompts. After `share`, each prompt has n futures, and every further call adds one event to each
    future. The futures of a prompt attend to the same keys, which are therefore read once for all of them. All widths are known
    to the host, so that no step waits for the device.

    Args:
        n_layers: number of layers.
        n_new: most events per future.

    Attributes:
        lengths: (R,) int64, the number of events of each sequence so far.
    """

    def __init__(self, *, n_layers: int, n_new: int) -> None:
        self.n_new, self.n_done, self.n_futures = n_new, 0, 1
        self.prompts: list[tuple[Tensor, Tensor]] = []
        self.own: list[tuple[Tensor, Tensor]] = []
        self.n_layers = n_layers
        self._is_joined = False
        self.lengths: Tensor
        self._bias: Tensor

    @property
    def is_empty(self) -> bool:
        """Return whether the prompts are still to come."""
        return len(self.prompts) < self.n_layers

    def take_prompts(self, mask_PS: Tensor) -> None:
        """Set which events the prompts have, (P, S), True = event, padding last; called before the layers store them."""
        self.lengths = mask_PS.sum(1)
        self._bias = torch.zeros(mask_PS.shape, device=mask_PS.device).masked_fill(~mask_PS, -torch.inf)

    def share(self, n_futures: int) -> None:
        """Give each prompt `n_futures` futures."""
        self.n_futures = n_futures
        self.lengths = self.lengths.repeat_interleave(n_futures)
        shape = (len(self.lengths), self.prompts[0][0].shape[1], self.n_new, self.prompts[0][0].shape[3])
        self.own = [(k.new_zeros(shape), v.new_zeros(shape)) for k, v in self.prompts]
        self._is_joined = n_futures == 1
        if self._is_joined:  # nothing to share, so that torch's attention reads prompt and future together
            self.own = [
                (torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2))
                for (k, v), (own_k, own_v) in zip(self.prompts, self.own, strict=True)
            ]
            self._bias = F.pad(self._bias, (0, self.n_new))

    def end_event(self) -> None:
        """Count the event that all layers have stored."""
        self.n_done += 1
        self.lengths = self.lengths + 1

    def attend_of(self, layer: int) -> Attend:
        """Return a layer's attention: of the prompts among themselves, or of a new event of each future to all before it."""

        def of_prompts(q_PHSK: Tensor, k_PHSK: Tensor, v_PHSK: Tensor) -> Tensor:
            self.prompts.append((k_PHSK.contiguous(), v_PHSK.contiguous()))
            return attention(q_PHSK, k_PHSK, v_PHSK, None)  # no event attends to padding, which comes after all events

        def of_futures(q_RH1K: Tensor, k_RH1K: Tensor, v_RH1K: Tensor) -> Tensor:
            return self._attend(layer, q_RH1K, k_RH1K, v_RH1K)

        return of_prompts if self.is_empty else of_futures

    def _attend(self, layer: int, q_RH1K: Tensor, k_RH1K: Tensor, v_RH1K: Tensor) -> Tensor:
        """Store the next event of each future, and return what it attends to in its prompt and its future, (R, H, 1, K)."""
        n, k_PHSK, v_PHSK = self.n_futures, *self.prompts[layer]
        own_k, own_v = self.own[layer]
        start = self.n_done + (k_PHSK.shape[2] if self._is_joined else 0)
        stop = start + 1
        own_k[:, :, start:stop], own_v[:, :, start:stop] = k_RH1K, v_RH1K
        if self._is_joined:
            bias = self._bias[:, None, None, :stop].to(own_k.dtype)
            own_k, own_v = own_k[:, :, :stop], own_v[:, :, :stop]
            return F.scaled_dot_product_attention(q_RH1K.to(own_k.dtype), own_k, own_v, attn_mask=bias)
        q_RH1K = (q_RH1K / math.sqrt(q_RH1K.shape[-1])).to(k_PHSK.dtype)
        q_PHnK = q_RH1K.unflatten(0, (-1, n)).squeeze(3).transpose(1, 2)
        scores_PHnS = (q_PHnK @ k_PHSK.transpose(-1, -2)).float() + self._bias[:, None, None, :]
        scores_RH1U = (q_RH1K @ own_k[:, :, :stop].transpose(-1, -2)).float()
        scores_PHnU = scores_RH1U.unflatten(0, (-1, n)).squeeze(3).transpose(1, 2)
        weights = torch.cat([scores_PHnS, scores_PHnU], dim=-1).softmax(-1).to(v_PHSK.dtype)
        of_prompt, of_own = weights.split([k_PHSK.shape[2], stop], dim=-1)
        from_prompt_PHnK = of_prompt @ v_PHSK
        from_own_RH1K = of_own.transpose(1, 2).flatten(0, 1).unsqueeze(2) @ own_v[:, :, :stop]
        return from_prompt_PHnK.transpose(1, 2).flatten(0, 1).unsqueeze(2) + from_own_RH1K

    def select(self, prompts: Tensor | None, futures: Tensor) -> None:
        """Keep the prompts (P',), None = all, and the futures (R',), as many of each kept prompt, in that order."""
        if prompts is not None:
            self._bias = self._bias[prompts]
            if not self._is_joined:
                self.prompts = [(k[prompts], v[prompts]) for k, v in self.prompts]
        self.n_futures = len(futures) // len(self._bias)
        self.own = [(k[futures], v[futures]) for k, v in self.own]
        self.lengths = self.lengths[futures]
