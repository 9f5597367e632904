"""Read the CSV files that users write, such as lookups, synonyms and pairs of codes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from ehr_embed.core.errors import UserError


def read_csv_table(path: str | Path, columns: Sequence[str]) -> pl.DataFrame:
    """Return a CSV file as text, with all its columns; the path is no pattern.

    Args:
        path: an existing file.
        columns: columns that it must have.

    Raises:
        UserError: the file is no CSV in UTF-8, or lacks a column.
    """
    names = ",".join(columns)
    try:
        frame = pl.read_csv(path, glob=False, infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a readable CSV file ({told}). Expected UTF-8 with columns {names}.") from error
    if not set(columns) <= set(frame.columns):
        raise UserError(f"{path}: expected columns {names}, found {', '.join(frame.columns)}.")
    return frame
