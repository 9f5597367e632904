"""A model that pools event vectors and ignores their order, their times and the relations between events."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn

from ehr_embed.core.settings import OneOf, Width, checked
from ehr_embed.models.blocks import Dropout, DropShare
from ehr_embed.models.body import EventInput
from ehr_embed.models.heads import LogitLinear, Pooling, check_classifies
from ehr_embed.models.whitening import Shrinkage, Whiten

POOLINGS = ("mean", "max", "attention")


class MeanPool(nn.Module):
    """Pools projected event vectors and passes the result through a small MLP.

    Args:
        embedding_dim: width E of the event vectors, set by the embedder.
        num_classes: number of outputs, set by the task.
        vocab_size: must be None, because this model predicts classes only.
        has_values: whether batches carry a numeric value with each event, set by the data.
        model_dim: width D of the projection and of the MLP.
        dropout: dropout probability on the pooled vector and within the MLP.
        max_length: longest sequence, in events; a longer record keeps its static events and its last timed ones.
        whiten: whether text vectors are whitened, fitted to those of train's tokens; `lift` raises small variances instead of
            making all equal (see `Whitening`). Otherwise a layer norm brings each vector to unit variance.
        shrinkage: shrinkage of the whitening.
        pooling: how event vectors become one vector: `mean`, `max`, `attention`.

    Raises:
        UserError: the task predicts events, or the pooling is unknown.
    """

    @checked("model")
    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        model_dim: Width = 256,
        dropout: DropShare = 0.1,
        max_length: int = 512,
        whiten: Whiten = False,
        shrinkage: Shrinkage = 0.1,
        pooling: Annotated[str, OneOf(*POOLINGS)] = "mean",
    ) -> None:
        super().__init__()
        n_outputs = check_classifies("model=mean_pool", num_classes, vocab_size)
        event_input = EventInput(
            embedding_dim=embedding_dim, model_dim=model_dim, has_values=has_values, whiten=whiten, shrinkage=shrinkage
        )
        self.body = nn.ModuleDict({"input": event_input})
        self.pooling = Pooling(pooling, model_dim=model_dim)
        self.head = nn.Sequential(
            Dropout(dropout),
            nn.Linear(model_dim, model_dim),
            nn.GELU(),
            Dropout(dropout),
            LogitLinear(model_dim, n_outputs),
        )

    def adapt_to_vectors(self, vectors: Tensor) -> None:
        """Fit the whitening to the vectors (V, E) of train's tokens."""
        event_input = self.body["input"]
        assert isinstance(event_input, EventInput)
        event_input.adapt_to_vectors(vectors)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits (B, num_classes).

        Args:
            inputs: `embeddings` (B, T, E), or `rows` (U, E) and `row_ids` (B, T), which give the same logits;
                `padding_mask` (B, T), True = event; `values` (B, T), NaN = no value, if `has_values` is set.
        """
        return self.head(self.pooling(self.body["input"](inputs), inputs["padding_mask"]))
