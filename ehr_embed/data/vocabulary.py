"""Fit the vocabulary on train: one token per code, or one per code and value bin."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import Field

from ehr_embed.core.files import atomic_path, file_sha256, read_json, write_json
from ehr_embed.core.settings import OneOf, Switch, Text, Told, check_settings
from ehr_embed.data.code_statistics import code_statistics
from ehr_embed.data.value_bins import bin_edges, bin_text, quantile, robust_scale
from ehr_embed.sources.code_texts import coverage, read_lookups, resolve_texts
from ehr_embed.sources.protocol import Source

PADDING, UNKNOWN, FIRST_TOKEN = 0, 1, 2
UNKNOWN_TEXT = "Unknown event"
TOKENS_FILE = "vocab.csv"
"""The tokens in a vocabulary's folder; the digest of this file is the vocabulary's identity."""
Values = Annotated[str, OneOf("bins", "continuous", "both", "none")]
SHARES = (0.1, 0.5, 0.9)
"""Quantiles that are kept of each code's values, for a reader who compares two datasets."""
VALUE_LIMIT = 10.0
"""Normalised values are clipped to this many robust standard deviations; values beyond it are mostly typing errors."""


@dataclass(frozen=True)
class VocabularySettings:
    """Settings with which the vocabulary is fitted.

    Attributes:
        values: `bins` (token = code and value bin), `continuous` (token = code, number beside it), `both`, or `none`.
        n_bins: quantile bins per code.
        min_count: a code with fewer train events gets its parent's token or, if it has no useful parent, a token
            without value bins.
        lookups: CSV files with columns code,term; their texts take precedence over the dataset's descriptions.
        describe_unseen: whether a code that never occurs in train, but has a text in a description or lookup, gets a
            token of its own, without values; if False, such a code has its parent's token or is unknown.
    """

    values: Values = "bins"
    n_bins: Annotated[
        int,
        Field(ge=2, le=10_000),
        Told("2 to 10000 bins", example="10", remedy="Use data.values=none to leave values out."),
    ] = 10
    min_count: Annotated[int, Field(ge=1), Told("1 or more events", example="5")] = 5
    lookups: Annotated[tuple[Text, ...], Told("a list of CSV files", example="[FILE.csv]")] = ()
    describe_unseen: Switch = False

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self), "data")

    @property
    def has_bins(self) -> bool:
        return self.values in ("bins", "both")

    @property
    def has_values(self) -> bool:
        return self.values in ("continuous", "both")


