"""A bidirectional transformer encoder over event vectors, pooled into one prediction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ehr_embed.errors import UserError
from ehr_embed.models.blocks import Block, Dropout, EventInput, Pooling, check_heads, sinusoids, time_features


class Encoder(nn.Module):
    """Projection, positions, pre-norm blocks, pooling, head.

    Args:
        embedding_dim: width E of the event vectors; the embedder says it.
        num_classes: outputs; the task says it.
        has_values: whether batches carry a number beside each event; the data say it.
        model_dim: width D of the model.
        n_heads: attention heads; must divide `model_dim`.
        n_layers: blocks.
        dropout: probability, on what each block adds and on the pooled vector.
        max_length: longest sequence, in events; longer records keep their last events.
        positions: `sinusoidal` or `rope` (order), `time` (days before the prediction), `none`.
        pooling: `mean`, `cls`, `max`, `last`, `attention`.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int,
        has_values: bool = False,
        model_dim: int = 256,
        n_heads: int = 8,
        n_layers: int = 6,
        dropout: float = 0.1,
        max_length: int = 512,
        positions: str = "sinusoidal",
        pooling: str = "mean",
    ) -> None:
        super().__init__()
        check_heads(model_dim, n_heads, positions)
        self.max_length, self.positions = max_length, positions
        self.input = EventInput(embedding_dim=embedding_dim, model_dim=model_dim, has_values=has_values)
        self.time = nn.Linear(model_dim, model_dim) if positions == "time" else None
        self.blocks = nn.ModuleList(
            Block(model_dim=model_dim, n_heads=n_heads, dropout=dropout) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(model_dim)
        self.pooling = Pooling(pooling, model_dim=model_dim)
        self.cls = nn.Parameter(torch.randn(model_dim) * 0.02) if pooling == "cls" else None
        self.head = nn.Sequential(Dropout(dropout), nn.Linear(model_dim, num_classes))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (B, num_classes) from `embeddings` (B, T, E) and `padding_mask` (B, T), True = event.

        In place of `embeddings`, `rows` (U, E) and `row_ids` (B, T) give the same logits. `positions=time` needs `days`
        (B, T), days before the prediction; a model that carries values needs `values` (B, T), NaN = none.
        """
        mask_BT = inputs["padding_mask"]
        if mask_BT.shape[1] > -(-self.max_length // 8) * 8:  # batches are padded to a multiple of 8
            raise UserError(
                f"{mask_BT.shape[1]} events, but model.max_length is {self.max_length}: keep the last ones."
            )
        x_BTD = self.input(inputs)
        B, T, D = x_BTD.shape
        position_BT = torch.arange(T, device=x_BTD.device).expand(B, T)
        if self.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoids(position_BT, D).to(x_BTD.dtype)
        elif self.time is not None:
            x_BTD = x_BTD + self.time(time_features(inputs["days"], D).to(x_BTD.dtype))
        if self.cls is not None:
            x_BTD = torch.cat([self.cls.to(x_BTD.dtype).expand(B, 1, D), x_BTD], dim=1)
            mask_BT = torch.cat([mask_BT.new_ones(B, 1), mask_BT], dim=1)
            position_BT = torch.arange(T + 1, device=x_BTD.device).expand(B, T + 1)
        rope_BT = position_BT if self.positions == "rope" else None
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_BT[:, None, None, :], rope_BT)
        return self.head(self.pooling(self.norm(x_BTD), mask_BT))
