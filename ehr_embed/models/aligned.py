"""Read another dataset's codes as those that a model knows: summaries of each code, ranked among its own and merged by gate.

Suffixes: J codes of the dataset that have a match, C known codes, G pairs of a record and a code, F summaries per code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ehr_embed.core.transfer import reads_freely
from ehr_embed.models.groups import Groups, grouped_by
from ehr_embed.models.quantiles import QuantileNormal

MAX_FITTED = 2**21
"""Pairs of a record and a code that quantiles are fitted to, at most; of more, records are drawn."""


class CodeMatches(nn.Module):
    """The known code as which each matched code of another dataset is read, how far it counts, and its numbers' quantiles.

    Each number of a matched code becomes the normal score of its rank among the same code's numbers in the other dataset, which
    needs no labels and no common unit. Where several matched codes of one known code occur in a record, the scores of each summary
    are averaged, weighted by gate, over those that have the summary.

    Args:
        known: the known codes (C,), by name.
        n_summaries: F.
        counts: the summaries that are 0 where a record lacks the code; others are missing there.
    """

    known_of: Tensor
    gates: Tensor
    twins: Tensor

    def __init__(self, known: list[str], *, n_summaries: int, counts: tuple[int, ...]) -> None:
        super().__init__()
        self.known, self.n_summaries, self.counts = known, n_summaries, list(counts)
        self.codes: list[str] = []
        self.register_buffer("known_of", torch.empty(0, dtype=torch.int64), persistent=False)
        self.register_buffer("gates", torch.empty(0), persistent=False)
        self.register_buffer("twins", torch.empty(0, 2, dtype=torch.int64), persistent=False)
        self.dataset_of, self.n_read, self.most_twins = torch.empty(0, dtype=torch.int64), 0, 0
        self.quantiles = QuantileNormal(0)

    def match(
        self,
        matches: Mapping[str, tuple[str, float]],
        dataset_of: Mapping[str, int] | None = None,
        twins: Mapping[str, str] | None = None,
    ) -> None:
        """Take the matches: code of the other dataset -> known code and gate above 0. Those of unknown codes are left out.

        Args:
            matches: by code.
            dataset_of: number of each code's dataset in a pool, -1 = all: a record lacks the codes of its own dataset only. None =
                there is one dataset.
            twins: code -> matched code, whose events it gets too. Where the matched code is unknown, such as one that a run did not
                choose, its first known twin takes its place.
        """
        number = {code: i for i, code in enumerate(self.known)}
        instead: dict[str, str] = {}
        for twin, code in (twins or {}).items():
            if twin in number and code not in number:
                instead.setdefault(code, twin)
        as_known = {code: (instead.get(to, to), gate) for code, (to, gate) in matches.items()}
        found = {code: (number[to], gate) for code, (to, gate) in as_known.items() if to in number and gate > 0}
        self.codes = list(found)
        device = self.quantiles.offsets.device
        # Without a match there is one that no event has, since a GPU reads an entry for places without a pair too.
        known_gates = [*found.values()] or [(0, 0.0)]
        self._take_known(torch.tensor([known for known, _ in known_gates], dtype=torch.int64), device)
        self.gates = torch.tensor([gate for _, gate in known_gates], dtype=torch.float32, device=device)
        leads = [(instead.get(code, code), twin) for twin, code in (twins or {}).items()]
        of_twins = [(number[a], number[b]) for a, b in leads if a != b and {a, b} <= number.keys()]
        self._take_twins(torch.tensor(sorted(of_twins), dtype=torch.int64).view(-1, 2), device)
        self.dataset_of = torch.tensor([-1 if dataset_of is None else dataset_of[code] for code in found])
        self.quantiles = QuantileNormal(len(known_gates) * self.n_summaries).to(device)

    def columns(self, code_G: Tensor) -> Tensor:
        """Return the column of each summary of the codes, (G, F)."""
        return code_G[:, None] * self.n_summaries + torch.arange(self.n_summaries, device=code_G.device)

    @torch.no_grad()
    def fit(self, parts: Iterable[tuple[Tensor, Tensor, Tensor, int]], *, seed: int = 0) -> None:
        """Fit the quantiles to the other dataset's records; `parts` gives for each batch the row (G,) and the code (G,) of its
        pairs, their summaries (G, F), NaN = missing, and the number of records."""
        fit_quantiles(
            self.quantiles,
            parts,
            n_codes=len(self.codes),
            counts=self.counts,
            columns=self.columns,
            seed=seed,
            dataset_of=self.dataset_of,
        )

    def merged(
        self, row_G: Tensor, code_G: Tensor, numbers_GF: Tensor, n_rows: int
    ) -> tuple[Tensor, Tensor, Tensor, Groups]:
        """Return the pairs of record and known code that the pairs of record and matched code amount to.

        Args:
            row_G: the record (G,); on a GPU `n_rows` where there is no pair.
            code_G: the matched code (G,).
            numbers_GF: summaries (G, F), NaN = missing.
            n_rows: number of records.

        Returns:
            row (K,) as above, known code (K,), ascending by row and code; the normal score of each summary, (K, F), NaN = missing;
            and the groups of pairs (G,) that became one of K.
        """
        z_GF = self.quantiles(self.columns(code_G), numbers_GF).masked_fill(numbers_GF.isnan(), float("nan"))
        n_keys = n_rows * self._n_known
        key_K, groups = grouped_by((row_G * self._n_known + self.known_of[code_G]).clamp(max=n_keys), n_keys)
        weight_GF = self.gates[code_G][:, None] * ~z_GF.isnan()
        scores_KF = groups.total(weight_GF * z_GF.nan_to_num()) / groups.total(weight_GF)  # 0 / 0 = NaN, missing
        return key_K // self._n_known, key_K % self._n_known, scores_KF, groups

    def with_twins(self, row_K: Tensor, code_K: Tensor, n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the record (L,), the known code (L,) and the pair (L,) of which each comes, ascending by record and code, of pairs
        of a record (K,) and a known code (K,) and of their twins; on a GPU the record is `n_rows` where there is no pair."""
        every_K = torch.arange(len(code_K), device=code_K.device)
        if not len(self.twins):
            return row_K, code_K, every_K
        lead_N = self.twins[:, 0].contiguous()  # ascending
        first_K = torch.searchsorted(lead_N, code_K)
        n_K = torch.searchsorted(lead_N, code_K, right=True) - first_K
        counts = reads_freely(code_K.device)
        # Without counting, each pair has as many places as the code with the most twins needs.
        of_twin = every_K.repeat_interleave(n_K if counts else self.most_twins)
        # Its number among the twins of its code.
        place = torch.arange(len(of_twin), device=code_K.device)
        place = place - (n_K.cumsum(0) - n_K)[of_twin] if counts else place % self.most_twins
        twin = self.twins[(first_K[of_twin] + place).clamp(max=len(self.twins) - 1), 1]
        code_L, of_L = torch.cat([code_K, twin]), torch.cat([every_K, of_twin])
        key_L = row_K[of_L] * self._n_known + code_L
        if not counts:
            n_keys, is_twin = n_rows * self._n_known, place < n_K[of_twin]
            key_L = key_L.where(torch.cat([torch.ones_like(every_K, dtype=torch.bool), is_twin]), n_keys)
            key_L = key_L.clamp(max=n_keys)
        order = key_L.argsort()
        if not counts:  # places without a pair come last
            order = order[: n_rows * self.most_per_record(len(code_K))]
        return key_L[order] // self._n_known, key_L[order] % self._n_known, of_L[order]

    def most_per_record(self, n_events: int) -> int:
        """Return the largest number of pairs, twins included, that a record of `n_events` events can have."""
        return min(min(n_events, self.n_read) + len(self.twins), n_events * (1 + self.most_twins))

    @property
    def _n_known(self) -> int:
        return max(len(self.known), 1)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the matches; the quantiles have a state of their own."""
        return {
            "codes": self.codes,
            "known": self.known,
            "known_of": self.known_of.cpu(),
            "gates": self.gates.cpu(),
            "twins": self.twins.cpu(),
        }

    def set_extra_state(self, state: Any) -> None:
        """Take the matches of another run."""
        device = self.quantiles.offsets.device
        self.codes, self.known = list(state["codes"]), list(state["known"])
        self._take_known(state["known_of"], device)
        self.gates = state["gates"].to(device)
        twins = state.get("twins", torch.empty(0, 2, dtype=torch.int64))  # earlier versions had none
        self._take_twins(twins[twins[:, 0].argsort(stable=True)], device)

    def _take_known(self, known_of: Tensor, device: torch.device) -> None:
        self.n_read = len(known_of.unique())
        self.known_of = known_of.to(device)

    def _take_twins(self, twins: Tensor, device: torch.device) -> None:
        self.most_twins = int(twins[:, 0].bincount().max()) if len(twins) else 0
        self.twins = twins.to(device)


def fit_quantiles(
    quantiles: QuantileNormal,
    parts: Iterable[tuple[Tensor, Tensor, Tensor, int]],
    *,
    n_codes: int,
    counts: list[int],
    columns: Callable[[Tensor], Tensor],
    seed: int = 0,
    dataset_of: Tensor | None = None,
) -> None:
    """Fit quantiles to pairs of a record and a code; a code that a record lacks has the summaries `counts`, all 0.

    Args:
        quantiles: one column per code and summary.
        parts: for each batch the row (G,) and the code (G,) of its pairs, their summaries (G, F), and the number of records.
        n_codes: codes from this number on are left out.
        counts: numbers of the summaries that are 0 where a record lacks the code.
        columns: returns the columns (G, F) of codes (G,).
        seed: of the draw of records, where there are more than `MAX_FITTED` pairs.
        dataset_of: (n_codes,) number of each code's dataset in a pool, -1 = all; a record is of the dataset of its codes, and lacks
            codes of that dataset only. None = there is one dataset.
    """
    dataset_C = torch.full((n_codes,), -1) if dataset_of is None or not len(dataset_of) else dataset_of.cpu()
    n_datasets = int(dataset_C.max()) + 1 if len(dataset_C) else 0
    generator, share = torch.Generator().manual_seed(seed), 1.0
    kept: list[tuple[Tensor, Tensor, Tensor]] = []  # each pair's record's draw, code, summaries
    draws: list[Tensor] = [torch.empty(0)]
    datasets: list[Tensor] = [torch.empty(0, dtype=torch.int64)]  # of each record, -1 = unknown
    for row_G, code_G, numbers_GF, n_records in parts:
        draw_B = torch.rand(n_records, generator=generator)
        draws.append(draw_B)
        row_G, code_G = row_G.cpu(), code_G.cpu()
        is_known_G = (code_G < n_codes) & (row_G < n_records)  # on a GPU some places hold no pair
        draw_G = draw_B[row_G.clamp(max=n_records - 1)]
        dataset_B = torch.full((n_records,), -1)
        dataset_B.scatter_reduce_(0, row_G[is_known_G], dataset_C[code_G[is_known_G]], "amax")
        datasets.append(dataset_B)
        chosen = (draw_G < share) & is_known_G
        kept.append((draw_G[chosen], code_G[chosen], numbers_GF.cpu()[chosen]))
        while sum(len(part[0]) for part in kept) > MAX_FITTED:
            share /= 2
            kept = [tuple(x[part[0] < share] for x in part) for part in kept]  # type: ignore[misc]
    if not kept:
        return
    is_kept = torch.cat(draws) < share
    n_of_D = (torch.cat(datasets)[is_kept] + 1).bincount(minlength=n_datasets + 1)
    n_of_D[0] = is_kept.sum()  # codes of all datasets
    code_G, numbers_GF = torch.cat([part[1] for part in kept]), torch.cat([part[2] for part in kept])
    lacking_C = n_of_D[dataset_C + 1] - code_G.bincount(minlength=n_codes)
    zeros_CK = columns(torch.arange(n_codes))[:, counts]
    found = torch.cat([columns(code_G).flatten(), zeros_CK.flatten()])
    numbers = torch.cat([numbers_GF.flatten(), torch.zeros(zeros_CK.numel())])
    weights = torch.cat([torch.ones(numbers_GF.numel()), lacking_C[:, None].expand_as(zeros_CK).flatten()])
    has_weight = weights > 0
    quantiles.fit(found[has_weight], numbers[has_weight], weights[has_weight])
