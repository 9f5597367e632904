"""Features of a record per code (number of events, values, times), for models that are fitted to a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from meds import birth_code
from torch import Tensor, nn

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import Count, checked
from ehr_embed.data.store import DAYS_PER_YEAR, HOURS_PER_DAY
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.models.aligned import MAX_FITTED, CodeMatches
from ehr_embed.models.feature_table import FeatureTable
from ehr_embed.models.groups import grouped_by
from ehr_embed.models.quantiles import QuantileNormal
from ehr_embed.models.reads_codes import ReadsCodes

VALUE_SUMMARIES = ("first", "last", "mean", "min", "max")
TIME_SUMMARIES = ("years_since_first", "years_since_last")


class CodeFeatures(ReadsCodes):
    """Builds the features of each record: per code its count, values, and years since its first and last event.

    The value features are the first, last, mean, least and greatest value. A value is the number that the event
    carries, in robust standard deviations from the code's train median (`data.values=both`, `continuous`), or else the
    number of the token's value bin (`bins`). Without either there are only counts and years. A missing feature is NaN,
    except a count, which is 0. The birth code is always chosen, and its years are the subject's age.

    With `windows_hours` there are also the standard deviation of a code's values, and per window the number of events and the mean
    value, such as `HR/count_12h` for the events of the 12 hours before the prediction; windows follow each other backwards.

    The chosen codes are part of the `state_dict`, by name, so that a model can read another vocabulary: each code keeps
    its column, other codes are ignored, and the features of absent codes are missing. After `align`, the codes of another dataset
    are read as chosen ones: each of their features takes the place that it has among the other dataset's, in train's own numbers,
    whose quantiles are part of the `state_dict` too.

    Args:
        has_values: whether batches carry a numeric value with each event.
        max_codes: number of codes that get features; the most frequent in train are chosen.
        min_records: number of train's records below which a code gets none, since the model could not use them.
        times: whether every code has years since its first and last event; otherwise only the birth code has them.
        windows_hours: where windows end, in hours back from the prediction; none = no windows and no standard deviation.

    Attributes:
        codes: the chosen codes.
        valued: the chosen codes that have values in train.
    """

    code_of_token: Tensor
    columns: Tensor

    @checked("model")
    def __init__(
        self,
        *,
        has_values: bool,
        max_codes: Count,
        times: bool,
        windows_hours: Sequence[float] | None = None,
        min_records: int = 0,
    ) -> None:
        super().__init__(has_values=has_values)
        self.min_records = min_records
        self.ends = [float(hours) for hours in windows_hours or ()]
        if any(b <= a for a, b in pairwise([0.0, *self.ends])):
            raise UserError(
                f"model.windows_hours={windows_hours}: expected ascending numbers of hours above 0, at which the windows before "
                "the prediction time end, or null. Type: model.windows_hours=[12,24,36,48]"
            )
        self.max_codes, self.times = max_codes, times
        self.codes: list[str] = []
        self.valued: list[str] = []
        # In a tuple, since the quantiles are part of this module's own state, not modules with a state of theirs.
        self._quantiles: tuple[QuantileNormal, ...] = ()
        self.matches: CodeMatches | None = None
        self._pool: tuple[Mapping[str, tuple[str, float]], Mapping[str, int] | None] | None = None
        for name in ("code_of_token", "columns"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int64), persistent=False)
        # The matches load their state after this module.
        self.register_load_state_dict_post_hook(_match_after_load)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the vocabulary of the token ids in coming batches; the chosen codes stay the same."""
        super().set_vocabulary(vocabulary)
        self._match()

    def get_extra_state(self) -> dict[str, Any]:
        """Return the chosen codes, and the quantiles of train's features if there are any."""
        state: dict[str, Any] = {"codes": self.codes, "valued": self.valued}
        return state | ({"quantiles": self._quantiles[0].get_extra_state()} if self._quantiles else {})

    def set_extra_state(self, state: Any) -> None:
        """Set the chosen codes and the quantiles to those of another run."""
        self.codes, self.valued = list(state["codes"]), list(state["valued"])
        if "quantiles" in state:  # checkpoints of earlier versions have none
            self._quantiles = (QuantileNormal(len(self.names)),)
            self._quantiles[0].set_extra_state(state["quantiles"])
        self._match()

    def remember(self, train: FeatureTable) -> None:
        """Keep the quantiles of train's features, of some of its samples if it is large, for datasets that are aligned later; in a
        pool, whose features are ranks, there is nothing to keep."""
        if self._pool is not None:
            return
        share = min(1.0, 4 * MAX_FITTED / max(train.cells.nnz, 1))
        rows = np.flatnonzero(np.random.default_rng(0).random(len(train)) < share)
        cells = train.cells[rows]
        zeros = np.flatnonzero(train.usual == 0)
        n_zero = len(rows) - np.bincount(cells.indices, minlength=len(train.usual))[zeros]
        columns = np.concatenate([cells.indices.astype(np.int64), zeros])
        numbers = np.concatenate([cells.data, np.zeros(len(zeros), np.float32)])
        weights = np.concatenate([np.ones(cells.nnz), n_zero])
        found = torch.from_numpy(weights > 0)
        self._quantiles = (QuantileNormal(len(train.usual)),)
        self._quantiles[0].fit(*(torch.from_numpy(x)[found] for x in (columns, numbers, weights)))

    def align(self, matches: Mapping[str, tuple[str, float]] | None, twins: Mapping[str, str] | None = None) -> None:
        """Read the codes of the present vocabulary as the chosen ones that `matches` names, with their gates, and leave all others
        out; None = read codes as they are. A chosen code in `twins` gets the events of the code that `twins` names for it.

        Raises:
            UserError: a run of an earlier version, which kept no quantiles.
        """
        self.matches = None
        if matches is None:
            self._match()
            return
        if not self._quantiles and self._pool is None:
            raise UserError(
                "this run was fitted by an earlier version, which kept no quantiles of its features, so another dataset's numbers "
                "cannot be compared with them. Train it again, or type: data.aligned_to=none"
            )
        self._read_as(matches, twins=twins)

    def pool(self, matches: Mapping[str, tuple[str, float]], dataset_of: Mapping[str, int] | None = None) -> None:
        """Read the codes of pooled datasets as those that `matches` names, in training too: `choose` counts and chooses these, and
        each feature is the normal score of its rank among those of its own dataset; what a record lacks is missing.

        Args:
            matches: code -> code as which it is read, and gate.
            dataset_of: number of each code's dataset, -1 = all; needed for fitting alone.
        """
        self._pool = (dict(matches), dataset_of)
        self._read_as(matches, dataset_of)

    def _read_as(
        self,
        matches: Mapping[str, tuple[str, float]],
        dataset_of: Mapping[str, int] | None = None,
        twins: Mapping[str, str] | None = None,
    ) -> None:
        summaries = [summary for summary, _ in self.groups]
        counts = tuple(i for i, summary in enumerate(summaries) if summary.startswith("count"))
        found = CodeMatches(self.codes, n_summaries=len(summaries), counts=counts)
        found.match(matches, dataset_of, twins)
        self.matches = found.to(self.code_of_token.device)
        self._match()

    def fit_to_records(self, records: Iterable[dict[str, Tensor]]) -> None:
        """Fit the matched codes' own quantiles to the records, after `align` or `pool`; `records` gives each batch once."""

        def parts() -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
            for inputs in records:
                yield *self._pairs(inputs), len(inputs["padding_mask"])

        if self.matches is not None:
            self.matches.fit(parts())

    @property
    def timed(self) -> list[str]:
        """Return the codes that have the features of `TIME_SUMMARIES`."""
        return self.codes if self.times else [code for code in self.codes if code == birth_code]

    @property
    def groups(self) -> list[tuple[str, list[str]]]:
        """Return the summaries in the order of the features, each with the codes that have it."""
        return [
            ("count", self.codes),
            *((summary, self.valued) for summary in VALUE_SUMMARIES),
            *((summary, self.timed) for summary in TIME_SUMMARIES),
            *((summary, self.valued) for summary in ("sd",) if self.ends),
            *((f"count_{hours:g}h", self.codes) for hours in self.ends),
            *((f"mean_{hours:g}h", self.valued) for hours in self.ends),
        ]

    @property
    def names(self) -> list[str]:
        """Return the names of the F features, as CODE/SUMMARY."""
        return [f"{code}/{summary}" for summary, codes in self.groups for code in codes]

    def choose(self, train: Iterable[dict[str, Tensor]]) -> None:
        """Choose codes by the events of train that are visible at the prediction times; `train` yields each batch once.

        Raises:
            UserError: no event has a code.
        """
        pool = None if self._pool is None else self._pool[0]
        code_of_token = [
            own if pool is None or own is None else pool.get(own, (None, 0.0))[0] for own in self.token_codes
        ]
        number_of = {
            code: i for i, code in enumerate(dict.fromkeys(code for code in code_of_token if code is not None))
        }
        number_of_token = torch.tensor([-1 if code is None else number_of[code] for code in code_of_token])
        n_codes = len(number_of)
        events, valued, records = (torch.zeros(n_codes, dtype=torch.int64) for _ in range(3))
        for inputs in train:
            is_event_BT = inputs["padding_mask"]
            row_N, _ = is_event_BT.cpu().nonzero(as_tuple=True)
            code_N = number_of_token[self.tokens(inputs)[is_event_BT].cpu()]
            has_value_N = ~self.values(inputs)[is_event_BT].isnan().cpu()
            has_code_N = code_N >= 0
            events += code_N[has_code_N].bincount(minlength=n_codes)
            valued += code_N[has_code_N & has_value_N].bincount(minlength=n_codes)
            records += ((row_N * n_codes + code_N)[has_code_N].unique() % max(n_codes, 1)).bincount(minlength=n_codes)
        if not int(events.sum()):
            raise UserError("no event of train has a code of the vocabulary, so there is nothing to summarise.")
        count_of = {code: n for code, n in zip(number_of, events.tolist(), strict=True) if n}
        with_value = {code for code, n in zip(number_of, valued.tolist(), strict=True) if n}
        of_records = dict(zip(number_of, records.tolist(), strict=True))
        ranked = sorted(count_of, key=lambda code: (code != birth_code, -count_of[code], code))[: self.max_codes]
        kept = [code for code in ranked if code == birth_code or of_records[code] >= self.min_records]
        self.codes = kept or ranked[:1]
        self.valued = [code for code in self.codes if code in with_value]
        self._match()
        if self._pool is not None:
            self._read_as(*self._pool)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the features (B, F) float32, NaN = missing.

        Args:
            inputs: `token_ids` and `days` (B, T); `padding_mask` (B, T), True = event; `values` (B, T), NaN = no value.

        Raises:
            UserError: no codes were chosen yet.
        """
        if not self.codes:
            raise UserError(
                "this model was not fitted, so it has no features. Fit it by python train.py with its option of conf/model/, or "
                "open a finished run. Type: run=RUN_DIR"
            )
        n_rows = len(inputs["padding_mask"])
        if self.matches is None:
            return self._table(n_rows, *self._pairs(inputs), lacks_are_zero=True)
        row_K, code_K, scores_KS, _ = self.matches.merged(*self._pairs(inputs), n_rows)
        row_K, code_K, of_K = self.matches.with_twins(row_K, code_K, n_rows)
        quantiles = None if self._pool is not None else self._quantiles[0].to(row_K.device)
        return self._table(n_rows, row_K, code_K, scores_KS[of_K], quantiles, lacks_are_zero=quantiles is not None)

    def _table(
        self,
        n_rows: int,
        row_G: Tensor,
        code_G: Tensor,
        summaries_GS: Tensor,
        quantiles: QuantileNormal | None = None,
        *,
        lacks_are_zero: bool,
    ) -> Tensor:
        """Return the features (B, F) of pairs of a record and a chosen code.

        Args:
            n_rows: number B of records.
            row_G, code_G: (G,) the record and the number of the code.
            summaries_GS: (G, S) one number for each of `groups`, NaN = missing.
            quantiles: those of train's numbers, where the summaries are normal scores; None = they are numbers, or stay scores.
            lacks_are_zero: whether the counts of a code that a record lacks are 0 rather than missing.
        """
        column_GS, usual_F = self.columns[code_G], summaries_GS.new_full((len(self.names) + 1,), float("nan"))
        if quantiles is not None:
            scores_GS = summaries_GS.masked_fill(column_GS < 0, float("nan"))
            summaries_GS = quantiles.inverse(column_GS.clamp(min=0), scores_GS)
        if lacks_are_zero:
            is_count_S = torch.tensor([summary.startswith("count") for summary, _ in self.groups], device=row_G.device)
            usual_F[self.columns[:, is_count_S].flatten()] = 0.0
            summaries_GS = summaries_GS.masked_fill(is_count_S & summaries_GS.isnan(), 0.0)
        # The last column takes what a code has no feature for; on a GPU the last row takes places without a pair.
        found_BF = usual_F.repeat(n_rows + 1, 1)
        found_BF[row_G[:, None], column_GS] = summaries_GS
        return found_BF[:n_rows, :-1]

    def _pairs(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the record (G,) and the code (G,) of each pair of a record and a code that occurs in it, ascending, and the code's
        summaries (G, S), one for each of `groups`, in float32; after `align` or `pool` the codes are the matched ones."""
        code_BT = self.code_of_token[self.tokens(inputs)]
        is_event_BT = inputs["padding_mask"] & (code_BT >= 0)
        row_N, _ = is_event_BT.nonzero(as_tuple=True)
        n_codes = max(len(self.codes if self.matches is None else self.matches.codes), 1)
        key_G, groups = grouped_by(row_N * n_codes + code_BT[is_event_BT], len(code_BT) * n_codes)
        x_N, days_N = self.values(inputs)[is_event_BT].double(), inputs["days"][is_event_BT].double()
        years_N, has_value_N = days_N / DAYS_PER_YEAR, ~x_N.isnan()
        value, x_M = groups.only(has_value_N, x_N)
        parts = [groups.count(), value.first(x_M), value.last(x_M), value.mean(x_M)]
        parts += [value.extreme(x_M, "amin"), value.extreme(x_M, "amax")]
        parts += [groups.extreme(years_N, "amax"), groups.extreme(years_N, "amin")]
        if self.ends:
            parts.append(value.mean((x_M - value.spread(value.mean(x_M))).square()).sqrt())
            ends = torch.tensor(self.ends, device=days_N.device).double()
            window_N = torch.bucketize(days_N * HOURS_PER_DAY, ends)
            by_window, is_in_N = groups.within(window_N, len(ends)), window_N < len(ends)
            parts += by_window.only(is_in_N, x_N)[0].count().view(-1, len(ends)).unbind(1)
            valued, x_M = by_window.only(is_in_N & has_value_N, x_N)
            parts += valued.mean(x_M).view(-1, len(ends)).unbind(1)
        return key_G // n_codes, key_G % n_codes, torch.stack(parts, dim=1).float()

    def _match(self) -> None:
        """Set the number of each token's code among the chosen or else the matched ones, -1 for a token without one, and the
        columns (C, S) of the chosen codes' summaries, -1 for a summary that a code has not."""
        device = self.code_of_token.device
        number = {code: i for i, code in enumerate(self.codes if self.matches is None else self.matches.codes)}
        found = [-1 if code is None else number.get(code, -1) for code in self.token_codes]
        self.code_of_token = torch.tensor(found, dtype=torch.int64, device=device)
        start, columns = 0, []
        for _, codes in self.groups:
            column = {code: start + i for i, code in enumerate(codes)}
            columns.append([column.get(code, -1) for code in self.codes])
            start += len(codes)
        self.columns = torch.tensor(columns, dtype=torch.int64, device=device).T.contiguous()


