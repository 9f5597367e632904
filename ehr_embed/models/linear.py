"""Share the parts of linear baselines: features per code that are standardised by train, and one weight per feature and output."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

from ehr_embed.models.code_features import ReadsCodeFeatures
from ehr_embed.models.feature_table import FeatureTable
from ehr_embed.models.protocol import FeatureSet

Standard = tuple[sparse.csr_matrix, npt.NDArray[np.float64]]
LIMIT = 10.0
"""Limit, in standard deviations, to which standardised features are clipped: one event of a rare code may lie a hundred
standard deviations from the mean."""


class LinearOnFeatures(ReadsCodeFeatures):
    """Base class of linear models on `CodeFeatures`, whose `fit` sets `fitted`.

    A missing feature is replaced by its median in train, and each feature is standardised by its mean and standard deviation in
    train.

    Attributes:
        fitted: median, mean and scale (F,), weight (C, F) and bias (C,), float64; empty before fitting.
    """

    def __init__(self, *, has_values: bool, max_codes: int, times: bool) -> None:
        super().__init__(has_values=has_values, max_codes=max_codes, times=times)
        self.fitted: dict[str, Tensor] = {}

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return what was fitted."""
        return self.fitted

    def set_extra_state(self, state: Any) -> None:
        """Set the coefficients to those of another run."""
        self.fitted = dict(state)

    def standardised(self, train: FeatureSet, tuning: FeatureSet) -> tuple[dict[str, Tensor], Standard, Standard]:
        """Return median, mean and scale of train, and of both splits the standardised cells and offset (`standard_cells`)."""
        self.features.remember(train.features)
        median = train.features.medians()  # a chosen feature has a value somewhere in train
        mean, scale = moments(train.features, median)
        scale[scale == 0] = 1
        fixed = {name: torch.from_numpy(a) for name, a in (("median", median), ("mean", mean), ("scale", scale))}
        return (
            fixed,
            standard_cells(train.features, median, mean, scale),
            standard_cells(tuning.features, median, mean, scale),
        )

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the sums of weighted features (B, C) float64: logits whose softmax is the probability, or a number in standard
        deviations of train; inputs as in `CodeFeatures`."""
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
