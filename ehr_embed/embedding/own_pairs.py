"""Read one's own pairs of codes, which override what texts say, and refuse those that cannot be meant."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import polars as pl

from ehr_embed.core.csv_tables import read_csv_table
from ehr_embed.core.errors import UserError

TWINS = "twins"
"""Column of alignment.csv: a JSON list of the twins of a row's matched code."""


def read_pairs(path: str) -> pl.DataFrame:
    """Read a CSV of one's own pairs: columns code, matched_code (empty = no match), and perhaps gate, 0 to 1, and twins, a JSON
    list of further codes of the run that take the matched code's events (empty = none); others are ignored, so that a corrected
    alignment.csv can be given back.

    Returns:
        code, matched_code and gate, and twins as lists if the file has the column.

    Raises:
        UserError: the file is missing or has other columns, a code twice, a gate that is no number from 0 to 1, or twins that are
            no such list.
    """
    if not Path(path).is_file():
        raise UserError(
            f"data.alignment_pairs={path}: no such file. Expected a CSV file with columns code,matched_code."
        )
    frame = read_csv_table(path, ("code", "matched_code"))
    if "gate" not in frame.columns:
        frame = frame.with_columns(gate=pl.lit(None, pl.String))
    twins = None
    if TWINS in frame.columns:
        twins = [_listed(path, code, text) for code, text in frame.select("code", TWINS).iter_rows()]
    frame = frame.select("code", "matched_code", "gate").with_columns(
        pl.col("matched_code").replace("", None), pl.col("gate").replace("", None)
    )
    numbers = frame["gate"].cast(pl.Float64, strict=False)
    wrong = frame.filter(pl.col("gate").is_not_null() & ~numbers.fill_null(-1.0).is_between(0, 1))
    if len(wrong):
        raise UserError(f"{path}: gate of {wrong['code'][0]} is {wrong['gate'][0]!r}, expected a number from 0 to 1.")
    twice = frame.filter(pl.col("code").is_duplicated())
    if len(twice) or frame["code"].null_count():
        raise UserError(
            f"{path}: {twice['code'][0] if len(twice) else 'an empty code'} stands in it {'twice' if len(twice) else ''}: expected "
            "one row per code of the dataset, since each has one match. Remove the others."
        )
    frame = frame.with_columns(gate=numbers)
    return frame if twins is None else frame.with_columns(pl.Series(TWINS, twins, dtype=pl.List(pl.String)))


def _listed(path: str, code: str, text: str | None) -> list[str]:
    """Return the twins of a row of a CSV file.

    Raises:
        UserError: the text is no JSON list of texts.
    """
    try:
        found = json.loads(text or "[]")
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(twin, str) for twin in found):
        raise UserError(
            f'{path}: twins of {code} are {text!r}, expected a JSON list of codes of the run, such as ["A", "B"], or nothing.'
        )
    return found


def check_pairs(pairs: pl.DataFrame, codes: list[str]) -> None:
    """Refuse pairs of a pool that name a code which it does not have.

    Raises:
        UserError: names the code and the nearest one.
    """
    known = dict.fromkeys(codes)
    for name in [*pairs["code"], *pairs["matched_code"].drop_nulls()]:
        if name not in known:
            raise unknown_pair(name, codes, "the pooled datasets")


def unknown_pair(name: str, known: list[str], where: str) -> UserError:
    """Return what to raise for a name of a pair that is no code of `where`."""
    near = difflib.get_close_matches(name, known, n=1)
    return UserError(
        f"data.alignment_pairs names {name}, which is no code of {where} that occurs in train"
        f"{f': did you mean {near[0]}?' if near else '.'} Nothing would ever match it. RUN/alignment.csv lists the codes of both. "
        "Correct or remove the row."
    )


def twins_of_pairs(pairs: pl.DataFrame | None, codes: list[str]) -> dict[str, list[str]]:
    """Return for each matched code of one's own pairs the twins that all of its rows list; empty without such a
    column.

    Raises:
        UserError: a twin is none of the run's codes.
    """
    if pairs is None or TWINS not in pairs.columns:
        return {}
    known, found = dict.fromkeys(codes), dict[str, list[str]]()
    for code, twins in pairs.drop_nulls("matched_code").select("matched_code", TWINS).iter_rows():
        for twin in twins:
            if twin not in known:
                raise unknown_pair(twin, codes, "the run")
        found[code] = [twin for twin in found.get(code, twins) if twin in twins]
    return found
