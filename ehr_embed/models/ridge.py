"""Ridge regression on features per code: the simplest baseline for numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import MinLen
from pydantic import Field
from sklearn.linear_model import Ridge as RidgeRegression

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import Count, Told, checked
from ehr_embed.models.heads import check_classifies
from ehr_embed.models.linear import LinearOnFeatures
from ehr_embed.models.protocol import FeatureSet


class Ridge(LinearOnFeatures):
    """Ridge regression on `CodeFeatures`, standardised as for `Logistic`; it reads codes, values and times, not the event vectors.

    The monitored metric on tuning chooses the penalty.

    Args:
        embedding_dim: width of the event vectors, which are not read.
        num_classes: number of outputs, set by the task: 1.
        vocab_size: must be None, because this model predicts no events.
        has_values: whether batches carry a numeric value with each event, set by the data.
        max_length: longest sequence, in events; a longer record keeps its static events and its last timed ones.
        max_codes, times: as in `CodeFeatures`.
        penalties: penalties on the squared coefficients, relative to the mean squared error; the best on tuning is kept.

    Raises:
        UserError: the task predicts no single number, or a number is out of range.
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
        ] = (10.0, 1.0, 0.1, 0.01),
    ) -> None:
        super().__init__(has_values=has_values, max_codes=max_codes, times=times)
        if check_classifies("model=ridge", num_classes, vocab_size) != 1:
            raise UserError(
                f"model=ridge predicts one number, and this task has {num_classes} outputs. Type: model=logistic, or "
                "task=regression"
            )
        self.penalties = tuple(penalties)

    def n_fitted(self) -> int:
        """Return the number of coefficients and the intercept."""
        return self.fitted["weight"].numel() + 1

    def fit(
        self,
        train: FeatureSet,
        tuning: FeatureSet,
        *,
        score: Callable[[npt.NDArray[np.float64]], float],
        is_higher_better: bool,
        seed: int,
    ) -> None:
        """Fit to train once per penalty, and keep the fit with the best score on tuning."""
        fixed, (standard, offset), (of_tuning, tuning_offset) = self.standardised(train, tuning)
        best = None
        for penalty in self.penalties:
            estimator = RidgeRegression(alpha=penalty * len(train.labels), random_state=seed)
            estimator.fit(standard, train.labels, sample_weight=train.weights)
            weight = np.asarray(estimator.coef_, np.float64)[None]
            bias = np.asarray([estimator.intercept_], np.float64) - weight @ offset
            value = score(of_tuning @ weight.T + (weight @ tuning_offset + bias))
            if best is None or (value > best if is_higher_better else value < best):
                best = value
                self.fitted = fixed | {"weight": torch.from_numpy(weight.copy()), "bias": torch.from_numpy(bias)}
