"""A sparse table of features for models that are fitted to a table, in about a tenth of the dense table's memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

Floats32 = npt.NDArray[np.float32]
BLOCK_BYTES = 64 << 20
CELL_BYTES = 8
"""Bytes of one stored cell: its number and its column, of four bytes each."""


@dataclass(frozen=True)
class FeatureTable:
    """Holds an (n, F) table sparsely: each column has a usual value, 0 or NaN (missing); only other cells are stored.

    A count is usually 0, and other features are usually missing. Zero and missing can thus be told apart, unlike in a
    sparse matrix alone, where an absent cell is 0.

    Attributes:
        cells: (n, F) CSR matrix of float32 with the cells that differ from the usual value of their column; a stored
            cell may itself be 0 or NaN.
        usual: (F,) float32, the usual value of each column, 0 or NaN.

    >>> nan = float("nan")
    >>> dense = np.array([[0, nan, 1], [2, nan, nan], [0, 0, nan]], np.float32)
    >>> table = FeatureTable.from_blocks([(np.array([2, 0]), dense[[2, 0]]), (np.array([1]), dense[1:2])], 3)
    >>> table.cells.nnz, np.array_equal(table.dense(slice(None)), dense, equal_nan=True)
    (3, True)
    """

    cells: sparse.csr_matrix
    usual: Floats32

    @classmethod
    def from_blocks(cls, blocks: Iterable[tuple[npt.NDArray[np.int64], Floats32]], n: int) -> FeatureTable:
        """Build a table of n rows from blocks of row numbers (B,) and features (B, F).

        The blocks may come in any order and hold each row once; the first block decides the usual value of each column.
        """
        usual: Floats32 | None = None
        parts: list[tuple[npt.NDArray[np.int64], sparse.csr_matrix]] = []
        counts = np.zeros(n, np.int64)
        for rows, dense in blocks:
            if usual is None:
                usual = np.where(np.isnan(dense).sum(0) >= (dense == 0).sum(0), np.nan, 0).astype(np.float32)
            found = sparse_block(dense, usual)
            counts[rows] = np.diff(found.indptr)
            parts.append((rows, found))
        if usual is None:
            return cls(sparse.csr_matrix((n, 0), dtype=np.float32), np.empty(0, np.float32))
        indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        columns, data = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
        while parts:  # pop frees the memory of each block after it is copied
            rows, found = parts.pop()
            lengths = np.diff(found.indptr).astype(np.int64)
            place = np.arange(found.nnz) + np.repeat(indptr[rows] - found.indptr[:-1], lengths)
            columns[place], data[place] = found.indices, found.data
        cells = sparse.csr_matrix((n, len(usual)), dtype=np.float32)
        # The arrays are assigned, because the constructor would convert the columns to the 64-bit type of `indptr`.
        cells.data, cells.indices = data, columns
        cells.indptr = indptr.astype(np.int32) if indptr[-1] < np.iinfo(np.int32).max else indptr
        return cls(cells, usual)

    def rows(self, chosen: npt.NDArray[np.int64]) -> FeatureTable:
        """Return the table of some rows, (m,) numbers."""
        return FeatureTable(self.cells[chosen], self.usual)

    @property
    def shape(self) -> tuple[int, int]:
        return self.cells.shape[0], len(self.usual)

    def __len__(self) -> int:
        return self.cells.shape[0]

    def dense(self, rows: slice | npt.NDArray[np.int64] | list[int]) -> Floats32:
        """Return the features of rows, (B, F) float32, NaN = missing."""
        part = self.cells[rows]
        found = np.tile(self.usual, (part.shape[0], 1))
        found[np.repeat(np.arange(part.shape[0]), np.diff(part.indptr)), part.indices] = part.data
        return found

    @property
    def n_unusual(self) -> npt.NDArray[np.int64]:
        """Count the cells of each column that are not the usual one, (F,)."""
        return np.bincount(self.cells.indices, minlength=len(self.usual))

    @property
    def block_rows(self) -> int:
        """Return the number of rows whose dense features in float64 take at most `BLOCK_BYTES`."""
        return max(1, BLOCK_BYTES // (8 * max(1, len(self.usual))))

    def blocks(self) -> Iterator[slice]:
        """Yield consecutive ranges of at most `block_rows` rows."""
        for start in range(0, len(self), self.block_rows):
            yield slice(start, min(start + self.block_rows, len(self)))

    def filled(self, fill: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the stored cells (m,) and the usual values (F,), with the numbers of `fill` (F,) in place of NaN."""
        data = self.cells.data.astype(np.float64)
        missing = np.flatnonzero(np.isnan(data))
        data[missing] = fill[self.cells.indices[missing]]
        return data, np.where(np.isnan(self.usual), fill, 0.0)

    def medians(self) -> npt.NDArray[np.float64]:
        """Return the median of each column over its cells that are not NaN, (F,); NaN for a column of NaN alone."""
        columns = self.cells.tocsc()
        result = np.empty(len(self.usual))
        for column, (low, high) in enumerate(zip(columns.indptr[:-1], columns.indptr[1:], strict=True)):
            data = columns.data[low:high]
            numbers = data[~np.isnan(data)].astype(np.float64)
            n_zero = 0 if np.isnan(self.usual[column]) else len(self) - (high - low)
            if not len(numbers) + n_zero:
                result[column] = np.nan
            elif max((numbers < 0).sum(), (numbers > 0).sum()) * 2 < len(numbers) + n_zero:
                result[column] = 0.0
            else:
                result[column] = np.median(np.concatenate([numbers, np.zeros(n_zero)]))
        return result


def sparse_block(dense: Floats32, usual: Floats32) -> sparse.csr_matrix:
    """Return the cells of (B, F) features that differ from the usual value of their column, as a CSR matrix."""
    is_usual = np.where(np.isnan(usual), np.isnan(dense), dense == 0)
    rows, columns = np.nonzero(~is_usual)
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(rows, minlength=len(dense)))])
    return sparse.csr_matrix((dense[rows, columns], columns.astype(np.int32), indptr), shape=dense.shape)
