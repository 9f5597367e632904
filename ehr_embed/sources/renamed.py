"""Give every code of a dataset a meaningless id and a paraphrased description."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import polars as pl

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.files import file_sha256
from ehr_embed.core.settings import OneOf, Text, Told, check_setting
from ehr_embed.sources.code_texts import read_lookups
from ehr_embed.sources.protocol import SHARED, Source

SHIPPED = Path(__file__).parent / "paraphrases"
Missing = Annotated[str, OneOf("refuse", "keep")]
Table = Annotated[Text | None, Told("a CSV file, a table that comes with the package, or null", example="null")]


class RenamedSource:
    """Source that presents another source as a second hospital might have coded it.

    Events, values and labels are the same, but every code has an id that occurs nowhere else and a description from a
    table of paraphrases; only MEDS_BIRTH and MEDS_DEATH keep their ids, as in any MEDS dataset. So if a model trained on the
    inner source does worse here, the names alone are the cause.

    Args:
        inner: the other source.
        table: a CSV with columns code,term that holds the paraphrases, or the name of a table that comes with the
            package.
        missing: how to treat codes without a paraphrase: `refuse` them, or `keep` their descriptions.

    Raises:
        UserError: there is no such table, the source has none of its codes, or a code has no paraphrase.
    """

    def __init__(self, inner: Source, *, table: str, missing: Missing = "refuse") -> None:
        check_setting("data.renamed_missing", missing, Missing)
        self.inner, self.missing, self.path = inner, missing, find_table(table)
        # Earlier versions renamed MEDS_BIRTH too; their stores have the name with -renamed-.
        self.name = f"{inner.name}-recoded-{self.path.stem}"
        self.labels_dir, self.shards, self.writes = inner.labels_dir, inner.shards, inner.writes

    def read(self, shard: Path) -> pl.DataFrame:
        events = self.inner.read(shard)
        self._refuse_missing(events["code"].unique(), str(shard))
        return events.with_columns(_renamed(pl.col("code")))

    def code_metadata(self) -> pl.DataFrame:
        """Return the inner metadata with new ids and texts, and a row for each code that only the table describes."""
        metadata = self.inner.code_metadata()
        known = metadata["code"].implode()
        reworded = metadata.join(self._paraphrases, on="code", how="left", maintain_order="left")
        kept = pl.col("description") if self.missing == "keep" else pl.lit(None, pl.String)
        reworded = reworded.with_columns(description=pl.coalesce("term", kept)).drop("term")
        added = self._paraphrases.filter(~pl.col("code").is_in(known))
        added = added.select("code", description="term", parent_codes=pl.lit(None, metadata.schema["parent_codes"]))
        parents = pl.col("parent_codes").list.eval(_renamed(pl.element()))
        return pl.concat([reworded, added]).with_columns(_renamed(pl.col("code")), parents)

    def fingerprint(self) -> dict[str, Any]:
        return self.inner.fingerprint() | {"paraphrases": file_sha256(self.path), "paraphrases_missing": self.missing}

    @cached_property
    def _paraphrases(self) -> pl.DataFrame:
        """Return the rows code, term of the table of paraphrases."""
        return read_lookups([str(self.path)])

    @cached_property
    def _with_text(self) -> pl.Series:
        """Return the codes that have a text under their new id."""
        codes = self._paraphrases["code"]
        if self.missing == "keep":
            metadata = self.inner.code_metadata()
            if not len(metadata.filter(pl.col("code").is_in(codes.implode()))):
                raise UserError(
                    f"{self.path} has no paraphrase for any code of {self.inner.name}, so no description would be reworded: "
                    f"it belongs to another dataset. Type: data.renamed=FILE.csv with columns code,term, or one of "
                    f"{', '.join(shipped())}"
                )
            codes = pl.concat([codes, metadata.drop_nulls("description")["code"]])
        return codes

    def _refuse_missing(self, codes: pl.Series, where: str) -> None:
        kept = codes.str.split("//").list.first().is_in(list(SHARED))
        lacking = codes.filter(~kept & ~codes.is_in(self._with_text.implode())).sort()
        if not len(lacking):
            return
        remedy = (
            "" if self.missing == "keep" else ", or type: data.renamed_missing=keep for codes that have a description"
        )
        raise UserError(
            f"{self.path} has no paraphrase for {len(lacking)} of {len(codes)} codes in {where}, such as "
            f"{', '.join(lacking.head(3))}: under a new id nothing would say what they are. Add rows code,term{remedy}"
        )


def find_table(table: str) -> Path:
    """Return the file of a table, given its path or the name of a table that comes with the package.

    Raises:
        UserError: `table` is neither.
    """
    if (SHIPPED / f"{table}.csv").is_file():
        return SHIPPED / f"{table}.csv"
    if not Path(table).is_file():
        raise unknown_name("data.renamed", table, shipped(), "Or give a CSV file with columns code,term.")
    return Path(table).resolve()


def shipped() -> list[str]:
    """Return the names of the tables that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.csv"))


def renamed(code: str) -> str:
    """Return the new id of a code, a hash that reveals nothing of its meaning; MEDS's own codes keep theirs.

    >>> renamed("LAB//Creatinine"), renamed("MEDS_BIRTH")
    ('X//8760aa84721a', 'MEDS_BIRTH')
    """
    if code.partition("//")[0] in SHARED:
        return code
    return f"X//{hashlib.blake2b(code.encode(), digest_size=6).hexdigest()}"


def _renamed(codes: pl.Expr) -> pl.Expr:
    return codes.map_batches(
        lambda series: series.replace_strict(
            (distinct := series.drop_nulls().unique()),
            pl.Series([renamed(code) for code in distinct], dtype=pl.String),
            default=None,
            return_dtype=pl.String,
        ),
        return_dtype=pl.String,
    )
