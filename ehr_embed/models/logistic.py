"""Logistic regression on features per code: the simplest baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import MinLen
from pydantic import Field
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import Count, Told, checked
from ehr_embed.models.code_features import ReadsCodeFeatures
from ehr_embed.models.feature_table import FeatureTable
from ehr_embed.models.heads import check_classifies
from ehr_embed.models.protocol import FeatureSet

LIMIT = 10.0
"""Limit, in standard deviations, to which standardised features are clipped: one event of a rare code may lie a hundred
standard deviations from the mean."""


class Logistic(ReadsCodeFeatures):
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
        self.fitted: dict[str, Tensor] = {}

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the fitted median, mean and scale (F,), weight (C, F) and bias (C,), float64; empty before fitting."""
        return self.fitted

    def set_extra_state(self, state: Any) -> None:
        """Set the coefficients to those of another run."""
        self.fitted = dict(state)

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
        self.features.remember(train.features)
        median = train.features.medians()  # a chosen feature has a value somewhere in train
        mean, scale = moments(train.features, median)
        scale[scale == 0] = 1
        fixed = {name: torch.from_numpy(a) for name, a in (("median", median), ("mean", mean), ("scale", scale))}
        standard, offset = standard_cells(train.features, median, mean, scale)
        of_tuning, tuning_offset = standard_cells(tuning.features, median, mean, scale)
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

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits (B, num_classes) float64 whose softmax is the probability; inputs as in `CodeFeatures`."""
        features = self.features(inputs)
        fitted = {name: x.to(features.device) for name, x in self.fitted.items()}
        return standardise(features, fitted) @ fitted["weight"].T + fitted["bias"]


def moments(
    table: FeatureTable, median: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the mean and standard deviation of each column (F,); a missing cell counts as the column's median."""
    n, n_columns = table.shape
    column = table.cells.indices
    data, usual = table.filled(median)
    n_usual = n - np.bincount(column, minlength=n_columns)
    mean = (np.bincount(column, data, minlength=n_columns) + n_usual * usual) / n
    square = np.bincount(column, np.square(data - mean[column]), minlength=n_columns)
    return mean, np.sqrt((square + n_usual * np.square(usual - mean)) / n)


def standard_cells(
    table: FeatureTable,
    median: npt.NDArray[np.float64],
    mean: npt.NDArray[np.float64],
    scale: npt.NDArray[np.float64],
) -> tuple[sparse.csr_matrix, npt.NDArray[np.float64]]:
    """Return the standardised features as a sparse matrix (n, F) and an offset (F,) to be added to each of its rows.

    The usual cells of a column share one number, which is subtracted from the column so that they become 0. A column in
    which most cells are stored is kept whole with an offset of 0: subtracting would save no memory, and the solver is
    slower on columns far from zero.
    """

    def standard(x: npt.NDArray[np.float64], column: Any) -> npt.NDArray[np.float64]:
        return np.clip((x - mean[column]) / scale[column], -LIMIT, LIMIT)

    n, n_columns = table.shape
    column = table.cells.indices
    data, usual = table.filled(median)
    offset = standard(usual, slice(None))
    cells = sparse.csr_matrix(
        (standard(data, column) - offset[column], column, table.cells.indptr), shape=(n, n_columns)
    )
    full = np.flatnonzero(np.bincount(column, minlength=n_columns) > n / 2)
    if len(full):
        whole = np.asarray(cells[:, full].todense()) + offset[full]
        is_full = np.zeros(n_columns, bool)
        is_full[full] = True
        cells.data[is_full[column]] = 0
        cells.eliminate_zeros()
        places = np.tile(full.astype(column.dtype), n)
        cells = cells + sparse.csr_matrix((whole.ravel(), places, np.arange(n + 1) * len(full)), shape=(n, n_columns))
        offset[full] = 0
    return cells, offset


def standardise(features_BF: Tensor, fitted: dict[str, Tensor]) -> Tensor:
    """Return standardised features, (B, F) float64, with the train median in place of NaN."""
    filled = torch.where(features_BF.isnan(), fitted["median"], features_BF.double())
    return ((filled - fitted["mean"]) / fitted["scale"]).clamp(-LIMIT, LIMIT)
