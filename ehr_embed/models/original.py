"""The transformer of the original pipeline over event vectors, with torch.nn's own layers, so that its checkpoints open."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.models.blocks import sinusoids
from ehr_embed.models.body import check_width
from ehr_embed.models.heads import LogitLinear, Pooling, check_classifies

log = logging.getLogger(__name__)
POOLINGS = ("mean", "cls", "max")


class OriginalBody(nn.Module):
    """Projection (none where the widths agree), sinusoidal positions, pre-norm blocks of torch.nn, and no norm after them."""

    def __init__(
        self,
        *,
        embedding_dim: int,
        model_dim: int,
        n_heads: int,
        n_layers: int,
        dropout: float,
        is_causal: bool,
    ) -> None:
        super().__init__()
        self.embedding_dim, self.model_dim, self.is_causal = embedding_dim, model_dim, is_causal
        same = embedding_dim == model_dim
        self.input_projection = nn.Identity() if same else nn.Linear(embedding_dim, model_dim)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            model_dim, n_heads, 4 * model_dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return one vector per event, (B, T, D); undefined at padding."""
        vectors = inputs["rows"] if "rows" in inputs else inputs["embeddings"]
        check_width(vectors, self.embedding_dim)
        x_BTD = self.input_projection(vectors)
        if "rows" in inputs:
            x_BTD = F.embedding(inputs["row_ids"], x_BTD)
        mask_BT = inputs["padding_mask"]
        T = mask_BT.shape[1]
        index_T = torch.arange(T, device=mask_BT.device)
        # The original has sines and cosines in turn.
        turns = sinusoids(index_T[None], self.model_dim).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        x_BTD = self.dropout(x_BTD + turns.to(x_BTD.dtype))
        later_TT = index_T[None] > index_T[:, None] if self.is_causal else None
        output: Tensor = self.transformer(x_BTD, mask=later_TT, src_key_padding_mask=~mask_BT)
        return output


class Original(nn.Module):
    """Encoder or causal decoder of the original pipeline as a classifier: `ehr-embed convert checkpoint=OLD.pt` builds one.

    For new runs model=encoder and model=decoder learn better; this model is for weights that are there.

    Args:
        embedding_dim: width E of the event vectors, set by the embedder.
        num_classes: number of outputs, set by the task.
        vocab_size: must be None, because this model predicts classes only.
        has_values: whether events carry numbers, which this model does not read: the original has none.
        model_dim: width D of the model.
        n_heads: number of attention heads; must divide `model_dim`.
        n_layers: number of transformer blocks.
        dropout: dropout probability.
        max_length: longest sequence, in events.
        pooling: how event vectors become one vector: `mean`, `cls` (the first event), `max`.
        is_causal: whether an event attends to earlier events only, as in the original's decoder.

    Raises:
        UserError: the task predicts events, the pooling is unknown, or the heads do not divide the width.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        model_dim: int = 256,
        n_heads: int = 8,
        n_layers: int = 6,
        dropout: float = 0.1,
        max_length: int = 512,
        pooling: str = "mean",
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        n_outputs = check_classifies("model=original", num_classes, vocab_size)
        if has_values:
            log.warning(
                "model=original reads no numbers beside the tokens: with data.values=both it sees their bins, with "
                "data.values=continuous none. Type: data.values=bins"
            )
        if pooling not in POOLINGS:
            raise unknown_name("model.pooling", pooling, POOLINGS)
        if model_dim % n_heads or model_dim % 2:
            raise UserError(f"model.n_heads={n_heads}: expected a divisor of an even model.model_dim={model_dim}.")
        self.max_length, self.is_causal = max_length, is_causal
        self.body = OriginalBody(
            embedding_dim=embedding_dim,
            model_dim=model_dim,
            n_heads=n_heads,
            n_layers=n_layers,
            dropout=dropout,
            is_causal=is_causal,
        )
        self.pooling = Pooling(pooling, model_dim=model_dim)
        self.head = nn.Sequential(nn.LayerNorm(model_dim), LogitLinear(model_dim, n_outputs))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits (B, num_classes).

        Args:
            inputs: `embeddings` (B, T, E), or `rows` (U, E) and `row_ids` (B, T), which give the same logits; `padding_mask`
                (B, T), True = event, padding last.
        """
        return self.head(self.pooling(self.body(inputs), inputs["padding_mask"]))
