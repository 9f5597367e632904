"""A transformer over the distinct codes of a record: each code is one element, however often it occurs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehr_embed.core.settings import Count, OneOf, Told, Width, check_setting, checked
from ehr_embed.core.transfer import grouped, reads_freely
from ehr_embed.data.store import DAYS_PER_YEAR
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.models.blocks import Block, DropShare
from ehr_embed.models.body import Layers, check_heads, check_width
from ehr_embed.models.groups import Groups
from ehr_embed.models.heads import PooledHead, check_classifies, without_autocast
from ehr_embed.models.reads_codes import ReadsCodes, event_places
from ehr_embed.models.whitening import Shrinkage, Whiten, Whitening, normalising

POOLINGS = ("max", "mean", "attention")
SUMMARIES = {"count": 1, "values": 7, "times": 2}
Summaries = Sequence[Annotated[str, OneOf(*SUMMARIES), Told(remedy="[] leaves all of them out.")]]
"""Summaries of a code's events, with the number of features of each.

`count` is the number of events; `values` are the first, last, mean, least and greatest value, their standard deviation,
and whether there is a value; `times` are the days since the first and the last event.
"""


class CodeInput(ReadsCodes):
    """Builds one vector per code of a record: the mean of the code's event vectors, changed by summaries of its events.

    Args:
        embedding_dim: width E of the event vectors.
        model_dim: width D of the returned vectors.
        has_values: whether batches carry a numeric value with each event.
        summaries: the members of `SUMMARIES` that are used.
        whiten: whether event vectors are whitened (see `Whitening`); `lift` raises small variances instead of making all equal.
            Otherwise a layer norm brings each vector to unit variance.
        shrinkage: shrinkage of the whitening.
    """

    code_of_token: Tensor

    def __init__(
        self,
        *,
        embedding_dim: int,
        model_dim: int,
        has_values: bool,
        summaries: Summaries,
        whiten: Whiten,
        shrinkage: float,
    ) -> None:
        super().__init__(has_values=has_values)
        check_setting("model.summaries", summaries, Summaries)
        self.summaries, self.embedding_dim = tuple(summaries), embedding_dim
        self.norm = normalising(embedding_dim, whiten, shrinkage)
        self.project = nn.Linear(embedding_dim, model_dim)
        self.join = None
        if width := sum(SUMMARIES[name] for name in self.summaries):
            self.join = nn.Sequential(
                nn.Linear(model_dim + width, 2 * model_dim), nn.GELU(), nn.Linear(2 * model_dim, model_dim)
            )
        self.register_buffer("code_of_token", torch.empty(0, dtype=torch.int64), persistent=False)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the vocabulary of the token ids in coming batches.

        All tokens without a code, such as the unknown event, count as one code.
        """
        super().set_vocabulary(vocabulary)
        number = {code: i for i, code in enumerate(dict.fromkeys(self.token_codes))}
        numbers = [number[code] for code in self.token_codes]
        self.code_of_token = torch.tensor(numbers, dtype=torch.int64, device=self.code_of_token.device)

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the vectors (B, S, D) of up to S codes per record and their mask (B, S), True = code.

        The codes are in the vocabulary's order.
        """
        n_rows, n_places = inputs["padding_mask"].shape
        n_codes, place_N = len(self.token_codes), event_places(inputs)
        code_N = self.code_of_token[self.tokens(inputs).flatten()[place_N]]
        key_N = place_N // n_places * n_codes + code_N
        counts = reads_freely(key_N.device)
        if not counts:  # a task may have hidden events whose places are still given; they join the row that is cut off
            key_N = key_N.masked_fill(~inputs["padding_mask"].flatten()[place_N], n_rows * n_codes)
        # Without counting, there are as many groups as events. The empty ones come last, in a row that is cut off below.
        key_G, group_N = key_N.unique(return_inverse=True) if counts else grouped(key_N, n_rows * n_codes)
        row_G = key_G // n_codes
        groups = Groups(group_N, len(key_G))
        # An empty group has zeros, since its NaN times a gradient of 0 would be NaN.
        x_GD = groups.total(self._vectors(inputs, place_N))
        x_GD = x_GD / groups.count().clamp(min=1).to(x_GD.dtype).unsqueeze(-1)
        if self.join is not None:
            values_N, days_N = self.values(inputs).flatten()[place_N], inputs["days"].flatten()[place_N]
            summaries_GF = self._summarise(groups, values_N, days_N)
            if not counts:
                summaries_GF = torch.where((row_G < n_rows).unsqueeze(-1), summaries_GF, 0.0)
            x_GD = x_GD + self.join(torch.cat([x_GD, summaries_GF.to(x_GD.dtype)], dim=-1))
        first_B = torch.searchsorted(row_G, torch.arange(n_rows + 1, device=row_G.device))
        place_G = torch.arange(len(row_G), device=row_G.device) - first_B[row_G]
        width = (int(place_G.max()) + 1 if len(place_G) else 1) if counts else min(n_places, n_codes)
        place_G, shape = place_G.clamp(max=width - 1), (n_rows + 1, width)
        x_BSD = x_GD.new_zeros(*shape, x_GD.shape[-1]).index_put((row_G, place_G), x_GD)
        is_code_BS = torch.zeros(shape, dtype=torch.bool, device=x_GD.device)
        is_code_BS[row_G, place_G] = True
        return x_BSD[:n_rows], is_code_BS[:n_rows]

    def _vectors(self, inputs: dict[str, Tensor], place_N: Tensor) -> Tensor:
        """Return the projected vectors of the events, (N, D) float32."""
        has_rows = "rows" in inputs
        vectors = inputs["rows"] if has_rows else inputs["embeddings"].flatten(0, 1)[place_N]
        check_width(vectors, self.embedding_dim)
        # In half precision the small differences that whitening amplifies, and the sums over events, would be rounded
        # away.
        with without_autocast(vectors):
            projected = self.project(self.norm(vectors.float()))
        return F.embedding(inputs["row_ids"].flatten()[place_N], projected) if has_rows else projected

    def _summarise(self, groups: Groups, values_N: Tensor, days_N: Tensor) -> Tensor:
        """Return the summaries of G codes, (G, F) float32.

        Args:
            values_N: (N,) numeric values, NaN = none.
            days_N: (N,) days from each event to the prediction time.
        """
        of = {
            "count": lambda: groups.count().float().log1p().unsqueeze(-1),
            "values": lambda: self._values(groups, values_N.float()),
            "times": lambda: torch.stack([groups.extreme(days_N, how) for how in ("amax", "amin")], dim=-1).log1p(),
        }
        return torch.cat([of[name]() for name in self.summaries], dim=-1)

    @staticmethod
    def _values(groups: Groups, values_N: Tensor) -> Tensor:
        valued, x_N = groups.only(~values_N.isnan(), values_N)
        mean_G = valued.mean(x_N)
        # The epsilon keeps the gradient finite, because the square root has none at zero.
        sd_G = (valued.mean((x_N - valued.spread(mean_G)).square()) + 1e-12).sqrt()
        extremes = valued.extreme(x_N, "amin"), valued.extreme(x_N, "amax")
        found_GF = torch.stack([valued.first(x_N), valued.last(x_N), mean_G, *extremes, sd_G], dim=-1)
        # Some values are a thousand standard deviations off, so asinh compresses the large ones.
        return torch.cat([found_GF.nan_to_num().asinh(), (valued.count() > 0).float().unsqueeze(-1)], dim=-1)


class Subject(nn.Module):
    """Builds one vector per subject: a learned vector plus a linear map of the age at the prediction time."""

    def __init__(self, model_dim: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(model_dim) * 0.5)
        self.age = nn.Linear(3, model_dim)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return subject vectors (B, D) from `age_days` and `days` (B, T); without `age_days` every age is unknown."""
        if "age_days" not in inputs:
            return self.vector + self.age(self.vector.new_zeros(len(inputs["padding_mask"]), 3))
        # The age at an event plus the days from the event to the prediction is the age at the prediction, for every
        # event.
        age_BT = (inputs["age_days"] + inputs["days"]).masked_fill(~inputs["padding_mask"], float("nan"))
        age_B = age_BT.nan_to_num(nan=float("-inf")).amax(1)
        years_B = age_B.masked_fill(age_B.isinf(), float("nan")) / DAYS_PER_YEAR
        x_B = (years_B - 50) / 25  # ages from 25 to 75 become -1 to 1
        return self.vector + self.age(torch.stack([x_B, x_B.square(), ~x_B.isnan()], dim=-1).nan_to_num())