@dataclass(frozen=True)
class Vocabulary:
    """V tokens, and the map from (code, value) to them. Derived arrays are cached, so nothing in it may be changed.

    Attributes:
        settings: the settings with which it was fitted.
        tokens: one row per token: token (row number), str (name), text, count (train events; 0 until the store is
            built).
        codes: one row per code: code, plain_token (token without value bin), bin_token (token of the first bin, -1 = no
            bins), edges (lower bounds of the second and later bins), loc and scale (median and robust standard
            deviation of the values in train), quantiles (10, 50 and 90 % of these values; empty = no values, and no
            column in vocabularies of earlier versions).
        report: shares of codes and events by the origin of their text, and numbers of folded codes.
    """

    settings: VocabularySettings
    tokens: pl.DataFrame
    codes: pl.DataFrame
    report: dict[str, Any]

    @cached_property
    def texts(self) -> list[str]:
        """Return the text of every token, (V,); token 0, padding, has an empty text."""
        return self.tokens["text"].to_list()

    @cached_property
    def strings(self) -> list[str]:
        """Return the distinct names of the tokens, (V,): the code, with the value bin if there is one."""
        return self.tokens["str"].to_list()

    @cached_property
    def plain_tokens(self) -> npt.NDArray[np.int64]:
        """Return for each token, (V,), the token of its code without value bin, which is itself if it has no bin."""
        tokens = np.arange(len(self))
        for plain, first, edges in self.codes.select("plain_token", "bin_token", "edges").iter_rows():
            if first >= 0:
                tokens[first : first + len(edges) + 1] = plain
        return tokens

    @cached_property
    def token_codes(self) -> list[str | None]:
        """Return the code of every token, without its value bin; None for the special tokens.

        A token to which rare codes were folded has the code of their parent.
        """
        strings = self.strings
        return [None] * FIRST_TOKEN + [strings[token] for token in self.plain_tokens[FIRST_TOKEN:].tolist()]

    @cached_property
    def token_bins(self) -> npt.NDArray[np.float32]:
        """Return the number of every token's value bin, (V,), counted from 1; NaN for a token without a bin."""
        bins = np.full(len(self), np.nan, np.float32)
        for first, edges in self.codes.select("bin_token", "edges").iter_rows():
            if first >= 0:
                bins[first : first + len(edges) + 1] = np.arange(1, len(edges) + 2)
        return bins

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, codes: pl.Series, values: pl.Series) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Return the token id and the normalised value of every event.

        Args:
            codes: (N,) String.
            values: (N,) Float32, null = no value.

        Returns:
            Token ids (N,) int32, `UNKNOWN` for a code without a token and without a parent that has one; values (N,)
            float32 in robust standard deviations from the train median, NaN for events without a value, or if the
            settings carry no values.
        """
        index = pl.DataFrame({"code": self.codes["code"], "index": np.arange(len(self.codes), dtype=np.int64)})
        row = pl.DataFrame({"code": codes}).join(index, on="code", how="left", maintain_order="left")["index"]
        known = row.is_not_null().to_numpy()
        row_N = row.fill_null(0).to_numpy()
        value_N = values.cast(pl.Float32).fill_null(float("nan")).to_numpy()
        if not len(self.codes):
            return np.full(len(codes), UNKNOWN, np.int32), np.full(len(codes), np.nan, np.float32)

        token_N = self.codes["plain_token"].to_numpy()[row_N].astype(np.int32)
        edges = self._edges
        first_bin_N = self.codes["bin_token"].to_numpy()[row_N]
        binned = np.flatnonzero((first_bin_N >= 0) & ~np.isnan(value_N))
        for part in np.array_split(binned, max(1, len(binned) // 100_000)):
            bins = (edges[row_N[part]] <= value_N[part, None]).sum(axis=1)
            token_N[part] = first_bin_N[part] + bins
        token_N[~known] = UNKNOWN

        if not self.settings.has_values:
            return token_N, np.full(len(codes), np.nan, np.float32)
        loc_N, scale_N = self.codes["loc"].to_numpy()[row_N], self.codes["scale"].to_numpy()[row_N]
        normal_N = np.clip((value_N - loc_N) / scale_N, -VALUE_LIMIT, VALUE_LIMIT).astype(np.float32)
        normal_N[~known] = np.nan
        return token_N, normal_N

    def decode(self, token_ids: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> pl.DataFrame:
        """Return the codes and numbers of generated events; this inverts `encode` as far as possible.

        Args:
            token_ids: (N,) token ids.
            values: (N,) normalised values, NaN = no value.

        Returns:
            One row per event: code String, without value bin, and for a rare code the parent into which it was folded;
            numeric_value Float32, null where the value is NaN.
        """
        code_of, row_of = self.token_codes, self._row_of_code
        codes = [code_of[token] for token in token_ids.tolist()]
        row_N = np.array([-1 if code is None else row_of.get(code, -1) for code in codes], np.int64)
        scale_N, loc_N = np.ones(len(codes)), np.zeros(len(codes))
        scale_N[row_N >= 0] = self.codes["scale"].to_numpy()[row_N[row_N >= 0]]
        loc_N[row_N >= 0] = self.codes["loc"].to_numpy()[row_N[row_N >= 0]]
        numbers = pl.Series("numeric_value", values * scale_N + loc_N).fill_nan(None).cast(pl.Float32)
        return pl.DataFrame({"code": pl.Series(codes, dtype=pl.String), "numeric_value": numbers})

    @cached_property
    def _row_of_code(self) -> dict[str, int]:
        return {code: row for row, code in enumerate(self.codes["code"])}

    @cached_property
    def _edges(self) -> npt.NDArray[np.float32]:
        lists = self.codes["edges"].to_list()
        edges = np.full((len(lists), max([1, *map(len, lists)])), np.inf, np.float32)
        for row, values in enumerate(lists):
            edges[row, : len(values)] = values
        return edges

    def with_counts(self, counts: npt.NDArray[np.int64]) -> Vocabulary:
        """Return the same vocabulary with the number of train events of each token, (V,)."""
        return Vocabulary(self.settings, self.tokens.with_columns(count=pl.Series(counts)), self.codes, self.report)

    def with_codes(self, texts: pl.DataFrame) -> Vocabulary:
        """Return the vocabulary with one more token for each row of `texts` (code, text), whose codes must be new.

        Values of the new codes are left out, since train gives no scale for them.
        """
        new = np.arange(len(self), len(self) + len(texts))
        tokens = texts.select(token=pl.Series(new), str="code", text="text", count=pl.lit(0, pl.Int64))
        codes = texts.select(
            code="code",
            plain_token=pl.Series(new, dtype=pl.Int32),
            bin_token=pl.lit(-1, pl.Int32),
            edges=pl.lit([], pl.List(pl.Float32)),
            loc=pl.lit(float("nan")),
            scale=pl.lit(1.0),
        )
        # Vocabularies of earlier versions have no quantiles.
        tokens, codes = pl.concat([self.tokens, tokens]), pl.concat([self.codes, codes], how="diagonal")
        return Vocabulary(self.settings, tokens, codes, self.report)

    def save(self, folder: Path) -> None:
        """Write vocab.csv (token,str,text,count), codes.parquet and vocabulary.json to `folder`."""
        with atomic_path(folder / TOKENS_FILE) as path:
            self.tokens.write_csv(path)
        with atomic_path(folder / "codes.parquet") as path:
            self.codes.write_parquet(path)
        settings = {**self.settings.__dict__, "lookups": list(self.settings.lookups)}
        write_json(folder / "vocabulary.json", {"settings": settings, "report": self.report})

    @staticmethod
    def load(folder: Path) -> Vocabulary:
        """Read the vocabulary that `save` wrote to `folder`."""
        about = read_json(folder / "vocabulary.json")
        schema = {"token": pl.Int64, "str": pl.String, "text": pl.String, "count": pl.Int64}
        tokens = pl.read_csv(folder / TOKENS_FILE, glob=False, schema=schema).with_columns(pl.col("text").fill_null(""))
        settings = VocabularySettings(**{**about["settings"], "lookups": tuple(about["settings"]["lookups"])})
        return Vocabulary(settings, tokens, pl.read_parquet(folder / "codes.parquet", glob=False), about["report"])


def vocabulary_sha256(folder: Path) -> str | None:
    """Return the digest by which stores, tables and checkpoints know the vocabulary in `folder`; None where there is none."""
    file = folder / TOKENS_FILE
    return file_sha256(file) if file.is_file() else None


def read_strings(folder: Path) -> list[str]:
    """Return the strings of all tokens (V,) of the vocabulary in `folder`, in the order of their ids."""
    return pl.read_csv(folder / TOKENS_FILE, glob=False, columns=["str"], schema_overrides={"str": pl.String})[
        "str"
    ].to_list()


def fit_vocabulary(
    source: Source, settings: VocabularySettings, *, scratch: Path | None = None, seed: int = 0
) -> Vocabulary:
    """Fit tokens, bins and value normalisation on the train split of `source`, one shard in memory at a time.

    Args:
        source: the source of the events and of the descriptions of codes.
        settings: the settings of the vocabulary.
        scratch: folder for temporary files of values that do not fit in memory; None = the system's.
        seed: seed of the samples of values, see `code_statistics`.

    Raises:
        UserError: there is no train event, or `scratch` cannot be written to.
    """
    counts, numbers = code_statistics(source, lambda values: _numbers(values, settings), scratch=scratch, seed=seed)
    metadata, lookups = source.code_metadata(), read_lookups(settings.lookups)
    every_code = pl.concat([counts["code"], metadata["code"], lookups["code"]]).unique(maintain_order=True)
    parents = metadata.select("code", pl.col("parent_codes").alias("parent")).explode("parent", empty_as_null=True)
    parents = parents.drop_nulls().unique(maintain_order=True)
    every_code = pl.concat([every_code, parents["parent"]]).unique(maintain_order=True)
    texts = resolve_texts(every_code, metadata, lookups)

    frequent = counts.filter(pl.col("count") >= settings.min_count)
    rare = counts.filter(pl.col("count") < settings.min_count)
    described = texts.filter(pl.col("step") != "readable")["code"]
    useful = parents.filter(
        pl.col("parent").is_in(described.implode()) | pl.col("parent").is_in(frequent["code"].implode())
    )
    useful = useful.unique("code", keep="first", maintain_order=True)
    folded = rare.join(useful, on="code", how="inner", maintain_order="left")
    plain = rare.join(useful, on="code", how="anti", maintain_order="left")

    builder = _Builder(dict(zip(texts["code"], texts["text"], strict=True)))
    for code in frequent["code"]:
        builder.add(code, numbers.get(code, NO_NUMBERS))
    for code in plain["code"]:
        builder.add(code, numbers.get(code, NO_NUMBERS))
    for code, parent in folded.select("code", "parent").iter_rows():
        builder.fold(code, parent, numbers.get(code, NO_NUMBERS))
    # Codes of the other splits are never counted. A description in the metadata is no statistic of these splits, so
    # such a code may get a token from its description; a code without one still uses its parent's token, if that
    # exists.
    own_text = texts.filter(pl.col("step").is_in(["lookup", "description"]) & settings.describe_unseen)
    described_unseen = own_text.filter(~pl.col("code").is_in(counts["code"].implode()))["code"]
    for code in described_unseen:
        builder.describe(code)
    unseen = useful.filter(~pl.col("code").is_in([*counts["code"], *described_unseen]))
    unseen = unseen.filter(pl.col("parent").is_in(list(builder.plain)))
    for code, parent in unseen.iter_rows():
        builder.fold(code, parent, NO_NUMBERS)

    report = {
        "text_coverage": coverage(texts, counts),
        "codes_in_train": len(counts),
        "codes_with_bins": sum(bool(len(found.edges)) for found in numbers.values()),
        "rare_codes_folded_into_parent": len(folded),
        "rare_codes_kept_as_plain_text": len(plain),
        "unseen_codes_mapped_to_parent": len(unseen),
        "unseen_codes_described": len(described_unseen),
        "tokens": len(builder.strings),
    }
    return Vocabulary(settings, builder.tokens(), builder.codes(), report)


@dataclass(frozen=True)
class _Numbers:
    """Bin edges, scale and quantiles of a code's values, as they enter the vocabulary."""

    edges: list[float]
    loc: float
    scale: float
    quantiles: list[float]


