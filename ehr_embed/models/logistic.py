"""Logistic regression on features per code: the simplest baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import MinLen
from pydantic import Field
from sklearn.linear_model import LogisticRegression

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import Count, Told, checked
from ehr_embed.models.heads import check_classifies
from ehr_embed.models.linear import LinearOnFeatures
from ehr_embed.models.protocol import FeatureSet


class Logistic(LinearOnFeatures):
    """Logistic regression on `CodeFeatures`; it reads codes, values and times, not the event vectors.

    A missing feature is replaced by its median in train, and each feature is standardised by its mean and standard
    deviation in train. The monitored metric on tuning chooses the penalty.

    Args:
        embedding_dim: width of the event vectors, which are not read.
        num_classes: number C of classes, set by the task.
        vocab_size: must be None, because this model predicts classes only.
        has_values: whether batches carry a numeric value with each event, set by the data.
        max_length: longest sequence, in events; a longer record keeps its static events and its last timed ones.
        max_codes, times: as in `CodeFeatures`.
        penalties: penalties on the squared coefficients, relative to the mean loss per sample; the best on tuning is
            kept.
        max_iterations: largest number of iterations of the solver per penalty.

    Raises:
        UserError: the task predicts events, or a number is out of range.
    """

    @checked("model")
    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        max_length: int = 4096,
        max_codes: Count = 2000,
        times: bool = True,
        penalties: Annotated[
            Sequence[Annotated[float, Field(gt=0)]], MinLen(1), Told("one or more positive numbers")
        ] = (1.0, 0.1, 0.01, 0.001),
        max_iterations: Count = 200,
    ) -> None:
        super().__init__(has_values=has_values, max_codes=max_codes, times=times)
        self.num_classes = check_classifies("model=logistic", num_classes, vocab_size)
        if self.num_classes == 1:
            raise UserError("model=logistic predicts classes, and this task a number. Type: model=ridge")
        self.penalties, self.max_iterations = tuple(penalties), max_iterations

    def n_fitted(self) -> int:
        """Return the number of coefficients and intercepts, of every class or, with two classes, of the second."""
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
        """Fit to train once per penalty, the strongest first, and keep the fit with the best score on tuning."""
        fixed, (standard, offset), (of_tuning, tuning_offset) = self.standardised(train, tuning)
        best = None
        estimator = LogisticRegression(max_iter=self.max_iterations, warm_start=True, random_state=seed)
        for penalty in sorted(self.penalties, reverse=True):
            estimator.set_params(C=1 / (penalty * train.weights.sum()))
            estimator.fit(standard, train.labels, sample_weight=train.weights)
            weight, bias = estimator.coef_, estimator.intercept_ - estimator.coef_ @ offset
            if self.num_classes == 2:
                weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
            fitted = fixed | {"weight": torch.from_numpy(weight.copy()), "bias": torch.from_numpy(bias.copy())}
            logits = of_tuning @ weight.T + (weight @ tuning_offset + bias)
            value = score(torch.from_numpy(logits).softmax(-1).numpy())
            if best is None or (value > best if is_higher_better else value < best):
                best, self.fitted = value, fitted
