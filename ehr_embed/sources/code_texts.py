"""Find the text of each code: from a lookup file, its description, its parent's description, or the code itself."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from ehr_embed.core.csv_tables import read_csv_table
from ehr_embed.core.errors import UserError

log = logging.getLogger(__name__)
STEPS = ("lookup", "description", "parent", "readable")
"""Origins of a text, the best first."""


def readable_code(code: str) -> str:
    """Return a code as words that a sentence transformer can read.

    >>> readable_code("LAB//Heart_Rate//bpm")
    'Lab, Heart Rate, bpm'
    >>> readable_code("MEDS_BIRTH")
    'Birth'
    >>> readable_code("ICD10CM/E11.9")
    'ICD10CM E11.9'
    """
    parts = [re.sub(r"[_/|]+", " ", part).strip() for part in code.removeprefix("MEDS_").split("//")]
    words = [
        part.capitalize() if part.isalpha() and part.isupper() and len(part) > 2 else part for part in parts if part
    ]
    return ", ".join(words) or code


def read_lookups(paths: Sequence[str]) -> pl.DataFrame:
    """Merge lookup CSVs with columns `code,term`; a later file overrides an earlier one.

    Raises:
        UserError: a file is missing, is not readable, or lacks the columns.
    """
    frames = [pl.DataFrame(schema={"code": pl.String, "term": pl.String})]
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"data.lookups: no such file {path}. Expected CSV files with columns code,term.")
        frame = read_csv_table(path, ("code", "term"))
        frame = frame.select("code", "term")
        terms = frame.drop_nulls().filter(pl.col("term") != "")
        _tell_ambiguous(terms.rename({"term": "text"}), str(path), "the last one is taken")
        if len(terms) < len(frame):
            log.warning(
                "%d of %d rows of %s have no code or no term, and are left out",
                len(frame) - len(terms),
                len(frame),
                path,
            )
        frames.append(terms)
    return pl.concat(frames).unique("code", keep="last", maintain_order=True)


def _tell_ambiguous(texts: pl.DataFrame, where: str, taken: str) -> None:
    """Warn if codes have several texts.

    Args:
        texts: rows of code, text.
        where: the file of the texts.
        taken: clause for the message that says which text is taken.
    """
    several = texts.unique(["code", "text"], maintain_order=True).filter(pl.col("code").is_duplicated())
    if len(several):
        code = several["code"][0]
        log.warning(
            "%s: %d of %d codes have several texts, such as %s (%s); %s",
            where, several["code"].n_unique(), texts["code"].n_unique(), code,
            " | ".join(several.filter(code=code)["text"].head(3)), taken,
        )  # fmt: skip


def resolve_texts(codes: pl.Series, metadata: pl.DataFrame, lookups: pl.DataFrame) -> pl.DataFrame:
    """Return the text of every code and its origin.

    Args:
        codes: distinct codes, String.
        metadata: code, description, parent_codes; several rows of a code have their descriptions joined by "; ".
        lookups: code, term; terms take precedence over descriptions.

    Returns:
        code, text, step (one of `STEPS`), in the order of `codes`.

    >>> metadata = pl.DataFrame({"code": ["A", "A", "P"], "description": ["fever", "pyrexia", "cough"],
    ...     "parent_codes": [None, None, None]}, schema_overrides={"parent_codes": pl.List(pl.String)})
    >>> metadata = pl.concat([metadata, pl.DataFrame({"code": ["B"], "description": [None], "parent_codes": [["P"]]},
    ...     schema=metadata.schema)])
    >>> resolve_texts(pl.Series(["A", "B", "C"]), metadata, read_lookups([])).rows()
    [('A', 'fever; pyrexia', 'description'), ('B', 'cough', 'parent'), ('C', 'C', 'readable')]
    """
    cleaned = metadata.with_columns(pl.col("description").str.strip_chars()).filter(pl.col("description") != "")
    described = cleaned.unique(["code", "description"], keep="first", maintain_order=True)
    wanted = described.filter(pl.col("code").is_in(codes.cast(pl.String).implode()))
    _tell_ambiguous(wanted.rename({"description": "text"}), "metadata/codes.parquet", 'they are joined by "; "')
    described = described.group_by("code", maintain_order=True).agg(pl.col("description").str.join("; "))
    known = pl.concat([lookups.rename({"term": "known"}), described.rename({"description": "known"})])
    known = known.unique("code", keep="first", maintain_order=True)
    parents = (
        metadata.select("code", pl.col("parent_codes").alias("parent"))
        .explode("parent", empty_as_null=True)
        .drop_nulls()
        .join(known.rename({"code": "parent", "known": "parent_text"}), on="parent", how="inner", maintain_order="left")
        .unique("code", keep="first", maintain_order=True)
        .select("code", "parent_text")
    )
    table = pl.DataFrame({"code": codes.cast(pl.String)})
    table = table.join(lookups, on="code", how="left", maintain_order="left")
    table = table.join(described, on="code", how="left", maintain_order="left")
    table = table.join(parents, on="code", how="left", maintain_order="left")
    readable = pl.col("code").map_elements(readable_code, return_dtype=pl.String)
    step = (
        pl.when(pl.col("term").is_not_null()).then(pl.lit("lookup"))
        .when(pl.col("description").is_not_null()).then(pl.lit("description"))
        .when(pl.col("parent_text").is_not_null()).then(pl.lit("parent"))
        .otherwise(pl.lit("readable"))
    )  # fmt: skip
    return table.select(
        "code", pl.coalesce("term", "description", "parent_text", readable).alias("text"), step.alias("step")
    )


def coverage(texts: pl.DataFrame, counts: pl.DataFrame) -> dict[str, dict[str, float]]:
    """Return the shares of codes and of events whose text has each origin of `STEPS`.

    Args:
        texts: as returned by `resolve_texts`.
        counts: code, count (events in train).

    >>> texts = pl.DataFrame({"code": ["A", "B"], "text": ["a", "b"], "step": ["lookup", "readable"]})
    >>> coverage(texts, pl.DataFrame({"code": ["A", "B"], "count": [9, 1]}))["events"]
    {'lookup': 0.9, 'description': 0.0, 'parent': 0.0, 'readable': 0.1}
    """
    joined = texts.join(counts, on="code", how="inner")
    n_codes, n_events = max(len(joined), 1), max(int(joined["count"].sum()), 1)
    by_step = {step: joined.filter(step=step) for step in STEPS}
    return {
        "codes": {step: len(frame) / n_codes for step, frame in by_step.items()},
        "events": {step: int(frame["count"].sum()) / n_events for step, frame in by_step.items()},
    }
