"""Read label sets whose values are numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from ehr_embed.core.errors import UserError
from ehr_embed.data.labels import NUMBER_COLUMNS, LabelSet, read_labels


def read_numbers(labels: str | None, labels_dir: Path) -> LabelSet:
    """Read a label set as `read_labels`, and mark its values as numbers.

    Raises:
        UserError: as `read_labels`, or the values are no numbers.
    """
    return as_numbers(read_labels(labels, labels_dir))


def as_numbers(found: LabelSet) -> LabelSet:
    """Return a label set whose values are marked as numbers.

    Raises:
        UserError: the values are classes.
    """
    if found.value_column not in NUMBER_COLUMNS:
        raise UserError(
            f"label set {found.name} has {found.value_column}: expected {' or '.join(NUMBER_COLUMNS)}, since classes have no "
            "distance. Type: task=classification"
        )
    return replace(found, are_numbers=True)


def numbers_in(values: pl.Series, name: str, split: str) -> npt.NDArray[np.float64]:
    """Return the numbers of a split's labels, (n,) float64.

    Raises:
        UserError: a label is not finite, or all are equal; the message names the label set and the split.
    """
    found = values.cast(pl.Float64).to_numpy()
    if n := int((~np.isfinite(found)).sum()):
        raise UserError(
            f"label set {name}, split {split}: {n} of {len(found)} labels are NaN or infinite, so that their error would be too. "
            "Drop those rows."
        )
    if found.min() == found.max():
        raise UserError(
            f"label set {name}, split {split}: all {len(found)} labels are {found[0]:g}, so that nothing can be explained or "
            "ranked. Choose another label set, or splits in which it varies."
        )
    return found
