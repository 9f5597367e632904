"""Event vectors, pooled: what a record says without order, time or one event looking at another."""

from __future__ import annotations

from torch import Tensor, nn

from ehr_embed.core.errors import unknown_name
from ehr_embed.models.blocks import Dropout
from ehr_embed.models.body import EventInput
from ehr_embed.models.heads import LogitLinear, Pooling, check_classifies

POOLINGS = ("mean", "max", "attention")


class MeanPool(nn.Module):
    """Projected event vectors are pooled and go through a small MLP.

    Args:
        embedding_dim: width E of the event vectors; the embedder says it.
        num_classes: outputs; the task says it.
        vocab_size: refused: classes only.
        has_values: whether batches carry a number beside each event; the data say it.
        model_dim: width D of the projection and of the MLP.
        dropout: probability, on the pooled vector and within the MLP.
        max_length: longest sequence, in events; longer records keep their last events.
        pooling: `mean`, `max`, `attention`.

    Raises:
        UserError: a task that predicts events, or an unknown pooling.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        model_dim: int = 256,
        dropout: float = 0.1,
        max_length: int = 512,
        pooling: str = "mean",
    ) -> None:
        super().__init__()
        n_outputs = check_classifies("model=mean_pool", num_classes, vocab_size)
        if pooling not in POOLINGS:
            raise unknown_name("model.pooling", pooling, POOLINGS)
        event_input = EventInput(embedding_dim=embedding_dim, model_dim=model_dim, has_values=has_values)
        self.body = nn.ModuleDict({"input": event_input})
        self.pooling = Pooling(pooling, model_dim=model_dim)
        self.head = nn.Sequential(
            Dropout(dropout),
            nn.Linear(model_dim, model_dim),
            nn.GELU(),
            Dropout(dropout),
            LogitLinear(model_dim, n_outputs),
        )

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (B, num_classes) from `embeddings` (B, T, E) and `padding_mask` (B, T), True = event.

        In place of `embeddings`, `rows` (U, E) and `row_ids` (B, T) give the same logits; a model that carries values takes
        `values` (B, T), NaN = none.
        """
        return self.head(self.pooling(self.body["input"](inputs), inputs["padding_mask"]))
