"""Weights that a code's text chooses, over summaries of each code, with members inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from ehr_embed.core.settings import Count, NotNegative, OneOf, ShareBelow1, Width, checked
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.models.blocks import DropShare
from ehr_embed.models.code_tab_body import CodeTabBody
from ehr_embed.models.heads import check_classifies
from ehr_embed.models.members import MemberHead
from ehr_embed.models.whitening import Shrinkage

MEMBER_WEIGHTS = ("codes", "text")


class CodeTab(nn.Module):
    """Text-conditioned weights over summaries per code, and members that share them; reads codes, values and times.

    Args:
        embedding_dim: width E of the event vectors; the embedder says it.
        num_classes: outputs; the task says it.
        vocab_size: refused: classes only.
        has_values: whether batches carry a number beside each event; the data say it.
        model_dim: width D of a record's vector.
        hidden_dim: width H within a code.
        n_gates: numbers R that a code's text chooses its weights by.
        n_members: M.
        n_layers: hidden layers of the members' head.
        dropout: probability.
        max_length: longest sequence, in events; longer records keep their last events.
        windows_hours: where the four windows end, counted back from the prediction.
        member_weights: each code's weight per member: learned per code (`codes`; a new code has its nearest neighbour's) or made
            from its `text`.
        feeds_absent: whether a known code that a record lacks is an input too; else it adds nothing.
        age: whether the age at the prediction is one more element.
        shrinkage: of the whitening.
        code_dropout: probability with which each code that a record has is left out of it, in training.
        text_noise: standard deviation of what is added to the whitened text vectors, of variance 1, in training.

    Raises:
        UserError: a task that predicts events, an unknown `member_weights`, a number out of range.
    """

    is_causal = False
    meaning_keys = ("windows_hours", "feeds_absent")
    learns_vectors = False
    """The body copies the vectors of the known codes before training; only events of other codes bring theirs."""
    takes_twins = True

    @checked("model")
    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        model_dim: Width = 96,
        hidden_dim: Count = 96,
        n_gates: Count = 16,
        n_members: Count = 8,
        n_layers: Annotated[int, Field(ge=0, le=1024)] = 2,
        dropout: DropShare = 0.05,
        max_length: int = 4096,
        windows_hours: Sequence[float] = (12, 24, 36, 48),
        member_weights: Annotated[str, OneOf(*MEMBER_WEIGHTS)] = "codes",
        feeds_absent: bool = True,
        age: bool = True,
        shrinkage: Shrinkage = 0.1,
        code_dropout: ShareBelow1 = 0.0,
        text_noise: NotNegative = 0.0,
    ) -> None:
        super().__init__()
        n_outputs = check_classifies("model=code_tab", num_classes, vocab_size)
        sizes = {"model_dim": model_dim, "hidden_dim": hidden_dim, "n_gates": n_gates, "n_members": n_members}
        self.body = CodeTabBody(
            embedding_dim=embedding_dim,
            has_values=has_values,
            **sizes,
            dropout=dropout,
            windows_hours=windows_hours,
            member_weights=member_weights,
            feeds_absent=feeds_absent,
            age=age,
            shrinkage=shrinkage,
            code_dropout=code_dropout,
            text_noise=text_noise,
        )
        self.head = MemberHead(
            model_dim=model_dim, num_classes=n_outputs, n_members=n_members, n_layers=n_layers, dropout=dropout
        )

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Take what the token ids of coming batches mean."""
        self.body.set_vocabulary(vocabulary)
        self._tokens = torch.from_numpy((vocabulary.tokens["count"].to_numpy() > 0).nonzero()[0])

    def adapt_to_vectors(self, vectors: Tensor) -> None:
        """Take the vectors (V, E) of train's tokens."""
        self.body.take_vectors(vectors, self._tokens)

    def align(self, matches: Mapping[str, tuple[str, float]] | None, twins: Mapping[str, str] | None = None) -> None:
        """Read the codes of the present vocabulary as the known ones that `matches` names, and as their `twins`."""
        self.body.input.align(matches, twins)

    def pool(self, matches: Mapping[str, tuple[str, float]], dataset_of: Mapping[str, int] | None = None) -> None:
        """Read the codes of pooled datasets as those that `matches` names, in training too."""
        self.body.pool(matches, dataset_of)

    def adapt_to_records(self, train: Iterable[dict[str, Tensor]]) -> None:
        """Fit the quantiles to train's records; `train` gives each batch once."""
        self.body.input.fit(train)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits (B, M, num_classes) float32 of M members from `token_ids` and `days` (B, T), `padding_mask` (B, T), True =
        event, and `rows` (U, E) with `row_ids` (B, T), or `embeddings` (B, T, E).

        Known codes have the vectors that train's had; those of events are read for codes that train never had. Age needs
        `age_days` (B, T), NaN = unknown, and a model that carries values takes `values` (B, T), NaN = none.
        """
        return self.head(self.body(inputs))
