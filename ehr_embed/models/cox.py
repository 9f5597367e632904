"""Cox regression with an elastic net on features per code: the baseline of time-to-event tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from ehr_embed.core.settings import Count, checked
from ehr_embed.data.outcomes import EVENT
from ehr_embed.models.code_features import ReadsCodeFeatures
from ehr_embed.models.feature_table import FeatureTable
from ehr_embed.models.hazards import FittedToOutcomes, bin_of, exposure, hazard_nll
from ehr_embed.models.heads import check_classifies
from ehr_embed.models.linear import LIMIT, standardise
from ehr_embed.models.protocol import FeatureSet


class Cox(FittedToOutcomes, ReadsCodeFeatures):
    """Cox regression (scikit-survival's elastic net) on `CodeFeatures`, one per outcome.

    It reads codes, values and times, not the event vectors. A missing feature is replaced by its median in train, and each
    feature is standardised by its mean and standard deviation in train. The baseline hazard is constant within the task's time
    bins, by maximum likelihood given the coefficients. The likelihood on tuning chooses the penalty.

    Args:
        embedding_dim: width of the event vectors, which are not read.
        num_classes: number of outputs, set by the task; a Cox model gives hazards instead.
        vocab_size: must be None, because this model predicts no events.
        has_values: whether batches carry a numeric value with each event, set by the data.
        max_length: longest sequence, in events; a longer record keeps its static events and its last timed ones.
        max_codes, times: as in `CodeFeatures`.
        l1_ratio: share of the absolute coefficients in the penalty, in (0, 1].
        n_penalties: number of penalties on the path, from the smallest at which all coefficients are 0 down to a hundredth of it.

    Raises:
        UserError: the task predicts events, or a number is out of range.
    """

    # This option of conf/model/ and its sibling for classes, which a refusal names.
    option, of_classes = "cox", "logistic"

    @checked("model")
    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        max_length: int = 4096,
        max_codes: int = 500,
        times: bool = True,
        l1_ratio: Annotated[float, Field(ge=1e-3, le=1)] = 0.5,
        n_penalties: Count = 30,
    ) -> None:
        super().__init__(has_values=has_values, max_codes=max_codes, times=times)
        check_classifies("model=cox", num_classes, vocab_size)
        self.l1_ratio, self.n_penalties = l1_ratio, n_penalties
        self.fitted: dict[str, Tensor] = {}

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the fitted median, mean, scale (F,), weight (K, F) and log baseline hazard (K, J), float64."""
        return self.fitted

    def set_extra_state(self, state: Any) -> None:
        """Set the coefficients to those of another run."""
        self.fitted = dict(state)

    def n_fitted(self) -> int:
        """Return the number of coefficients other than 0 and of baseline hazards."""
        return int((self.fitted["weight"] != 0).sum()) + self.fitted["baseline"].numel()

    def fit(
        self,
        train: FeatureSet,
        tuning: FeatureSet,
        *,
        score: Callable[[npt.NDArray[np.float64]], float],
        is_higher_better: bool,
        seed: int,
    ) -> None:
        """Fit a path of penalties per outcome to train, and keep the one with the best likelihood on tuning.

        Raises:
            UserError: the task has no times, since it is no time-to-event task.
        """
        from sksurv.linear_model import CoxnetSurvivalAnalysis

        K, edges = self.outcomes_and_edges()
        median = train.features.medians()
        x = _filled(train.features, median)
        mean, scale = x.mean(0), x.std(0)
        scale[scale == 0] = 1
        fixed = {
            name: torch.from_numpy(value) for name, value in (("median", median), ("mean", mean), ("scale", scale))
        }
        x, of_tuning = (np.clip((own - mean) / scale, -LIMIT, LIMIT) for own in (x, _filled(tuning.features, median)))
        weights, baselines = [], []
        for k in range(K):
            days, is_event = times_of(train, k, K)
            asked = ~np.isnan(days)
            surv = np.empty(int(asked.sum()), [("event", bool), ("days", np.float64)])
            surv["event"], surv["days"] = is_event[asked], days[asked]
            path = CoxnetSurvivalAnalysis(
                l1_ratio=self.l1_ratio, n_alphas=self.n_penalties, alpha_min_ratio=0.01, max_iter=10_000
            ).fit(x[asked], surv)
            best = np.inf
            tuning_days, tuning_event = (torch.from_numpy(own) for own in times_of(tuning, k, K))
            for weight in path.coef_.T:
                baseline = baseline_of(x[asked] @ weight, days[asked], is_event[asked], edges)
                log_hazard = torch.from_numpy(of_tuning @ weight)[:, None] + baseline
                nll = float(hazard_nll(log_hazard, tuning_days, tuning_event, edges).sum())
                if nll < best:
                    best, kept = nll, (torch.from_numpy(weight.copy()), baseline)
            weights.append(kept[0])
            baselines.append(kept[1])
        self.fitted = fixed | {"weight": torch.stack(weights), "baseline": torch.stack(baselines)}

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return log hazards per day, (B, K, J) float32; inputs as in `CodeFeatures`."""
        features = self.features(inputs)
        fitted = {name: x.to(features.device) for name, x in self.fitted.items()}
        return ((standardise(features, fitted) @ fitted["weight"].T).unsqueeze(-1) + fitted["baseline"]).float()


def _filled(table: FeatureTable, median: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    dense = table.dense(slice(None)).astype(np.float64)
    return np.where(np.isnan(dense), median, dense)


def times_of(split: FeatureSet, k: int, n_outcomes: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return the days to outcome k, or to censoring, NaN = not asked for, and whether it is an event; (n,) each."""
    labels = split.labels.astype(np.float64)
    return labels[:, k], labels[:, n_outcomes + k] == EVENT


def baseline_of(
    risk: npt.NDArray[np.float64], days: npt.NDArray[np.float64], is_event: npt.NDArray[np.bool_], edges: Tensor
) -> Tensor:
    """Return the log baseline hazard of each bin, (J,): events over the sum of exposure times relative hazard.

    >>> baseline_of(np.zeros(2), np.array([1.0, 3.0]), np.array([True, False]), torch.zeros(1, dtype=torch.float64)).exp()
    tensor([0.2500], dtype=torch.float64)
    """
    at, spent = bin_of(torch.from_numpy(days), edges).numpy(), exposure(torch.from_numpy(days), edges).numpy()
    counts = np.bincount(at[is_event], minlength=len(edges))
    mean = counts.sum() / (np.exp(risk) @ spent.sum(1))
    spent_at_risk = np.exp(risk) @ spent
    # A bin without events is shrunk to the mean hazard by half a pseudo-event, so that no hazard is 0.
    empty = np.where(counts == 0, 0.5, 0.0)
    return torch.from_numpy(np.log((counts + empty) / (spent_at_risk + empty / mean)))
