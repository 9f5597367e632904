"""A transformer over the distinct codes of a record that reads where each code's numbers rank among those of train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from ehr_embed.core.settings import Count, OneOf, Width, checked
from ehr_embed.core.transfer import reads_freely
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.models.blocks import DropShare
from ehr_embed.models.body import Layers
from ehr_embed.models.code_encoder import POOLINGS, CodeBody
from ehr_embed.models.code_summaries import N_SUMMARIES, CodeSummaries
from ehr_embed.models.heads import PooledHead, check_classifies, without_autocast
from ehr_embed.models.whitening import Shrinkage, Whiten, Whitening, normalising


class RankInput(nn.Module):
    """Builds one vector per code of a record: that of the code's text, changed by the normal scores of its summaries.

    Codes of train have the vector that train's texts gave them, also where another dataset's codes are read as theirs; other codes
    have that of their event. Events without a code are left out.

    Args:
        embedding_dim: width E of the event vectors.
        model_dim: width D of the returned vectors.
        has_values: whether batches carry a numeric value with each event.
        windows_hours: where the four windows end, in hours back from the prediction.
        whiten: whether text vectors are whitened (see `Whitening`); otherwise a layer norm brings each to unit variance.
        shrinkage: shrinkage of the whitening.
    """

    vectors: Tensor

    def __init__(
        self,
        *,
        embedding_dim: int,
        model_dim: int,
        has_values: bool,
        windows_hours: Sequence[float],
        whiten: Whiten,
        shrinkage: float,
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.summaries = CodeSummaries(has_values=has_values, windows_hours=windows_hours)
        self.norm = normalising(embedding_dim, whiten, shrinkage)
        self.project = nn.Linear(embedding_dim, model_dim)
        self.join = nn.Sequential(
            nn.Linear(model_dim + N_SUMMARIES, 2 * model_dim), nn.GELU(), nn.Linear(2 * model_dim, model_dim)
        )
        self.register_buffer("vectors", torch.zeros(0, embedding_dim), persistent=False)

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the vectors of train's codes; they are no buffer of the `state_dict`, since the data set their number."""
        return {"vectors": self.vectors.cpu()}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Set the vectors to those of another run's codes."""
        self.vectors = state["vectors"].to(self.vectors.device)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the vocabulary of the token ids in coming batches; the codes of the first one are known from then on."""
        self.summaries.set_vocabulary(vocabulary)
        if not len(self.vectors):
            self._make_room()

    def pool(self, matches: Mapping[str, tuple[str, float]], dataset_of: Mapping[str, int] | None = None) -> None:
        """Read the codes of pooled datasets as those that `matches` names, see `CodeSummaries.pool`."""
        self.summaries.pool(matches, dataset_of)
        self._make_room()

    def _make_room(self) -> None:
        self.vectors = torch.zeros(self.summaries.n_codes, self.embedding_dim, device=self.vectors.device)

    def take_vectors(self, vectors: Tensor, tokens: Tensor) -> None:
        """Give each known code the mean of the vectors (K, E) of its tokens (K,) in train, and fit the whitening to these."""
        self.vectors = self.summaries.vectors_of(vectors, tokens)
        if isinstance(self.norm, Whitening):
            self.norm.fit(self.vectors)

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the vectors (B, S, D) of up to S codes per record and their mask (B, S), True = code."""
        pairs, n_rows = self.summaries(inputs), len(inputs["padding_mask"])
        vectors_CE = self.summaries.with_new(self.vectors, inputs, pairs)
        # In half precision the small differences that whitening amplifies would be rounded away.
        with without_autocast(vectors_CE):
            x_GD = self.project(self.norm(vectors_CE))[pairs.code]
        scores_GF = self.summaries.normalise(pairs)[:, :N_SUMMARIES]
        x_GD = x_GD + self.join(torch.cat([x_GD, scores_GF.to(x_GD.dtype)], dim=-1))
        # Places without a pair, which there are on a GPU, join one more row, which is cut off.
        is_there_G = (pairs.row < n_rows).long()
        n_B = is_there_G.new_zeros(n_rows + 1).index_add(0, pairs.row, is_there_G)
        width = max(int(n_B.max()), 1) if reads_freely(n_B.device) else pairs.most
        place_G = (is_there_G.cumsum(0) - 1 - (n_B.cumsum(0) - n_B)[pairs.row]).clamp(0, width - 1)
        x_BSD = x_GD.new_zeros(n_rows + 1, width, x_GD.shape[-1]).index_put((pairs.row, place_G), x_GD)
        is_code_BS = torch.arange(width, device=n_B.device) < n_B[:n_rows, None]
        return x_BSD[:n_rows], is_code_BS


