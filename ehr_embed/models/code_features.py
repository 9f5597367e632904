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
from ehr_embed.models.groups import Groups
from ehr_embed.models.quantiles import QuantileNormal

VALUE_SUMMARIES = ("first", "last", "mean", "min", "max")
TIME_SUMMARIES = ("years_since_first", "years_since_last")


class ReadsCodes(nn.Module):
    """Mixin: look up the code of each token and the number of its value bin.

    Args:
        has_values: whether batches carry a numeric value with each event.
    """

    bin_of_token: Tensor

    def __init__(self, *, has_values: bool) -> None:
        super().__init__()
        self.has_values = has_values
        self.token_codes: list[str | None] = []
        self.register_buffer("bin_of_token", torch.empty(0), persistent=False)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the vocabulary of the token ids in coming batches."""
        self.token_codes = vocabulary.token_codes
        self.bin_of_token = torch.from_numpy(vocabulary.token_bins).to(self.bin_of_token.device)

    def tokens(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the token ids, (B, T) int64.

        Raises:
            UserError: the inputs hold event vectors and no token ids.
        """
        if "token_ids" not in inputs:
            raise UserError(
                "this model reads the codes of events, and vectors contain no codes. Give texts or a MEDS dataset to predict on."
            )
        return inputs["token_ids"].long()

    def values(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the numeric value of each event, or else the number of its value bin, (B, T) float32, NaN = none."""
        values_BT = inputs.get("values")
        if values_BT is None:
            values_BT = self.bin_of_token[self.tokens(inputs)]
            if self.has_values:  # the model was fitted to numeric values, which bin numbers must not replace
                values_BT = torch.full_like(values_BT, float("nan"))
        return values_BT


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

    column_of_token: Tensor
    value_column_of_token: Tensor
    time_column_of_token: Tensor

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
        self._of_matches: CodeFeatures | None = None
        self._pool: tuple[Mapping[str, tuple[str, float]], Mapping[str, int] | None] | None = None
        for name in ("column_of_token", "value_column_of_token", "time_column_of_token"):
            self.register_buffer(name, torch.empty(0), persistent=False)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the vocabulary of the token ids in coming batches; the chosen codes stay the same."""
        super().set_vocabulary(vocabulary)
        self._match()
        if self._of_matches is not None:
            self._of_matches.set_vocabulary(vocabulary)

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
        self.matches = self._of_matches = None
        if matches is None:
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
        device = self.column_of_token.device
        summaries = [summary for summary, _ in self.groups]
        counts = tuple(i for i, summary in enumerate(summaries) if summary.startswith("count"))
        found = CodeMatches(self.codes, n_summaries=len(summaries), counts=counts)
        found.match(matches, dataset_of, twins)
        own = CodeFeatures(
            has_values=self.has_values, max_codes=max(len(found.codes), 1), times=True, windows_hours=self.ends
        ).to(device)
        own.token_codes, own.bin_of_token = self.token_codes, self.bin_of_token
        own.codes = own.valued = found.codes
        own._match()
        self.matches, self._of_matches = found.to(device), own

    def fit_to_records(self, records: Iterable[dict[str, Tensor]]) -> None:
        """After `align` or `pool`, fit the matched codes' own quantiles to the records; `records` gives each batch once."""

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
        if self.matches is not None:
            return self._aligned(inputs)
        token_BT, is_event_BT = self.tokens(inputs), inputs["padding_mask"]
        values_BT = self.values(inputs).double()
        days_BT = inputs["days"].double()
        _, count = _columns(self.column_of_token[token_BT], is_event_BT, len(self.codes))
        keep_BT, value = _columns(
            self.value_column_of_token[token_BT], is_event_BT & ~values_BT.isnan(), len(self.valued)
        )
        values_N = values_BT[keep_BT]
        keep_BT, time = _columns(self.time_column_of_token[token_BT], is_event_BT, len(self.timed))
        years_N = days_BT[keep_BT] / DAYS_PER_YEAR
        parts = [
            count.count(),
            value.first(values_N),
            value.last(values_N),
            value.mean(values_N),
            value.extreme(values_N, "amin"),
            value.extreme(values_N, "amax"),
            time.extreme(years_N, "amax"),
            time.extreme(years_N, "amin"),
        ]
        if self.ends:
            parts += self._in_windows(inputs, count, value, values_N)
        return torch.cat([part.view(len(token_BT), -1) for part in parts], dim=1).float()

    def _pairs(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the record (G,) and the matched code (G,) of each pair that occurs, ascending, and the code's summaries (G, S).

        These are the cells of `_of_matches(inputs)`, whose table would have a column per summary of thousands of codes, nearly all
        of them empty.
        """
        own = self._of_matches
        assert own is not None
        column_BT = own.column_of_token[self.tokens(inputs)]
        is_event_BT = inputs["padding_mask"] & (column_BT >= 0)
        row_N, _ = is_event_BT.nonzero(as_tuple=True)
        n_codes = len(own.codes)
        key_G, group_N = (row_N * n_codes + column_BT[is_event_BT]).unique(return_inverse=True)
        groups, values_N = Groups(group_N, len(key_G)), self.values(inputs)[is_event_BT].double()
        days_N = inputs["days"][is_event_BT].double()
        has_value_N = ~values_N.isnan()
        value, x_N, years_N = Groups(group_N[has_value_N], len(key_G)), values_N[has_value_N], days_N / DAYS_PER_YEAR
        parts = [groups.count(), value.first(x_N), value.last(x_N), value.mean(x_N)]
        parts += [value.extreme(x_N, "amin"), value.extreme(x_N, "amax")]
        parts += [groups.extreme(years_N, "amax"), groups.extreme(years_N, "amin")]
        if self.ends:
            parts.append(value.mean((x_N - value.spread(value.mean(x_N))).square()).sqrt())
            ends = torch.tensor(self.ends, device=days_N.device).double()
            window_N = torch.bucketize(days_N * HOURS_PER_DAY, ends)
            for is_value in (False, True):
                in_N = (window_N < len(ends)) & (has_value_N | (not is_value))
                by_window = Groups((group_N * len(ends) + window_N)[in_N], len(key_G) * len(ends))
                found_GW = by_window.mean(values_N[in_N]) if is_value else by_window.count()
                parts += found_GW.view(-1, len(ends)).unbind(1)
        return key_G // n_codes, key_G % n_codes, torch.stack(parts, dim=1).float()

    def _aligned(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the features (B, F) of another dataset's records in train's own numbers; in a pool the normal scores."""
        assert self.matches is not None
        quantiles = self._quantiles[0].to(inputs["padding_mask"].device) if self._pool is None else None
        row_K, code_K, scores_KS, _ = self.matches.merged(*self._pairs(inputs))
        code_K, of_K = self.matches.with_twins(row_K, code_K)
        row_K, scores_KS = row_K[of_K], scores_KS[of_K]
        found_BF = scores_KS.new_full((len(inputs["padding_mask"]), len(self.names)), float("nan"))
        start = 0
        for number, (summary, codes) in enumerate(self.groups):
            column = {code: start + i for i, code in enumerate(codes)}
            column_C = torch.tensor([column.get(code, -1) for code in self.codes], device=row_K.device)
            is_count = summary.startswith("count") and quantiles is not None
            if is_count:
                found_BF[:, start : start + len(codes)] = 0.0
            start += len(codes)
            column_K, score_K = column_C[code_K], scores_KS[:, number]
            there = (column_K >= 0) & ~score_K.isnan()
            numbers = score_K[there] if quantiles is None else quantiles.inverse(column_K[there], score_K[there])
            found_BF[row_K[there], column_K[there]] = numbers.nan_to_num() if is_count else numbers
        return found_BF

    def _in_windows(self, inputs: dict[str, Tensor], count: Groups, value: Groups, values_N: Tensor) -> list[Tensor]:
        """Return the standard deviation of each code's values, then per window the counts, then per window the mean values."""
        n_rows, token_BT = len(inputs["token_ids"]), self.tokens(inputs)
        window_BT = torch.bucketize(
            inputs["days"].double() * HOURS_PER_DAY, torch.tensor(self.ends, device=token_BT.device).double()
        )
        is_in_BT = inputs["padding_mask"] & (window_BT < len(self.ends))
        spread_N = (values_N - value.spread(value.mean(values_N))).square()
        found = [value.mean(spread_N).sqrt()]
        for column_of_token, groups, is_value in (
            (self.column_of_token, count, False),
            (self.value_column_of_token, value, True),
        ):
            n_columns = groups.n_groups // n_rows
            is_there_BT = is_in_BT & ~self.values(inputs).isnan() if is_value else is_in_BT
            # Windows before columns, so that the features of a window stand together.
            column_BT = torch.where(
                column_of_token[token_BT] >= 0, window_BT * n_columns + column_of_token[token_BT], -1
            )
            keep_BT, by_window = _columns(column_BT, is_there_BT, len(self.ends) * n_columns)
            found.append(by_window.mean(self.values(inputs).double()[keep_BT]) if is_value else by_window.count())
        return found

    def _match(self) -> None:
        """Set the column of every token in each group of features, -1 for a token without one."""
        device = self.column_of_token.device
        columns = []
        for chosen in (self.codes, self.valued, self.timed):
            column = {code: i for i, code in enumerate(chosen)}
            columns.append(torch.tensor([column.get(c, -1) if c else -1 for c in self.token_codes], device=device))
        self.column_of_token, self.value_column_of_token, self.time_column_of_token = columns


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
        """After `align` or `pool`, fit the matched codes' own quantiles to the records."""
        self.features.fit_to_records(train)

    def featurise(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the features of a batch, (B, F) float32, NaN = missing."""
        return self.features(inputs)


def _columns(column_BT: Tensor, keep_BT: Tensor, n_columns: int) -> tuple[Tensor, Groups]:
    """Return the mask (B, T) of the events that have a column, and their groups, one per sample and column."""
    keep_BT = keep_BT & (column_BT >= 0)
    row_N, _ = keep_BT.nonzero(as_tuple=True)
    return keep_BT, Groups(row_N * n_columns + column_BT[keep_BT], len(column_BT) * n_columns)
