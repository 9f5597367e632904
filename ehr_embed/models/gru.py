"""A recurrent network over event vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ehr_embed.core.settings import OneOf, Width, checked
from ehr_embed.core.transfer import reads_freely
from ehr_embed.models.blocks import DropShare
from ehr_embed.models.body import EventInput, Layers, TimeInput, Times
from ehr_embed.models.heads import PooledHead, check_classifies
from ehr_embed.models.whitening import Shrinkage, Whiten

POOLINGS = ("last", "mean", "max", "attention")


class GRUBody(nn.Module):
    """Event input, time features and gated recurrent units (Cho et al. 2014, arXiv:1406.1078)."""

    def __init__(
        self,
        *,
        embedding_dim: int,
        has_values: bool,
        model_dim: int,
        n_layers: int,
        dropout: float,
        times: Sequence[str],
        whiten: Whiten,
        shrinkage: float,
    ) -> None:
        super().__init__()
        self.input = EventInput(
            embedding_dim=embedding_dim, model_dim=model_dim, has_values=has_values, whiten=whiten, shrinkage=shrinkage
        )
        self.times = TimeInput(kinds=times, model_dim=model_dim) if times else None
        # torch applies dropout between layers only, and warns if there is just one layer.
        between = dropout if n_layers > 1 else 0.0
        self.gru = nn.GRU(model_dim, model_dim, num_layers=n_layers, dropout=between, batch_first=True)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the state after each event, (B, T, D); zero at padding, which must be last."""
        x_BTD, mask_BT = self.input(inputs), inputs["padding_mask"]
        if self.times is not None:
            x_BTD = x_BTD + self.times(inputs)
        if not reads_freely(x_BTD.device):  # packing needs the lengths on the host; a state depends on no later event
            return self.gru(x_BTD)[0] * mask_BT.unsqueeze(-1)
        packed = pack_padded_sequence(x_BTD, mask_BT.sum(1), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=mask_BT.shape[1])[0]


class GRU(nn.Module):
    """Recurrent network: each event updates a state, and the states are pooled into one prediction.

    Args:
        embedding_dim: width E of the event vectors, set by the embedder.
        num_classes: number of outputs, set by the task.
        vocab_size: must be None, because this model predicts classes only.
        has_values: whether batches carry a numeric value with each event, set by the data.
        model_dim: width D of the state.
        n_layers: number of recurrent layers.
        dropout: dropout probability between layers and on the pooled state.
        max_length: longest sequence, in events; a longer record keeps its static events and its last timed ones.
        times: time features of each event: `gap` (days since the previous event), `elapsed` (since the first), `age`.
        whiten: whether text vectors are whitened, fitted to those of train's tokens; `lift` raises small variances instead of
            making all equal (see `Whitening`). Otherwise a layer norm brings each vector to unit variance.
        shrinkage: shrinkage of the whitening.
        pooling: how event vectors become one vector: `last`, `mean`, `max`, `attention`.

    Raises:
        UserError: the task predicts events, the pooling is unknown, or a number is out of range.
    """

    is_causal = True

    @checked("model")
    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        model_dim: Width = 256,
        n_layers: Layers = 2,
        dropout: DropShare = 0.1,
        max_length: int = 512,
        times: Times = ("gap", "elapsed", "age"),
        whiten: Whiten = False,
        shrinkage: Shrinkage = 0.1,
        pooling: Annotated[str, OneOf(*POOLINGS)] = "last",
    ) -> None:
        super().__init__()
        n_outputs = check_classifies("model=gru", num_classes, vocab_size)
        self.head = PooledHead(pooling=pooling, model_dim=model_dim, num_classes=n_outputs, dropout=dropout)
        self.body = GRUBody(
            embedding_dim=embedding_dim,
            has_values=has_values,
            model_dim=model_dim,
            n_layers=n_layers,
            dropout=dropout,
            times=times,
            whiten=whiten,
            shrinkage=shrinkage,
        )

    def adapt_to_vectors(self, vectors: Tensor) -> None:
        """Fit the whitening to the vectors (V, E) of train's tokens."""
        self.body.input.adapt_to_vectors(vectors)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits (B, num_classes).

        Args:
            inputs: `embeddings` (B, T, E), or `rows` (U, E) and `row_ids` (B, T), which give the same logits;
                `padding_mask` (B, T), True = event, padding last; `gap_days`, `elapsed_days` and `age_days` (B, T), if
                `times` has them; `values` (B, T), NaN = no value, if `has_values` is set.
        """
        return self.head(self.body(inputs), inputs)
