"""The body of `code_tab`: it turns a record into a vector per member, from summaries of codes and weights that texts choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehr_embed.core.transfer import reads_freely
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.models.blocks import Dropout
from ehr_embed.models.code_encoder import Subject
from ehr_embed.models.code_summaries import N_SUMMARIES, CodeSummaries, Pairs
from ehr_embed.models.heads import without_autocast
from ehr_embed.models.whitening import Whitening

N_INPUTS = N_SUMMARIES + 1


class CodeTabBody(nn.Module):
    """A vector per member of each record: the sum over codes of what text-conditioned weights make of the code's summaries.

    For a code with inputs x (P,) and whitened text e (E,), g = G e and g2 = G2 e (R,): h = GELU(x (A + sum_r g_r B_r) + b + U e),
    v = h sum_r g2_r B2_r, and member m gets 2 / sqrt(C + 1) times the sum over codes of a[m, c] v. A code that a record lacks has
    the same inputs in all records, so that its part is found once per batch; cost follows the codes that occur.
    """

    signs: Tensor
    vectors: Tensor

    def __init__(
        self,
        *,
        embedding_dim: int,
        has_values: bool,
        model_dim: int,
        hidden_dim: int,
        n_gates: int,
        n_members: int,
        dropout: float,
        windows_hours: Sequence[float],
        member_weights: str,
        feeds_absent: bool,
        age: bool,
        shrinkage: float,
        code_dropout: float,
        text_noise: float,
    ) -> None:
        super().__init__()
        self.code_dropout, self.text_noise = code_dropout, text_noise
        self.embedding_dim, self.n_members, self.n_gates = embedding_dim, n_members, n_gates
        self.feeds_absent, self.hidden_dim = feeds_absent, hidden_dim
        self.input = CodeSummaries(has_values=has_values, windows_hours=windows_hours)
        self.norm = Whitening(embedding_dim, shrinkage)
        self.gates, self.gates2 = (_reads_text(embedding_dim, n_gates) for _ in range(2))
        self.shared = nn.Linear(N_INPUTS, hidden_dim)
        self.text = nn.Linear(embedding_dim, hidden_dim, bias=False)
        self.weights1 = nn.Parameter(torch.randn(n_gates, N_INPUTS, hidden_dim) * (n_gates * N_INPUTS) ** -0.5)
        self.weights2 = nn.Parameter(torch.randn(n_gates, hidden_dim, model_dim) * (n_gates * hidden_dim) ** -0.5)
        self.dropout = Dropout(dropout)
        self.subject = Subject(model_dim) if age else None
        self.subject_signs = nn.Parameter(_signs(n_members, 1)[:, 0]) if age else None
        self.from_text = _reads_text(embedding_dim, n_members) if member_weights == "text" else None
        self.register_buffer("vectors", torch.zeros(0, embedding_dim), persistent=False)
        self.register_parameter("signs", None)
        self.register_load_state_dict_pre_hook(_as_many_signs)

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the known codes' vectors; they are no buffer of the `state_dict`, since the data set their number."""
        return {"vectors": self.vectors.cpu()}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take the vectors of another run's codes."""
        self.vectors = state["vectors"].to(self.vectors.device)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Take what the token ids of coming batches mean, and at first which codes there are."""
        self.input.set_vocabulary(vocabulary)
        n_codes = self.input.n_codes
        if not len(self.vectors):
            self.vectors = torch.zeros(n_codes, self.embedding_dim, device=self.vectors.device)
        if self.from_text is None and self.signs is None:
            self.register_parameter("signs", nn.Parameter(_signs(self.n_members, n_codes)))

    def pool(self, matches: Mapping[str, tuple[str, float]], dataset_of: Mapping[str, int] | None = None) -> None:
        """Read the codes of pooled datasets as those that `matches` names, see `CodeSummaries.pool`."""
        self.input.pool(matches, dataset_of)
        self.vectors = torch.zeros(self.input.n_codes, self.embedding_dim, device=self.vectors.device)
        if self.signs is not None:
            self.register_parameter("signs", nn.Parameter(_signs(self.n_members, self.input.n_codes)))

    @torch.no_grad()
    def take_vectors(self, vectors: Tensor, tokens: Tensor) -> None:
        """Take the vectors (K, E) of train's tokens (K,): a code's is the mean of those of its tokens; fit the whitening.

        Directions in which no text varies are zero after it. The weights that read texts are scaled to what is left, as if these
        directions had been dropped before they were drawn.
        """
        self.vectors = self.input.vectors_of(vectors, tokens)
        self.norm.fit(self.vectors)
        n_directions = int((self.norm.matrix != 0).any(0).sum())
        scale = (self.embedding_dim / max(n_directions, 1)) ** 0.5
        self.norm.matrix /= scale
        for reads in (self.gates, self.gates2, self.text, self.from_text):
            if reads is not None:
                reads.weight *= scale

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return (B, M, D) of what `EventEmbedding.inputs` gives."""
        pairs, n_rows, n_known = self.input(inputs), len(inputs["padding_mask"]), self.input.n_codes
        if self.training and self.code_dropout:
            pairs = pairs.only(torch.rand(len(pairs.row), device=pairs.row.device) >= self.code_dropout, n_rows)
        vectors_CE = self.input.with_new(self.vectors, inputs, pairs)
        x_GP = self.input.normalise(pairs)
        is_dense = len(vectors_CE) == n_known and self._is_dense_cheaper(n_rows, len(pairs.row))
        # Only counting tells which codes are frequent.
        if self.feeds_absent or is_dense or not reads_freely(x_GP.device):
            e_CE = self._texts(vectors_CE)
            part = self._dense if is_dense else partial(self._sparse, most=pairs.most)
            z_BMD = part(n_rows, pairs.row, pairs.code, x_GP, e_CE, self._member_weights(e_CE))
        else:
            z_BMD = self._by_frequency(n_rows, pairs, x_GP, vectors_CE)
        if self.subject is not None and self.subject_signs is not None:
            z_BMD = z_BMD + self.subject_signs[:, None] * self.subject(inputs)[:, None]
        return 2 / (n_known + 1) ** 0.5 * z_BMD

    def _texts(self, vectors_CE: Tensor) -> Tensor:
        """Return the whitened vectors (C, E) float32, in training with noise."""
        with without_autocast(vectors_CE):
            e_CE = self.norm(vectors_CE)
        return e_CE + self.text_noise * torch.randn_like(e_CE) if self.training and self.text_noise else e_CE

    def _member_weights(self, e_CE: Tensor) -> Tensor:
        """Return weights (C + J, M); without weights from texts, a new code has those of the known code with the nearest text."""
        if self.from_text is not None:
            return self.from_text(e_CE)
        signs_CM, n_known = self.signs.T, self.input.n_codes
        if len(e_CE) > n_known:
            unit = F.normalize(e_CE, dim=1)
            nearest = (unit[n_known:] @ unit[:n_known].T).argmax(1)
            signs_CM = torch.cat([signs_CM, signs_CM[nearest]])
        return signs_CM

    def _is_dense_cheaper(self, n_rows: int, n_pairs: int) -> bool:
        """Return whether one weight matrix per code, applied to all codes of all records, costs fewer products than the shared
        matrices applied to the codes that occur."""
        n_codes, n_gates, model_dim = self.input.n_codes, self.n_gates, self.weights2.shape[2]
        dense = n_codes * self._products_of_code(n_rows)
        sparse = (n_pairs + n_codes) * self._products_of_pair()
        return dense < sparse + n_rows * self.n_members * n_gates * self.hidden_dim * model_dim

    def _products_of_code(self, n_rows: int) -> int:
        """Return the products that one code costs in `_dense`."""
        return (N_INPUTS * self.hidden_dim + self.hidden_dim * self.weights2.shape[2]) * (n_rows + self.n_gates)

    def _products_of_pair(self) -> int:
        """Return the products that one pair of a record and a code costs in `_sparse`."""
        return (1 + self.n_gates) * N_INPUTS * self.hidden_dim + self.n_members * self.n_gates * self.hidden_dim

    def _by_frequency(self, n_rows: int, pairs: Pairs, x_GP: Tensor, vectors_CE: Tensor) -> Tensor:
        """Return (B, M, D) of the codes that occur, where others add nothing: frequent ones code by code, rare ones pair by pair.

        Hospitals that are pooled share a few codes that all records have, and have thousands that few records have.
        """
        n_C = pairs.code.bincount(minlength=len(vectors_CE))
        codes_U = n_C.nonzero().squeeze(1)
        e_UE = self._texts(vectors_CE[codes_U])
        if self.from_text is None and len(vectors_CE) > self.input.n_codes:
            # A new code takes the weights of the nearest known one, which need not occur here.
            a_UM = self._member_weights(self._texts(vectors_CE))[codes_U]
        else:
            a_UM = self.signs.T[codes_U] if self.from_text is None else self.from_text(e_UE)
        number_G = ((n_C > 0).long().cumsum(0) - 1)[pairs.code]
        is_frequent_U = n_C[codes_U] * self._products_of_pair() > self._products_of_code(n_rows)
        z_BMD = self.weights2.new_zeros(n_rows, self.n_members, self.weights2.shape[2])
        for is_chosen_U, part in ((is_frequent_U, self._dense), (~is_frequent_U, self._sparse)):
            chosen = is_chosen_U.nonzero().squeeze(1)
            if len(chosen):
                in_G = is_chosen_U[number_G]
                code_G = (is_chosen_U.long().cumsum(0) - 1)[number_G[in_G]]
                z_BMD = z_BMD + part(n_rows, pairs.row[in_G], code_G, x_GP[in_G], e_UE[chosen], a_UM[chosen])
        return z_BMD

    def _dense(self, n_rows: int, row_G: Tensor, code_G: Tensor, x_GP: Tensor, e_CE: Tensor, a_CM: Tensor) -> Tensor:
        """Return (B, M, D) of all codes in all records, code by code."""
        n_codes, n_all = len(e_CE), n_rows + (not reads_freely(x_GP.device))  # one more row for places without a pair
        g_CR, g2_CR, t_CH = self.gates(e_CE), self.gates2(e_CE), self.text(e_CE)
        if self.feeds_absent:
            x_CBP = self.input.absent()[:, None].expand(-1, n_all, -1)
        else:
            x_CBP = x_GP.new_zeros(n_codes, n_all, x_GP.shape[1])
        x_CBP = x_CBP.index_put((code_G, row_G), x_GP)[:, :n_rows]
        w_CPH = self.shared.weight.T + torch.einsum("cr,rph->cph", g_CR, self.weights1)
        h_CBH = self.dropout(F.gelu(x_CBP @ w_CPH + (self.shared.bias + t_CH)[:, None]))
        if not self.feeds_absent:
            is_there_CB = torch.zeros(n_codes, n_all, dtype=torch.bool, device=x_GP.device)
            is_there_CB[code_G, row_G] = True
            h_CBH = h_CBH * is_there_CB[:, :n_rows, None]
        v_CBD = h_CBH @ torch.einsum("cr,rhd->chd", g2_CR, self.weights2)
        return torch.einsum("cm,cbd->bmd", a_CM, v_CBD)

    def _sparse(
        self,
        n_rows: int,
        row_G: Tensor,
        code_G: Tensor,
        x_GP: Tensor,
        e_CE: Tensor,
        a_CM: Tensor,
        *,
        most: int | None = None,
    ) -> Tensor:
        """Return (B, M, D) from the pairs that occur, ascending by record, at most `most` of each, and, once for all records, the
        known codes' parts where they are absent.

        The second matrix is a sum over gates, so that hidden vectors are added up over codes, with weights a g2, before it.
        """
        n_known = self.input.n_codes
        g_CR, g2_CR, t_CH = self.gates(e_CE), self.gates2(e_CE), self.text(e_CE)
        k_CK = (a_CM[:, :, None] * g2_CR[:, None]).flatten(1)  # K = members x gates
        h_GH = self._hidden(x_GP, g_CR[code_G], t_CH[code_G])
        total_KH: Tensor | float = 0.0
        if self.feeds_absent:
            absent_CH = self._hidden(self.input.absent(), g_CR[:n_known], t_CH[:n_known])
            total_KH = k_CK[:n_known].T @ absent_CH
            is_known = (code_G < n_known)[:, None]
            h_GH = h_GH - absent_CH[code_G.clamp(max=n_known - 1)] * is_known
        if not reads_freely(row_G.device):
            assert most is not None
            sums_BKH = _sums_at_most(n_rows, most, row_G, k_CK[code_G], h_GH) + total_KH
            return sums_BKH.view(n_rows, self.n_members, -1) @ self.weights2.flatten(0, 1)
        parts, rows = [], []
        for rows_L, sums_LKH in _sums_of_products(n_rows, row_G, k_CK[code_G], h_GH):
            parts.append((sums_LKH + total_KH).view(len(rows_L), self.n_members, -1) @ self.weights2.flatten(0, 1))
            rows.append(rows_L)
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def _hidden(self, x_GP: Tensor, g_GR: Tensor, t_GH: Tensor) -> Tensor:
        """Return the hidden vectors (G, H).

        The first matrix is a sum over gates, so that all of them read the products of inputs and gates.
        """
        products = (g_GR[:, :, None] * x_GP[:, None]).flatten(1)
        return self.dropout(F.gelu(self.shared(x_GP) + products @ self.weights1.flatten(0, 1) + t_GH))