class CodeEncoderRanks(nn.Module):
    """Transformer encoder over the codes of a record, as `CodeEncoder`, that reads the inputs of `CodeTab`.

    Each code of a record is one element: the vector of its text, changed by the seventeen numbers of `CodeSummaries`, each of them
    the normal score of its rank in train. Codes that a record lacks are no elements.

    Args:
        embedding_dim: width E of the event vectors, set by the embedder.
        num_classes: number of outputs, set by the task.
        vocab_size: must be None, because this model predicts classes only.
        has_values: whether batches carry a numeric value with each event, set by the data.
        model_dim: width D of the model.
        n_heads: number of attention heads; must divide `model_dim`.
        n_layers: number of transformer blocks.
        dropout: dropout probability on the residual branches of each block and on the pooled vector.
        max_length: longest sequence, in events; a longer record keeps its static events and its last timed ones.
        windows_hours: where the four windows end, in hours back from the prediction.
        age: whether the age at the prediction time is one more element beside the codes.
        whiten: whether text vectors are whitened (see `Whitening`); otherwise a layer norm brings each to unit variance.
        shrinkage: shrinkage of the whitening.
        pooling: how the vectors of codes become one vector: `max`, `mean`, `attention`.

    Raises:
        UserError: the task predicts events, the windows are not four ascending numbers, or `n_heads` does not divide `model_dim`.
    """

    is_causal = False
    learns_vectors = False  # the known codes' vectors are copied before training
    meaning_keys = ("n_heads", "windows_hours")
    reads_values = True
    takes_twins = True

    @checked("model")
    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        model_dim: Width = 64,
        n_heads: Count = 4,
        n_layers: Layers = 1,
        dropout: DropShare = 0.1,
        max_length: int = 4096,
        windows_hours: Sequence[float] = (12, 24, 36, 48),
        age: bool = True,
        whiten: Whiten = True,
        shrinkage: Shrinkage = 0.1,
        pooling: Annotated[str, OneOf(*POOLINGS)] = "max",
    ) -> None:
        super().__init__()
        n_outputs = check_classifies("model=code_encoder_ranks", num_classes, vocab_size)
        read = RankInput(
            embedding_dim=embedding_dim,
            model_dim=model_dim,
            has_values=has_values,
            windows_hours=windows_hours,
            whiten=whiten,
            shrinkage=shrinkage,
        )
        self.body = CodeBody(
            read=read, model_dim=model_dim, n_heads=n_heads, n_layers=n_layers, dropout=dropout, age=age
        )
        self.head = PooledHead(pooling=pooling, model_dim=model_dim, num_classes=n_outputs, dropout=dropout)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the vocabulary of the token ids in coming batches."""
        self.body.input.set_vocabulary(vocabulary)
        self._tokens = torch.from_numpy((vocabulary.tokens["count"].to_numpy() > 0).nonzero()[0])

    def adapt_to_vectors(self, vectors: Tensor) -> None:
        """Take the vectors (V, E) of train's tokens, and fit the whitening to those of its codes."""
        self.body.input.take_vectors(vectors, self._tokens)

    def align(self, matches: Mapping[str, tuple[str, float]] | None, twins: Mapping[str, str] | None = None) -> None:
        """Read the codes of the present vocabulary as the known ones that `matches` names, and as their `twins`."""
        self.body.input.summaries.align(matches, twins)

    def pool(self, matches: Mapping[str, tuple[str, float]], dataset_of: Mapping[str, int] | None = None) -> None:
        """Read the codes of pooled datasets as those that `matches` names, in training too."""
        self.body.input.pool(matches, dataset_of)

    def adapt_to_records(self, train: Iterable[dict[str, Tensor]]) -> None:
        """Fit the quantiles to train's records; `train` gives each batch once."""
        self.body.input.summaries.fit(train)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits (B, num_classes).

        Args:
            inputs: `token_ids` and `days` (B, T); `padding_mask` (B, T), True = event; `rows` (U, E) and `row_ids` (B, T), or
                `embeddings` (B, T, E), which are read for codes that train never had; `age_days` (B, T), NaN = unknown, if `age` is
                set; `values` (B, T), NaN = no value, if `has_values` is set.
        """
        x_BSD, is_code_BS = self.body(inputs)
        return self.head(x_BSD, {"padding_mask": is_code_BS})
