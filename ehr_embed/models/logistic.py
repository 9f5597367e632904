"""Logistic regression on summaries of a record per code: the simplest baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.models.code_features import ReadsCodeFeatures
from ehr_embed.models.heads import check_classifies
from ehr_embed.models.protocol import FeatureSet

LIMIT = 10.0
"""Standardised features are clipped here: of a rare code one event may be a hundred standard deviations."""


class Logistic(ReadsCodeFeatures):
    """Logistic regression on `CodeFeatures`; reads codes, values and times, not the event vectors.

    A missing feature counts as its train median; each is standardised by train's mean and standard deviation. Penalties are
    compared by the monitored metric on tuning.

    Args:
        embedding_dim: width of the event vectors, which are not read.
        num_classes: classes C; the task says it.
        vocab_size: refused: classes only.
        has_values: whether batches carry a number beside each event; the data say it.
        max_length: longest sequence, in events; longer records keep their last events.
        max_codes, times: as in `CodeFeatures`.
        penalties: of the squared coefficients, relative to the mean loss of a sample; the best on tuning is kept.
        max_iterations: of the solver, for each penalty.

    Raises:
        UserError: a task that predicts events, or a number out of range.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        max_length: int = 4096,
        max_codes: int = 2000,
        times: bool = True,
        penalties: Sequence[float] = (1.0, 0.1, 0.01, 0.001),
        max_iterations: int = 200,
    ) -> None:
        super().__init__(has_values=has_values, max_codes=max_codes, times=times)
        self.num_classes = check_classifies("model=logistic", num_classes, vocab_size)
        if not penalties or min(penalties) <= 0:
            raise UserError(f"model.penalties={list(penalties)}: expected one or more positive numbers.")
        if max_iterations < 1:
            raise UserError(f"model.max_iterations={max_iterations}: expected 1 or more.")
        self.penalties, self.max_iterations = tuple(penalties), max_iterations
        self.fitted: dict[str, Tensor] = {}

    def get_extra_state(self) -> dict[str, Tensor]:
        """median, mean and scale (F,), weight (C, F), bias (C,), float64; their sizes are known once they are fitted."""
        return self.fitted

    def set_extra_state(self, state: Any) -> None:
        """Take the coefficients of another run."""
        self.fitted = dict(state)

    def n_fitted(self) -> int:
        """Coefficients and intercepts, of every class or of the second of two."""
        return (self.fitted["weight"].numel() + self.num_classes) // (2 if self.num_classes == 2 else 1)

    def fit(
        self,
        train: FeatureSet,
        tuning: FeatureSet,
        *,
        score: Callable[[npt.NDArray[np.float64]], float],
        is_higher_better: bool,
        seed: int,
    ) -> None:
        """Fit to train once for each penalty, the strongest first, and keep the best by tuning's score."""
        x = train.features.astype(np.float64)
        median = np.nanmedian(x, axis=0)  # a chosen feature has a value somewhere in train
        x = np.where(np.isnan(x), median, x)
        mean, scale = x.mean(0), x.std(0)
        scale[scale == 0] = 1
        fixed = {name: torch.from_numpy(a) for name, a in (("median", median), ("mean", mean), ("scale", scale))}
        standard = _standardise(torch.from_numpy(x), fixed).numpy()
        of_tuning = _standardise(torch.from_numpy(tuning.features), fixed)
        best = None
        estimator = LogisticRegression(max_iter=self.max_iterations, warm_start=True, random_state=seed)
        for penalty in sorted(self.penalties, reverse=True):
            estimator.set_params(C=1 / (penalty * train.weights.sum()))
            estimator.fit(standard, train.labels, sample_weight=train.weights)
            weight, bias = estimator.coef_, estimator.intercept_
            if self.num_classes == 2:
                weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
            fitted = fixed | {"weight": torch.from_numpy(weight.copy()), "bias": torch.from_numpy(bias.copy())}
            value = score((of_tuning @ fitted["weight"].T + fitted["bias"]).softmax(-1).numpy())
            if best is None or (value > best if is_higher_better else value < best):
                best, self.fitted = value, fitted

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (B, num_classes) float64 from what `CodeFeatures` reads; their softmax is the estimator's probability."""
        features = self.features(inputs)
        fitted = {name: x.to(features.device) for name, x in self.fitted.items()}
        return _standardise(features, fitted) @ fitted["weight"].T + fitted["bias"]


def _standardise(features_BF: Tensor, fitted: dict[str, Tensor]) -> Tensor:
    """(B, F) float64 without NaN, in train's standard deviations from its mean."""
    filled = torch.where(features_BF.isnan(), fitted["median"], features_BF.double())
    return ((filled - fitted["mean"]) / fitted["scale"]).clamp(-LIMIT, LIMIT)