def _match_after_load(features: CodeFeatures, _: object) -> None:
    features._match()


class ReadsCodeFeatures(nn.Module):
    """Mixin: give an estimator the features of `CodeFeatures`.

    Args:
        has_values, max_codes, times, windows_hours, min_records: as in `CodeFeatures`.
    """

    takes_twins = True

    def __init__(
        self,
        *,
        has_values: bool,
        max_codes: int,
        times: bool,
        windows_hours: Sequence[float] | None = None,
        min_records: int = 0,
    ) -> None:
        super().__init__()
        self.features = CodeFeatures(
            has_values=has_values,
            max_codes=max_codes,
            times=times,
            windows_hours=windows_hours,
            min_records=min_records,
        )

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the vocabulary of the token ids in coming batches."""
        self.features.set_vocabulary(vocabulary)

    def choose_features(self, train: Iterable[dict[str, Tensor]]) -> None:
        """Choose the codes that get features, by the batches of train."""
        self.features.choose(train)

    def align(self, matches: Mapping[str, tuple[str, float]] | None, twins: Mapping[str, str] | None = None) -> None:
        """Read the codes of the present vocabulary as the chosen ones that `matches` names, and as their `twins`."""
        self.features.align(matches, twins)

    def pool(self, matches: Mapping[str, tuple[str, float]], dataset_of: Mapping[str, int] | None = None) -> None:
        """Read the codes of pooled datasets as those that `matches` names, in training too."""
        self.features.pool(matches, dataset_of)

    def adapt_to_records(self, train: Iterable[dict[str, Tensor]]) -> None:
        """Fit the matched codes' own quantiles to the records, after `align` or `pool`."""
        self.features.fit_to_records(train)

    def featurise(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the features of a batch, (B, F) float32, NaN = missing."""
        return self.features(inputs)
