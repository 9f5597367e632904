"""The datasets behind a pooled store: which of them a subject or a code comes from, and how their samples are weighed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from ehr_embed.core.settings import OneOf
from ehr_embed.sources.pooled import dataset_of

PoolWeights = Annotated[str, OneOf("samples", "datasets")]
"""Samples of all datasets weigh the same, or the datasets do."""


@dataclass(frozen=True)
class Pool:
    """The datasets of a pool.

    Attributes:
        names: of all datasets that number ids, read or not.
        read: names of those that are read.
    """

    names: tuple[str, ...]
    read: tuple[str, ...]

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Pool | None:
        """Return the pool of a store's manifest; None for a single dataset."""
        found = manifest.get("source", {}).get("pool")
        return None if found is None else cls(tuple(found["datasets"]), tuple(found["read"]))

    def of_subjects(self, subject_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number of each subject's dataset, (n,).

        >>> Pool(("a", "b"), ("a", "b")).of_subjects(np.array([6, 7, -1])).tolist()
        [0, 1, 1]
        """
        found: npt.NDArray[np.int64] = subject_ids % len(self.names)
        return found

    def of_codes(self, codes: list[str | None]) -> npt.NDArray[np.int64]:
        """Return the number of each code's dataset, (n,), -1 for a code that all share, and for none."""
        return np.array([-1 if code is None else dataset_of(code, self.names) for code in codes], np.int64)

    def weights(self, subject_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return weights (n,) of samples by which all datasets that occur weigh the same; their mean is 1.

        >>> Pool(("a", "b"), ("a", "b")).weights(np.array([0, 2, 4, 1])).round(3).tolist()
        [0.667, 0.667, 0.667, 2.0]
        """
        number = self.of_subjects(subject_ids)
        counts = np.bincount(number, minlength=len(self.names))
        return np.asarray(len(number) / (np.count_nonzero(counts) * counts[number]), np.float64)
