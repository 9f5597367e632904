"""Seventeen numbers per code of a record: how many events, which values, and when, counted back from the prediction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.core.transfer import kept_on, reads_freely
from ehr_embed.data.store import HOURS_PER_DAY
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.models.aligned import CodeMatches, fit_quantiles
from ehr_embed.models.body import check_width
from ehr_embed.models.groups import Groups, grouped_by
from ehr_embed.models.quantiles import QuantileNormal
from ehr_embed.models.reads_codes import ReadsCodes, event_places

N_WINDOWS = 4
N_SUMMARIES = 9 + 2 * N_WINDOWS
"""Count; first, last, mean, least, greatest value and their standard deviation; hours to the first and the last event; the count in
each window, then the mean value in each."""
COUNTS = (0, *range(9, 9 + N_WINDOWS))
"""The summaries that are known of a code without events: all are 0."""


class Pairs(NamedTuple):
    """The codes that occur in the records of a batch, G pairs of a record and a code, ascending.

    On a GPU, where counting pairs would make the host wait, some of the G places hold no pair; they may lie between others.

    Attributes:
        row: (G,) int64, the record; the number of records where there is no pair.
        code: (G,) int64, the code; from `n_codes` on, codes that train never had.
        summaries: (G, 17) float32, NaN = missing; normal scores of an aligned dataset.
        last_place: (G,) int64, the place b * T + t of the last event of each pair.
        most: upper bound of the pairs of one record.
    """

    row: Tensor
    code: Tensor
    summaries: Tensor
    last_place: Tensor
    most: int

    def only(self, keep_G: Tensor, n_rows: int) -> Pairs:
        """Return the pairs at `keep_G` (G,) bool, of a batch of `n_rows` records."""
        if not reads_freely(keep_G.device):
            return self._replace(row=self.row.where(keep_G, n_rows))
        row_K, code_K, summaries_KF, last_K = (x[keep_G] for x in self[:4])
        return Pairs(row_K, code_K, summaries_KF, last_K, self.most)


class CodeSummaries(ReadsCodes):
    """Sums up the events of each code of a record, and normalises the numbers by train's quantiles.

    Known codes are those that occur in train of the first vocabulary it is given; they are part of the `state_dict`, by name, with
    the quantiles. Events without a code (the unknown event) are ignored. After `align`, the codes of another dataset are read as
    known ones, with quantiles of their own.

    Args:
        has_values: whether batches carry a number beside each event.
        windows_hours: where the four windows end, counted back from the prediction.

    Raises:
        UserError: not four ascending numbers of hours above 0.
    """

    code_of_token: Tensor

    def __init__(self, *, has_values: bool, windows_hours: Sequence[float]) -> None:
        super().__init__(has_values=has_values)
        edges = [0.0, *map(float, windows_hours)]
        if len(edges) != N_WINDOWS + 1 or any(b <= a for a, b in pairwise(edges)):
            raise UserError(
                f"model.windows_hours={list(windows_hours)}: expected four ascending numbers of hours above 0, at which "
                "the windows "
                "before the prediction time end. Type: model.windows_hours=[12,24,36,48]"
            )
        self.ends = torch.tensor(edges[1:], dtype=torch.float64)
        self.codes: list[str] = []
        self.matches: CodeMatches | None = None
        self.quantiles = QuantileNormal(N_SUMMARIES)
        self.register_buffer("code_of_token", torch.empty(0, dtype=torch.int64), persistent=False)
        # The matches load their state after this module.
        self.register_load_state_dict_post_hook(_match_after_load)

    @property
    def n_codes(self) -> int:
        """Return the number C of known codes."""
        return len(self.codes)

    @property
    def n_new(self) -> int:
        """Return the number J of the vocabulary's codes that train never had."""
        return 0 if self.matches is not None else self.n_slots - self.n_codes

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Take what the token ids of coming batches mean; the codes of the first vocabulary that occur in train are the known ones.

        Raises:
            UserError: none occurs in train.
        """
        super().set_vocabulary(vocabulary)
        if not self.codes:
            counts = vocabulary.tokens["count"].to_list()
            if not any(counts):  # of no train, such as a vocabulary of texts alone
                counts = [1] * len(counts)
            found = {c: None for c, n in zip(self.token_codes, counts, strict=True) if c is not None and n}
            if not found:
                raise UserError("no event of train has a code of the vocabulary, so there is nothing to summarise.")
            self._know(list(found))
        self._match()

    def _know(self, codes: list[str]) -> None:
        self.codes = codes
        # A last column, without numbers, stands for all codes that train never had.
        device = self.quantiles.offsets.device
        self.quantiles.offsets = torch.zeros((self.n_codes + 1) * N_SUMMARIES + 1, dtype=torch.int64, device=device)

    def align(self, matches: Mapping[str, tuple[str, float]] | None, twins: Mapping[str, str] | None = None) -> None:
        """Read the codes of the present vocabulary as the known codes that `matches` names, with their gates, and leave all others
        out; None = read codes as they are. A known code in `twins` gets the events of the code that `twins` names for it. `fit`
        then fits the matched codes' own quantiles."""
        self.matches = None
        if matches is not None:
            found = CodeMatches(self.codes, n_summaries=N_SUMMARIES, counts=COUNTS)
            found.match(matches, twins=twins)
            self.matches = found.to(self.code_of_token.device)
        self._match()

    def pool(self, matches: Mapping[str, tuple[str, float]], dataset_of: Mapping[str, int] | None = None) -> None:
        """Read the codes of pooled datasets, in training too, as those that `matches` names, which become the known ones; numbers
        are ranked among those of their own dataset.

        Args:
            matches: code -> code as which it is read, and gate.
            dataset_of: number of each code's dataset, -1 = all; needed for `fit` alone.
        """
        known = set(self.codes)
        self._know(list(dict.fromkeys(to for code, (to, _) in matches.items() if code in known)))
        self.matches = CodeMatches(self.codes, n_summaries=N_SUMMARIES, counts=COUNTS)
        self.matches.match({code: match for code, match in matches.items() if code in known}, dataset_of)
        self.matches.to(self.code_of_token.device)
        self._match()

    def _match(self) -> None:
        number = {code: i for i, code in enumerate(self.codes if self.matches is None else self.matches.codes)}
        if self.matches is None:
            for code in self.token_codes:
                if code is not None:
                    number.setdefault(code, len(number))
        self.n_slots = max(len(number), 1)
        found = [-1 if code is None else number.get(code, -1) for code in self.token_codes]
        self.code_of_token = torch.tensor(found, dtype=torch.int64, device=self.code_of_token.device)

    def get_extra_state(self) -> dict[str, list[str]]:
        """Return the known codes."""
        return {"codes": self.codes}

    def set_extra_state(self, state: Any) -> None:
        """Take the codes of another run."""
        self._know(list(state["codes"]))
        self._match()

    def slots_of(self, tokens: Tensor) -> Tensor:
        """Return the code's number of each token id, -1 for none."""
        return self.code_of_token[tokens]

    def known_of(self, tokens: Tensor) -> Tensor:
        """Return the number of the known code as which each token id is read, -1 for none."""
        slots = self.slots_of(tokens)
        return slots if self.matches is None else torch.where(slots < 0, slots, self.matches.known_of[slots])

    def vectors_of(self, vectors: Tensor, tokens: Tensor) -> Tensor:
        """Return the vectors (C, E) float32 of the known codes: the mean of the vectors (K, E) of each code's tokens among (K,)."""
        code_K = self.known_of(tokens.to(vectors.device))
        vectors, code_K = vectors[code_K >= 0].float(), code_K[code_K >= 0]
        n_C = code_K.bincount(minlength=self.n_codes).clamp(min=1)
        return vectors.new_zeros(len(n_C), vectors.shape[1]).index_add(0, code_K, vectors) / n_C[:, None]

    def with_new(self, vectors_CE: Tensor, inputs: dict[str, Tensor], pairs: Pairs) -> Tensor:
        """Return vectors (C + J, E): of the C known codes the given ones, then, if any of the vocabulary's J other codes occurs,
        those that their events have; on a GPU these come whether one occurs or not, with zeros for those that do not.

        Raises:
            UserError: the events' vectors have another width.
        """
        if not self.n_new:
            return vectors_CE
        is_new_G = (pairs.code >= self.n_codes) & (pairs.row < len(inputs["padding_mask"]))
        if reads_freely(is_new_G.device) and not bool(is_new_G.any()):
            return vectors_CE
        place_J = Groups((pairs.code - self.n_codes).where(is_new_G, self.n_new), self.n_new).greatest(pairs.last_place)
        at_J = place_J.clamp(min=0)
        if "rows" in inputs:
            found_JE = inputs["rows"][inputs["row_ids"].flatten()[at_J].long()]
        else:
            found_JE = inputs["embeddings"].flatten(0, 1)[at_J]
        check_width(found_JE, vectors_CE.shape[1])
        return torch.cat([vectors_CE, found_JE.float() * (place_J >= 0)[:, None]])

    @torch.no_grad()
    def forward(self, inputs: dict[str, Tensor]) -> Pairs:
        """Return the pairs of a batch from `token_ids`, `days` and, where there are any, `values` (B, T), NaN = none, and
        `padding_mask` (B, T), True = event."""
        pairs, (n_rows, n_places) = self._pairs(inputs), inputs["padding_mask"].shape
        if self.matches is None:
            return pairs
        row_K, code_K, scores_KF, groups = self.matches.merged(*pairs[:3], n_rows)
        last_K = groups.greatest(pairs.last_place)
        row_K, code_K, of_K = self.matches.with_twins(row_K, code_K, n_rows)
        scores_KF, last_K = scores_KF[of_K], last_K[of_K]
        if len(self.quantiles.knots):  # those of train, which a pool's ranks have no need of
            # A number that train never had, or that was the same in all its records, was 0 in training: no weight was fitted to it.
            n_knots_KF = self.quantiles.offsets.diff()[self._columns(code_K)]
            scores_KF = scores_KF.masked_fill(n_knots_KF < 2, float("nan"))
        return Pairs(row_K, code_K, scores_KF, last_K, self.matches.most_per_record(n_places))

    def _pairs(self, inputs: dict[str, Tensor]) -> Pairs:
        """Return the pairs of a record and a code of the present vocabulary."""
        n_rows, n_places = inputs["padding_mask"].shape
        n_keys, place_N = n_rows * self.n_slots, event_places(inputs)
        code_N = self.slots_of(self.tokens(inputs).flatten()[place_N])
        if reads_freely(place_N.device):
            place_N, code_N = (x[code_N >= 0] for x in (place_N, code_N))
            key_N = place_N // n_places * self.n_slots + code_N
        else:  # a task may have hidden events whose places are still given
            is_read_N = (code_N >= 0) & inputs["padding_mask"].flatten()[place_N]
            key_N = (place_N // n_places * self.n_slots + code_N).where(is_read_N, n_keys)
        key_G, groups = grouped_by(key_N, n_keys)
        values_N = self.values(inputs).flatten()[place_N].float()
        hours_N = inputs["days"].flatten()[place_N] * HOURS_PER_DAY
        summaries_GF, last_G = self._sum_up(groups, values_N, hours_N), groups.greatest(place_N)
        most = min(n_places, self.n_slots)
        return Pairs(key_G // self.n_slots, key_G % self.n_slots, summaries_GF, last_G, most)

    def _sum_up(self, groups: Groups, values_N: Tensor, hours_N: Tensor) -> Tensor:
        has_value_N = ~values_N.isnan()
        valued, x_M = groups.only(has_value_N, values_N)
        mean_G = valued.mean(x_M)
        sd_G = valued.mean((x_M - valued.spread(mean_G)).square()).sqrt()
        parts = [groups.count(), valued.first(x_M), valued.last(x_M), mean_G]
        parts += [valued.extreme(x_M, "amin"), valued.extreme(x_M, "amax"), sd_G]
        parts += [groups.extreme(hours_N, "amax"), groups.extreme(hours_N, "amin")]
        # The last window that an event lies before the end of; beyond the fourth there is none.
        window_N = torch.bucketize(hours_N, kept_on(hours_N.device, self.ends).to(hours_N.dtype))
        by_window, is_in_N = groups.within(window_N, N_WINDOWS), window_N < N_WINDOWS
        counts_GW = by_window.only(is_in_N, values_N)[0].count().view(-1, N_WINDOWS)
        valued, x_M = by_window.only(is_in_N & has_value_N, values_N)
        means_GW = valued.mean(x_M).view(-1, N_WINDOWS)
        return torch.cat([torch.stack([part.float() for part in parts], dim=1), counts_GW.float(), means_GW], dim=1)

    def normalise(self, pairs: Pairs) -> Tensor:
        """Return the inputs of each pair of record and code, (G, 18): 17 normal scores, then 0, since the code is not absent."""
        if self.matches is not None:
            return torch.nn.functional.pad(pairs.summaries.nan_to_num(), (0, 1))
        columns_GF = self._columns(pairs.code.clamp(max=self.n_codes))
        return torch.nn.functional.pad(self.quantiles(columns_GF, pairs.summaries), (0, 1))

    def absent(self) -> Tensor:
        """Return the inputs of each known code that a record lacks, (C, 18)."""
        numbers_CF = torch.full((self.n_codes, N_SUMMARIES), float("nan"), device=self.code_of_token.device)
        # Not by `COUNTS` at once: a list of numbers would be copied to a GPU, for which the host would wait.
        numbers_CF[:, 0] = 0.0
        numbers_CF[:, COUNTS[1] :][:, :N_WINDOWS] = 0.0
        columns_CF = self._columns(torch.arange(self.n_codes, device=numbers_CF.device))
        return torch.nn.functional.pad(self.quantiles(columns_CF, numbers_CF), (0, 1), value=1.0)

    def _columns(self, code_G: Tensor) -> Tensor:
        return code_G[:, None] * N_SUMMARIES + torch.arange(N_SUMMARIES, device=code_G.device)

    @torch.no_grad()
    def fit(self, train: Iterable[dict[str, Tensor]], *, seed: int = 0) -> None:
        """Fit the quantiles, after `align` the matched codes' own, to records at their prediction times; `train` gives each batch
        once."""

        def parts() -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
            for inputs in train:
                pairs = self._pairs(inputs)
                yield *pairs[:3], len(inputs["padding_mask"])

        if self.matches is not None:
            self.matches.fit(parts(), seed=seed)
            return
        fit_quantiles(
            self.quantiles, parts(), n_codes=self.n_codes, counts=list(COUNTS), columns=self._columns, seed=seed
        )


def _match_after_load(summaries: CodeSummaries, _: object) -> None:
    summaries._match()
