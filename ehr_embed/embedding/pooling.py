"""Bring the codes of pooled datasets together by text: a code of a later dataset is read as the nearest one of those before it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import polars as pl
from torch import Tensor

from ehr_embed.core.settings import OneOf
from ehr_embed.data.pool import Pool
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.embedding.aligning import AlignmentSettings, aligned_table, bundled
from ehr_embed.embedding.match_table import SHOWN, Alignment, align_codes, codes_of, say_other_kinds
from ehr_embed.embedding.own_pairs import check_pairs, read_pairs

log = logging.getLogger(__name__)
PoolCodes = Annotated[str, OneOf("aligned", "own")]
"""Codes of pooled datasets are read as each other's where texts say the same, or each is one of its own."""
MERGED_FROM = 0.5
"""Gate from which on a code is read as another one. Alone in its place it would count in full, however small its gate."""


def pool_alignment(
    settings: AlignmentSettings, vocabulary: Vocabulary, pool: Pool, *, cache_dir: Path | None = None
) -> Alignment:
    """Return as which code of the pool each code is read: as itself, or as a code of an earlier dataset with nearly the same text.

    The codes of the first dataset and those that all share are read as themselves. Each code of a later dataset goes to the nearest
    one of the codes that lead so far, of its kind, if the gate is `MERGED_FROM` or more, and else leads itself. Medians that differ
    by a factor are warned of, as in any alignment.

    Args:
        settings: rules, own pairs and texts, as for the alignment with a run.
        vocabulary: of the pool.
        pool: its datasets.
        cache_dir: folder of the cache of text vectors; None = vectors are not cached.

    Raises:
        UserError: own pairs name an unknown code.
    """
    codes = codes_of(vocabulary)
    number = pl.Series(pool.of_codes(codes["code"].to_list()))
    first = min((n for n in number.unique().to_list() if n >= 0), default=0)
    leading = codes.filter((number < 0) | (number == first))
    tables = [_as_themselves(leading)]
    pairs = None if settings.pairs is None else read_pairs(settings.pairs)
    if pairs is not None:
        check_pairs(pairs, codes["code"].to_list())
    with bundled(cache_dir) as embed:
        for other in range(first + 1, len(pool.names)):
            own = codes.filter(number == other)
            if not len(own):
                continue
            of_these = None if pairs is None else pairs.filter(pl.col("code").is_in(own["code"].implode()))
            found = align_codes(
                leading,
                own,
                embed=embed,
                rules=settings.read(),
                pairs=of_these,
                texts=settings.texts,
                matching=settings.matching,
                seed=settings.seed,
            )
            say_other_kinds(found)
            is_merged = pl.col("gate") >= MERGED_FROM
            merged = found.filter(is_merged)
            _say(merged, len(own), pool.names[other])
            alone = own.filter(pl.col("code").is_in(found.filter(~is_merged)["code"].implode()))
            tables += [merged, _as_themselves(alone)]
            leading = pl.concat([leading, alone])
    table = pl.concat(tables)
    total = max(int(table["n_events"].sum()), 1)
    return Alignment(table.with_columns(share=pl.col("n_events") / total).sort("n_events", descending=True))


def pooled_table(alignment: Alignment, vocabulary: Vocabulary, vectors: Tensor) -> Tensor:
    """Return the vector of each token, (V, E): that of the code as which it is read, as far as the gate says, and else its own."""
    return aligned_table(alignment, vocabulary, vocabulary, vectors, vectors)


def _as_themselves(codes: pl.DataFrame) -> pl.DataFrame:
    """Return rows of a match table in which each code is read as itself."""
    return codes.select(
        "code", "text", matched_code="code", matched_text="text", cosine=pl.lit(1.0), gate=pl.lit(1.0), origin=pl.lit("own"),
        n_events="n_events", share=pl.lit(0.0), q10="q10", q50="q50", q90="q90", matched_q10="q10", matched_q50="q50",
        matched_q90="q90", warning=pl.lit(""),
    )  # fmt: skip


def _say(merged: pl.DataFrame, n_codes: int, name: str) -> None:
    """Log which codes of a dataset are read as earlier ones, and warn of numbers that disagree, or of no code in common."""
    if not len(merged):
        log.warning(
            "no code of %s has the text of a code of the datasets before it, so nothing but the model joins them. Give "
            "descriptions in metadata/codes.parquet, data.lookups=[FILE.csv] (codes as DATASET//CODE), or "
            "data.alignment_pairs=FILE.csv", name,
        )  # fmt: skip
        return
    log.info(
        "%s: %d of %d codes are read as those of the datasets before it, %.1f%% of its events",
        name, len(merged), n_codes, 100 * float(merged["share"].sum()),
    )  # fmt: skip
    for row in merged.head(SHOWN).iter_rows(named=True):
        log.info(
            "  %s -> %s  (cosine %.2f)%s",
            row["text"],
            row["matched_text"],
            row["cosine"],
            f"  {row['warning']}" if row["warning"] else "",
        )
    doubtful = merged.filter(pl.col("warning") != "")
    if len(doubtful):
        log.warning(
            "%d codes of %s have numbers that disagree with those of the code that they are read as, such as %s -> %s (%s). "
            "Numbers are ranked within their own dataset, so another unit does no harm, but another quantity does: correct "
            "alignment.csv, and type: data.alignment_pairs=FILE.csv",
            len(doubtful), name, doubtful["text"][0], doubtful["matched_text"][0], doubtful["warning"][0],
        )  # fmt: skip