NO_NUMBERS = _Numbers([], 0.0, 1.0, [])


def _numbers(values: npt.NDArray[np.float32], settings: VocabularySettings) -> _Numbers:
    is_binned = settings.has_bins and len(values) >= settings.min_count
    edges = bin_edges(values, settings.n_bins).tolist() if is_binned else []
    ordered = np.sort(values)
    return _Numbers(edges, *robust_scale(values), [quantile(ordered, share) for share in SHARES])


class _Builder:
    """Collect the tokens, and the rows of the map from codes to tokens."""

    def __init__(self, text_of: dict[str, str]) -> None:
        self.text_of = text_of
        self.strings, self.texts = [self._free("<padding>"), self._free("<unknown>")], ["", UNKNOWN_TEXT]
        self.plain: dict[str, int] = {}
        self.rows: dict[str, tuple[int, int, list[float], float, float, list[float]]] = {}

    def _free(self, string: str) -> str:
        """Return `string`, with primes added until no code has that name, since tokens are looked up by name."""
        while string in self.text_of:
            string += "'"
        return string

    def _token(self, string: str, text: str) -> int:
        self.strings.append(string)
        self.texts.append(text)
        return len(self.strings) - 1

    def _plain_token(self, code: str) -> int:
        if code not in self.plain:
            self.plain[code] = self._token(code, self.text_of[code])
        return self.plain[code]

    def add(self, code: str, numbers: _Numbers) -> None:
        plain, first, edges = self._plain_token(code), -1, numbers.edges
        if len(edges):
            n_bins = len(edges) + 1
            bins = [
                self._token(
                    self._free(f"{code}//bin_{number}_of_{n_bins}"), f"{self.text_of[code]}: {bin_text(number, n_bins)}"
                )
                for number in range(1, n_bins + 1)
            ]
            first = bins[0]
        self.rows[code] = (plain, first, edges, numbers.loc, numbers.scale, numbers.quantiles)

    def describe(self, code: str) -> None:
        """Add a token with the code's text and no values, which have no scale without events in train."""
        self.rows[code] = (self._plain_token(code), -1, [], float("nan"), 1.0, [])

    def fold(self, code: str, parent: str, numbers: _Numbers) -> None:
        self.rows[code] = (self._plain_token(parent), -1, [], numbers.loc, numbers.scale, numbers.quantiles)

    def tokens(self) -> pl.DataFrame:
        n = len(self.strings)
        return pl.DataFrame(
            {"token": np.arange(n), "str": self.strings, "text": self.texts, "count": np.zeros(n, np.int64)},
        )

    def codes(self) -> pl.DataFrame:
        schema: dict[str, Any] = {
            "code": pl.String,
            "plain_token": pl.Int32,
            "bin_token": pl.Int32,
            "edges": pl.List(pl.Float32),
            "loc": pl.Float64,
            "scale": pl.Float64,
            "quantiles": pl.List(pl.Float32),
        }
        return pl.DataFrame([(code, *row) for code, row in self.rows.items()], schema=schema, orient="row")