class CodeBody(nn.Module):
    """Code input, an optional element for the subject's age, pre-norm transformer blocks and a final norm."""

    def __init__(
        self, *, model_dim: int, n_heads: int, n_layers: int, dropout: float, age: bool, **options: Any
    ) -> None:
        super().__init__()
        check_heads(model_dim, n_heads)
        self.input = CodeInput(model_dim=model_dim, **options)
        self.subject = Subject(model_dim) if age else None
        self.blocks = nn.ModuleList(
            Block(model_dim=model_dim, n_heads=n_heads, dropout=dropout) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(model_dim)

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return vectors (B, S, D) of the subject (with `age`) and the codes of each record, and their mask (B, S)."""
        x_BSD, is_code_BS = self.input(inputs)
        if self.subject is not None:
            x_BSD = torch.cat([self.subject(inputs).unsqueeze(1), x_BSD], dim=1)
            is_code_BS = F.pad(is_code_BS, (1, 0), value=True)
        else:  # a record without a code is one element of zeros, since attention over nothing is undefined
            is_code_BS = is_code_BS.clone()
            is_code_BS[:, 0] |= ~is_code_BS.any(dim=1)
        for block in self.blocks:
            x_BSD = block(x_BSD, is_code_BS[:, None, None, :])
        return self.norm(x_BSD), is_code_BS


class CodeEncoder(nn.Module):
    """Transformer encoder over the codes of a record, pooled into one prediction.

    Its cost grows with the number of distinct codes, not with the number of events.

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
        summaries: summaries of each code's events that are used: `count`, `values`, `times`.
        age: whether the age at the prediction time is one more element beside the codes.
        whiten: whether event vectors are whitened (see `Whitening`); `lift` raises small variances instead of making all equal.
            Otherwise a layer norm brings each vector to unit variance.
        shrinkage: shrinkage of the whitening.
        pooling: how event vectors become one vector: `max`, `mean`, `attention`.

    Raises:
        UserError: the task predicts events, a summary or the pooling is unknown, or `n_heads` does not divide
            `model_dim`.
    """

    is_causal = False
    meaning_keys = ("n_heads", "summaries")

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
        summaries: Summaries = tuple(SUMMARIES),
        age: bool = True,
        whiten: Whiten = True,
        shrinkage: Shrinkage = 0.1,
        pooling: Annotated[str, OneOf(*POOLINGS)] = "max",
    ) -> None:
        super().__init__()
        n_outputs = check_classifies("model=code_encoder", num_classes, vocab_size)
        self.reads_values = "values" in summaries
        self.body = CodeBody(
            model_dim=model_dim,
            n_heads=n_heads,
            n_layers=n_layers,
            dropout=dropout,
            age=age,
            embedding_dim=embedding_dim,
            has_values=has_values,
            summaries=summaries,
            whiten=whiten,
            shrinkage=shrinkage,
        )
        self.head = PooledHead(pooling=pooling, model_dim=model_dim, num_classes=n_outputs, dropout=dropout)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the vocabulary of the token ids in coming batches."""
        self.body.input.set_vocabulary(vocabulary)

    def adapt_to_vectors(self, vectors: Tensor) -> None:
        """Fit the whitening to the vectors (V, E) of train's tokens."""
        if isinstance(whitening := self.body.input.norm, Whitening):
            whitening.fit(vectors)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits (B, num_classes).

        Args:
            inputs: `embeddings` (B, T, E), or `rows` (U, E) and `row_ids` (B, T), which give the same logits;
                `token_ids` and `days` (B, T); `padding_mask` (B, T), True = event; `age_days` (B, T), NaN = unknown, if
                `age` is set; `values` (B, T), NaN = no value, if `has_values` is set.
        """
        x_BSD, is_code_BS = self.body(inputs)
        return self.head(x_BSD, {"padding_mask": is_code_BS})