def _sums_of_products(n_rows: int, row_G: Tensor, k_GK: Tensor, h_GH: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some records (L,) and for each of them the sum (L, K, H) of the outer products of its pairs, which ascend by record.

    Records of about one length lie side by side, each with as many places as the longest of them has pairs: a few long records
    would otherwise fill all others with zeros.

    >>> row, k, h = torch.tensor([0, 2, 2]), torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> [(rows.tolist(), sums.tolist()) for rows, sums in _sums_of_products(3, row, k, h)]
    [([1], [[[0.0, 0.0]]]), ([0], [[[1.0, 0.0]]]), ([2], [[[3.0, 5.0]]])]
    """
    n_B = row_G.bincount(minlength=n_rows)
    place_G = torch.arange(len(row_G), device=row_G.device) - (n_B.cumsum(0) - n_B)[row_G]
    size_B = torch.frexp(n_B.float()).exponent  # n < 2**size
    for size in size_B.unique().tolist():
        has_size_B = size_B == size
        rows_L = has_size_B.nonzero().squeeze(1)
        in_G = has_size_B[row_G]
        where = ((has_size_B.long().cumsum(0) - 1)[row_G[in_G]], place_G[in_G])
        shape = len(rows_L), int(n_B[rows_L].max())
        k_LSK = k_GK.new_zeros(*shape, k_GK.shape[1]).index_put(where, k_GK[in_G])
        h_LSH = h_GH.new_zeros(*shape, h_GH.shape[1]).index_put(where, h_GH[in_G])
        yield rows_L, k_LSK.transpose(1, 2) @ h_LSH


def _sums_at_most(n_rows: int, most: int, row_G: Tensor, k_GK: Tensor, h_GH: Tensor) -> Tensor:
    """Return for all records what `_sums_of_products` yields, (B, K, H), without counting: each record has `most` places.

    >>> row, k, h = torch.tensor([0, 3, 2, 2]), torch.tensor([[1.0], [7.0], [2.0], [3.0]]), torch.ones(4, 1)
    >>> _sums_at_most(3, 2, row, k, h).flatten().tolist()  # the second pair is of no record
    [1.0, 0.0, 5.0]
    """
    is_there_G = (row_G < n_rows).long()
    n_B = is_there_G.new_zeros(n_rows + 1).index_add(0, row_G, is_there_G)
    place_G = (is_there_G.cumsum(0) - 1 - (n_B.cumsum(0) - n_B)[row_G]).clamp(0, most - 1)
    k_BSK = k_GK.new_zeros(n_rows + 1, most, k_GK.shape[1]).index_put((row_G, place_G), k_GK)
    h_BSH = h_GH.new_zeros(n_rows + 1, most, h_GH.shape[1]).index_put((row_G, place_G), h_GH)
    return k_BSK[:n_rows].transpose(1, 2) @ h_BSH[:n_rows]


def _as_many_signs(body: CodeTabBody, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Make room for the signs of another number of codes: a run that is aligned with another has the other's codes."""
    saved = state.get(f"{prefix}signs")
    if saved is not None and body.signs is not None and saved.shape != body.signs.shape:
        body.register_parameter("signs", nn.Parameter(torch.empty_like(saved, device=body.signs.device)))


def _signs(n_members: int, n_codes: int) -> Tensor:
    """Draw (M, C) of 1 and -1."""
    return torch.randint(0, 2, (n_members, n_codes)).float() * 2 - 1


def _reads_text(embedding_dim: int, n_outputs: int) -> nn.Linear:
    """Return a map from a text's vector to numbers of variance 1."""
    weight = nn.Linear(embedding_dim, n_outputs, bias=False)
    nn.init.normal_(weight.weight, std=embedding_dim**-0.5)
    return weight
