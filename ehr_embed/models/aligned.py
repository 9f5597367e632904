"""Read another dataset's codes as those that a model knows: summaries of each code, ranked among its own and merged by gate.

Suffixes: J codes of the dataset that have a match, C known codes, G pairs of a record and a code, F summaries per code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
        self.dataset_of = torch.empty(0, dtype=torch.int64)
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
        self.known_of = torch.tensor([known for known, _ in found.values()], dtype=torch.int64, device=device)
        self.gates = torch.tensor([gate for _, gate in found.values()], dtype=torch.float32, device=device)
        leads = [(instead.get(code, code), twin) for twin, code in (twins or {}).items()]
        of_twins = [(number[a], number[b]) for a, b in leads if a != b and {a, b} <= number.keys()]
        self.twins = torch.tensor(sorted(of_twins), dtype=torch.int64, device=device).view(-1, 2)
        self.dataset_of = torch.tensor([-1 if dataset_of is None else dataset_of[code] for code in found])
        self.quantiles = QuantileNormal(len(self.codes) * self.n_summaries).to(device)

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

    def merged(self, row_G: Tensor, code_G: Tensor, numbers_GF: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the pairs of record and known code that the pairs of record and matched code amount to.

        Returns:
            row (K,), known code (K,), ascending by row and code; the normal score of each summary, (K, F), NaN = missing; and the
            pair (G,) -> (K,) that each became part of.
        """
        z_GF = self.quantiles(self.columns(code_G), numbers_GF).masked_fill(numbers_GF.isnan(), float("nan"))
        n_known = max(len(self.known), 1)
        key_K, part_G = (row_G * n_known + self.known_of[code_G]).unique(return_inverse=True)
        weight_GF = self.gates[code_G][:, None] * ~z_GF.isnan()
        total_KF = weight_GF.new_zeros(len(key_K), self.n_summaries).index_add(0, part_G, weight_GF)
        sum_KF = torch.zeros_like(total_KF).index_add(0, part_G, weight_GF * z_GF.nan_to_num())
        return key_K // n_known, key_K % n_known, sum_KF / total_KF, part_G  # 0 / 0 = NaN, missing

    def with_twins(self, row_K: Tensor, code_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return the known codes (L,) of pairs of a record (K,) and a known code (K,) and of their twins, ascending by row and
        code, and the pair (L,) that each comes from."""
        if not len(self.twins):
            return code_K, torch.arange(len(code_K), device=code_K.device)
        lead_N = self.twins[:, 0].contiguous()  # ascending
        first_K = torch.searchsorted(lead_N, code_K)
        n_K = torch.searchsorted(lead_N, code_K, right=True) - first_K
        of_twin = torch.arange(len(code_K), device=code_K.device).repeat_interleave(n_K)
        # Its number among the twins of its code.
        place = torch.arange(len(of_twin), device=code_K.device) - (n_K.cumsum(0) - n_K)[of_twin]
        code_L = torch.cat([code_K, self.twins[first_K[of_twin] + place, 1]])
        of_L = torch.cat([torch.arange(len(code_K), device=code_K.device), of_twin])
        order = (row_K[of_L] * max(len(self.known), 1) + code_L).argsort()
        return code_L[order], of_L[order]

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
        self.known_of, self.gates = state["known_of"].to(device), state["gates"].to(device)
        twins = state.get("twins", torch.empty(0, 2, dtype=torch.int64))  # earlier versions had none
        self.twins = twins[twins[:, 0].argsort(stable=True)].to(device)


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
        draw_G = draw_B[row_G]
        is_known_G = code_G < n_codes
        dataset_B = torch.full((n_records,), -1)
        dataset_B.scatter_reduce_(0, row_G[is_known_G], dataset_C[code_G[is_known_G]], "amax")
        datasets.append(dataset_B)
        chosen = (draw_G < share) & (code_G < n_codes)
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
