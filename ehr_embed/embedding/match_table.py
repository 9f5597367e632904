"""The match table: which code of a run stands for each code of a dataset, how surely, and whether their numbers agree.

`align` makes the table from two vocabularies; a person reads it as CSV, corrects it, and gives it back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path, digest
from ehr_embed.core.settings import OneOf, check_setting
from ehr_embed.data.vocabulary import FIRST_TOKEN, UNKNOWN, Vocabulary
from ehr_embed.embedders.shuffled_text import deranged
from ehr_embed.embedding.alignment import (
    ONE_TO_ONE_COSINES,
    Floats,
    Matching,
    Rules,
    gate,
    nearest,
    one_to_one,
    phrasings,
)
from ehr_embed.embedding.disagreement import NUMBERS_HERE, NUMBERS_THERE, disagreement, of_other_kind
from ehr_embed.embedding.own_pairs import TWINS, twins_of_pairs, unknown_pair

log = logging.getLogger(__name__)
Texts = Annotated[str, OneOf("own", "shuffled")]
"""Texts by which codes are aligned: their own, or, as a control, those of others."""
QUANTILES = ("q10", "q50", "q90")
SAME_CODE, PAIR = "same code", "pair"
"""Origins of a match that no text decides."""
OF_NORMAL = (-1.2816, 0.0, 1.2816)
"""Quantiles 10, 50 and 90 % of a standard normal, for vocabularies of earlier versions, which kept a median and a spread alone."""
SHOWN = 40


@dataclass(frozen=True, eq=False)
class Alignment:
    """The codes of a run that stand for the codes of a dataset.

    Attributes:
        table: one row per code of the dataset, the most frequent first: code, text, matched_code and matched_text (null = none),
            cosine, gate, origin (`same code`, `text`, `shuffled text` or `pair`), n_events and share of the events it was fitted
            on, q10, q50 and q90 of its numbers, matched_q10, matched_q50 and matched_q90, and warning.
        twins: code of the run without a match -> matched code of the run that says the same; it takes the same events.
    """

    table: pl.DataFrame
    twins: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def matches(self) -> dict[str, tuple[str, float]]:
        """Code of the dataset -> code of the run and gate in (0, 1], of those that count."""
        rows = self.table.filter(pl.col("gate") > 0).select("code", "matched_code", "gate")
        return {code: (matched, float(g)) for code, matched, g in rows.iter_rows()}

    @property
    def facts(self) -> dict[str, float]:
        """Numbers of codes and of those with a match, and the share of the events, as they are and weighted by gate."""
        found = self.table.filter(pl.col("gate") > 0)
        return {
            "n_codes": len(self.table),
            "n_matched": len(found),
            "n_merged": len(found.filter(pl.col("origin") != "own")),
            "n_warned": len(found.filter(pl.col("warning") != "")),
            "event_share": float(found["share"].sum()),
            "gated_share": float((found["share"] * found["gate"]).sum()),
        }

    def through(self, pooled: Mapping[str, tuple[str, float]]) -> Alignment:
        """Return the alignment with the codes that a pooled run reads its own codes as, in place of the run's own codes.

        Args:
            pooled: code of the run -> code as which the run reads it, and gate.
        """
        lead = {code: [to, gate] for code, (to, gate) in pooled.items()}
        rows = self.table.select("matched_code", "gate").iter_rows()
        found = [(lead.get(str(code), [None, 0.0]), gate) for code, gate in rows]
        to = pl.Series([match[0] for match, _ in found], dtype=pl.String)
        gates = pl.Series([match[1] * gate for match, gate in found], dtype=pl.Float64)
        table = self.table.with_columns(matched_code=to, gate=gates)
        taken = set(table.filter(pl.col("gate") > 0)["matched_code"])
        twins = {str(lead.get(twin, [twin])[0]): str(lead.get(code, [code])[0]) for twin, code in self.twins.items()}
        return Alignment(table, {twin: code for twin, code in twins.items() if twin not in taken and code in taken})

    @property
    def digest(self) -> str:
        """Digest of what a model is told."""
        found: dict[str, Any] = {code: [matched, round(g, 6)] for code, (matched, g) in self.matches.items()}
        return digest({"matches": found, "twins": dict(self.twins)} if self.twins else found)

    def keeps(self, vocabulary: Vocabulary) -> npt.NDArray[np.bool_]:
        """Return whether the code of each token of the dataset's vocabulary has a match, (V,)."""
        return np.array([code in self.matches for code in vocabulary.token_codes])

    def rows(self, run: Vocabulary, vocabulary: Vocabulary) -> tuple[npt.NDArray[np.int64], Floats]:
        """Return for each token of the dataset's vocabulary the run's token that stands for it, (V,), and its gate, (V,).

        A value bin goes to the bin at the same place among those of the run's code. Tokens without a match have the unknown event
        and a gate of 0.
        """
        bins = {code: (plain, first, len(edges) + 1) for code, plain, first, edges in
                run.codes.select("code", "plain_token", "bin_token", "edges").iter_rows()}  # fmt: skip
        plain_of = {code: token for token, code in reversed(list(enumerate(run.token_codes))) if code is not None}
        n_bins = {code: len(edges) + 1 for code, edges in vocabulary.codes.select("code", "edges").iter_rows()}
        rows, gates = np.full(len(vocabulary), UNKNOWN, np.int64), np.zeros(len(vocabulary))
        rows[:FIRST_TOKEN], gates[:FIRST_TOKEN] = np.arange(FIRST_TOKEN), 1.0
        for token, (code, number) in enumerate(
            zip(vocabulary.token_codes, vocabulary.token_bins.tolist(), strict=True)
        ):
            if code not in self.matches:
                continue
            matched, gates[token] = self.matches[code]
            plain, first, n = bins.get(matched, (plain_of[matched], -1, 1))
            if number == number and first >= 0:
                rows[token] = first + int((number - 0.5) / n_bins[code] * n)
            else:
                rows[token] = plain
        return rows, gates

    def write(self, path: Path) -> None:
        """Write the table as CSV; if there are twins, with a column `twins` that lists those of each matched code."""
        table = self.table.with_columns(pl.col(pl.Float64).round(4))
        if self.twins:
            of_code: dict[str, list[str]] = {}
            for twin, code in self.twins.items():
                of_code.setdefault(code, []).append(twin)
            rows = table.select("matched_code", "gate").iter_rows()
            found = [of_code.get(str(code)) if g > 0 else None for code, g in rows]
            said = [None if twins is None else json.dumps(twins, ensure_ascii=False) for twins in found]
            table = table.with_columns(pl.Series(TWINS, said, dtype=pl.String))
        with atomic_path(path) as temporary:
            table.write_csv(temporary)

    def say(self) -> None:
        """Log how much of the dataset is covered, the matches with most events, and numbers that disagree."""
        found = self.table.filter(pl.col("gate") > 0)
        log.info(
            "aligned by text: %d of %d codes have a match among %d of the run's, %.1f%% of the events (%.1f%% weighted by gate)",
            len(found), len(self.table), found["matched_code"].n_unique(), 100 * found["share"].sum(),
            100 * (found["share"] * found["gate"]).sum(),
        )  # fmt: skip
        if self.twins:
            log.info(
                "%d more of the run's codes say the same as one of these and take the same events, such as: %s. alignment.csv "
                "lists all of them in its column twins, where you can remove some and give it back as data.alignment_pairs; "
                "data.alignment_twins=false leaves all out",
                len(self.twins), ", ".join(f"{twin} as {code}" for twin, code in list(self.twins.items())[:5]),
            )  # fmt: skip
        for row in found.head(SHOWN).iter_rows(named=True):
            log.info(
                "  %s -> %s  (cosine %.2f, gate %.2f, %.1f%% of events)%s",
                row["text"], row["matched_text"], row["cosine"], row["gate"], 100 * row["share"],
                f"  {row['warning']}" if row["warning"] else "",
            )  # fmt: skip
        say_other_kinds(self.table)
        doubtful = found.filter(pl.col("warning") != "")
        if len(doubtful):
            log.warning(
                "%d matches have numbers that disagree, such as %s -> %s (%s). Numbers are ranked among the new data's own, so "
                "another unit does no harm, but another quantity does: correct alignment.csv, and type: "
                "data.alignment_pairs=FILE.csv",
                len(doubtful), doubtful["text"][0], doubtful["matched_text"][0], doubtful["warning"][0],
            )  # fmt: skip


def say_other_kinds(table: pl.DataFrame) -> None:
    """Warn of codes without a match whose text the other side has, where only one of the two sides has numbers."""
    is_lost = (pl.col("gate") == 0) & (pl.col("origin") != PAIR)
    lost = table.filter(is_lost & pl.col("warning").is_in([NUMBERS_HERE, NUMBERS_THERE]))
    if len(lost):
        log.warning(
            "%d codes, with %.1f%% of the events, have the text of a code whose events are of another kind, such as %s (%s), so "
            "their numbers cannot agree and the codes have no match. If these are the same, write numbers as numeric_value on both "
            "sides, or name the pairs: data.alignment_pairs=FILE.csv",
            len(lost), 100 * float(lost["share"].sum()), lost["text"][0], lost["warning"][0],
        )  # fmt: skip


def align(
    run: Vocabulary,
    vocabulary: Vocabulary,
    *,
    embed: Callable[[list[str]], npt.NDArray[np.float32]],
    rules: Rules,
    pairs: pl.DataFrame | None = None,
    texts: str = "own",
    seed: int = 0,
    matching: str = "nearest",
    has_twins: bool = True,
) -> Alignment:
    """Return which code of a run stands for each code of a dataset.

    A code that both have is its own match. Any other goes to the run's code with the nearest cleaned text, of those that carry
    numbers if it does, else of those that carry none. `pairs` overrides both.

    Args:
        run: vocabulary of the run.
        vocabulary: vocabulary that was fitted on the dataset.
        embed: returns the vectors (n, E) of n texts.
        rules: how texts are cleaned and compared.
        pairs: columns code, matched_code (null = none), and perhaps gate and twins, as `read_pairs` returns them.
        texts: `own`, or `shuffled` for the control in which each code has the text of another of its kind.
        seed: of the shuffling.
        matching: `nearest`, by which several codes may go to one, or `one_to_one`, which leaves no twins.
        has_twins: whether codes of the run without a match take the events of one that says the same.

    Raises:
        UserError: `pairs` names an unknown code, or nothing matches.
    """
    source, target = codes_of(run), codes_of(vocabulary)
    table = align_codes(
        source,
        target,
        embed=embed,
        rules=rules,
        pairs=pairs,
        texts=texts,
        seed=seed,
        matching=matching,
    )
    if not (table["gate"] > 0).any():
        raise UserError(
            f"no code of this dataset matches one of the run's by text (nearest: {_nearest_said(table)}): the model would see no "
            "event. Either side may lack texts: give descriptions in metadata/codes.parquet or data.lookups=[FILE.csv], name the "
            "pairs yourself: data.alignment_pairs=FILE.csv with columns code,matched_code, or type: data.aligned_to=none"
        )
    if not has_twins or matching != "nearest":
        return Alignment(table)
    without_pairs = table
    if (table["origin"] == PAIR).any():
        without_pairs = align_codes(source, target, embed=embed, rules=rules, texts=texts, seed=seed)
    return Alignment(table, _twins(source, table, embed, rules, pairs, without_pairs))


def _twins(
    run: pl.DataFrame,
    table: pl.DataFrame,
    embed: Callable[[list[str]], npt.NDArray[np.float32]],
    rules: Rules,
    pairs: pl.DataFrame | None,
    without_pairs: pl.DataFrame,
) -> dict[str, str]:
    """Return the run's codes that no code of the dataset goes to, each with the matched code whose text means the same, by a
    gate of 1.

    A hospital with thousands of codes has several for one thing, such as a laboratory value and the worst one of the first day. A
    model learned from all of them, and would miss all but one where the other hospital has one code for it. Where the other
    hospital has the matched code itself, it could have the twin too, and its records lack it. A code that only `pairs` left without
    a match is no twin, and where `pairs` lists twins, its list holds.

    Raises:
        UserError: `pairs` lists a twin that is no code of the run.
    """
    matched = _matched(table)
    of_pairs = twins_of_pairs(pairs, run["code"].to_list())
    no_twin = matched | _matched(without_pairs)
    is_matched = pl.Series([code in matched for code in run["code"]], dtype=pl.Boolean)
    may_be = pl.Series([code not in no_twin for code in run["code"]], dtype=pl.Boolean)
    found = align_codes(run.filter(is_matched), run.filter(may_be), embed=embed, rules=rules)
    told = set(of_pairs) | set(table.filter(pl.col("origin") == SAME_CODE)["matched_code"])
    sure = found.filter(pl.col("gate") >= 1.0).select("code", "matched_code").iter_rows()
    twins = {twin: code for twin, code in sure if code not in told}
    for code, listed in of_pairs.items():
        if code in matched:
            twins |= {twin: code for twin in listed if twin not in matched}
    return twins


def _matched(table: pl.DataFrame) -> set[str]:
    """Return the run's codes that a code of the dataset goes to."""
    return set(table.filter(pl.col("gate") > 0)["matched_code"])


def align_codes(
    source: pl.DataFrame,
    target: pl.DataFrame,
    *,
    embed: Callable[[list[str]], npt.NDArray[np.float32]],
    rules: Rules,
    pairs: pl.DataFrame | None = None,
    texts: str = "own",
    seed: int = 0,
    matching: str = "nearest",
) -> pl.DataFrame:
    """Return the match table of the codes `target` with the codes `source`, both as of `codes_of`; the others as in `align`.

    Raises:
        UserError: `pairs` names an unknown code.
    """
    check_setting("data.alignment_texts", texts, Texts)
    check_setting("data.alignment_matching", matching, Matching)
    text_S, text_T = source["text"].to_list(), target["text"].to_list()
    is_number_S, is_number_T = source["is_number"].to_numpy(), target["is_number"].to_numpy()
    if texts == "shuffled":
        for kind in (True, False):
            places = np.flatnonzero(is_number_T == kind).tolist()
            for place, text in zip(places, deranged([text_T[i] for i in places], seed), strict=True):
                text_T[place] = text
    of_S, of_T = _vectors([text_S, text_T], embed, rules)
    number_of = {code: i for i, code in enumerate(source["code"])}
    if matching == "one_to_one":
        own_codes = [(place, number_of.get(code)) for place, code in enumerate(target["code"]) if texts == "own"]
        same = [(place, own) for place, own in own_codes if own is not None]
        found = one_to_one(of_S, of_T, is_number_S, is_number_T, same)
        rules = replace(rules, cosines=ONE_TO_ONE_COSINES)
    else:
        found = nearest(of_S, of_T, is_number_S, is_number_T)
    matched, cosine = found.source.copy(), found.cosine.copy()
    weight, origin = gate(cosine, rules), np.full(len(target), "text" if texts == "own" else "shuffled text", object)
    for place, code in enumerate(target["code"]):
        own = number_of.get(code)
        if texts == "own" and own is not None and is_number_S[own] == is_number_T[place]:
            matched[place], cosine[place], weight[place], origin[place] = own, 1.0, 1.0, SAME_CODE
    if pairs is not None:
        _override(pairs, number_of, target["code"].to_list(), matched, weight, origin)
    weight[matched < 0] = 0.0
    table = _table(source, target, matched, cosine, weight, origin)
    other_kind = of_other_kind(text_S, text_T, is_number_S, is_number_T, rules)
    is_left = (table["gate"] == 0) & (table["origin"] != PAIR)  # own pairs need no warning of what they leave out
    said = pl.Series([said if left else "" for said, left in zip(other_kind, is_left, strict=True)], dtype=pl.String)
    return table.with_columns(warning=pl.when(said != "").then(said).otherwise("warning"))


def share_of_new(run: Vocabulary, vocabulary: Vocabulary) -> float:
    """Return the share of the events in the dataset that `vocabulary` was fitted on whose code the run's train never had."""
    known = {code for code, n in zip(run.token_codes, run.tokens["count"], strict=True) if code is not None and n}
    counts = vocabulary.tokens["count"].to_numpy()
    is_new = np.array([code is not None and code not in known for code in vocabulary.token_codes])
    return float(counts[is_new].sum() / max(counts.sum(), 1))


def codes_of(vocabulary: Vocabulary) -> pl.DataFrame:
    """Return one row per code that has a token, the most frequent first: code, text, is_number, n_events, q10, q50 and q90."""
    tokens = pl.DataFrame({
        "code": pl.Series(vocabulary.token_codes, dtype=pl.String),
        "text": [vocabulary.texts[token] for token in vocabulary.plain_tokens],
        "n_events": vocabulary.tokens["count"],
    }).drop_nulls("code")  # fmt: skip
    tokens = tokens.group_by("code", maintain_order=True).agg(pl.col("text").first(), pl.col("n_events").sum())
    known = vocabulary.codes.unique("code", maintain_order=True)
    is_number = (pl.col("edges").list.len() > 0) | (pl.col("loc") != 0) | (pl.col("scale") != 1)
    known = known.with_columns(
        *(pl.col("loc").add(z * pl.col("scale")).alias(name) for z, name in zip(OF_NORMAL, QUANTILES, strict=True)),
        is_number=is_number & pl.col("loc").is_not_nan(),
    )
    if "quantiles" in known.columns:
        kept = (pl.col("quantiles").list.get(i, null_on_oob=True).cast(pl.Float64) for i in range(len(QUANTILES)))
        known = known.with_columns(pl.coalesce(q, name).alias(name) for q, name in zip(kept, QUANTILES, strict=True))
    found = tokens.join(known.select("code", "is_number", *QUANTILES), on="code", how="left", maintain_order="left")
    found = found.with_columns(pl.col("is_number").fill_null(False))
    found = found.with_columns(pl.when("is_number").then(pl.col(name)).alias(name) for name in QUANTILES)
    return found.sort("n_events", descending=True, maintain_order=True)


def _vectors(
    lists: Sequence[list[str]], embed: Callable[[list[str]], npt.NDArray[np.float32]], rules: Rules
) -> list[list[Floats]]:
    """Return the unit vectors of the phrasings of each text, one array (n, E) per text."""
    phrased = [[phrasings(text, rules) for text in texts] for texts in lists]
    distinct = list(dict.fromkeys(phrase for texts in phrased for found in texts for phrase in found))
    vectors = embed(distinct).astype(np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    row_of = {phrase: row for row, phrase in enumerate(distinct)}
    return [[vectors[[row_of[phrase] for phrase in found]] for found in texts] for texts in phrased]


def _override(
    pairs: pl.DataFrame,
    number_of: dict[str, int],
    codes: list[str],
    matched: npt.NDArray[np.int64],
    weight: Floats,
    origin: npt.NDArray,
) -> None:
    """Put the pairs in place of what texts say.

    Raises:
        UserError: a code is none of the dataset's, or a matched code none of the run's.
    """
    place_of = {code: place for place, code in enumerate(codes)}
    for code, to, given in pairs.select("code", "matched_code", "gate").iter_rows():
        for name, known, where in ((code, place_of, "this dataset"), (to, number_of, "the run")):
            if name is not None and name not in known:
                raise unknown_pair(name, list(known), where)
        place = place_of[code]
        now = -1 if to is None else number_of[to]
        if (now, given) == (-1, None) or now != matched[place] or given is None or abs(given - weight[place]) > 1e-3:
            origin[place] = PAIR
        matched[place], weight[place] = now, (1.0 if given is None else given) if now >= 0 else 0.0


def _table(
    source: pl.DataFrame,
    target: pl.DataFrame,
    matched: npt.NDArray[np.int64],
    cosine: Floats,
    weight: Floats,
    origin: npt.NDArray,
) -> pl.DataFrame:
    names = list(QUANTILES)
    place = pl.Series([int(i) if i >= 0 else None for i in matched], dtype=pl.Int64)
    of_source = source.select(pl.all().gather(place.fill_null(0)))
    has_match = place.is_not_null()

    def theirs(name: str) -> pl.Series:
        return pl.select(pl.when(has_match).then(of_source[name]).alias(f"matched_{name}")).to_series()

    total = max(int(target["n_events"].sum()), 1)
    table = pl.DataFrame({
        "code": target["code"], "text": target["text"], "matched_code": theirs("code"), "matched_text": theirs("text"),
        "cosine": cosine, "gate": weight, "origin": pl.Series(origin.tolist(), dtype=pl.String), "n_events": target["n_events"],
        "share": target["n_events"] / total, **{name: target[name] for name in names},
        **{f"matched_{name}": theirs(name) for name in names},
    })  # fmt: skip
    quantiles = table.select(*names, *(f"matched_{name}" for name in names)).iter_rows()
    said = [
        disagreement(row[: len(names)], row[len(names) :]) if matches else ""
        for row, matches in zip(quantiles, has_match, strict=True)
    ]
    return table.with_columns(warning=pl.Series(said, dtype=pl.String))


def _nearest_said(table: pl.DataFrame) -> str:
    best = table.sort("cosine", descending=True).head(1)
    if not len(best) or best["matched_text"][0] is None:
        return "none of the same kind"
    return f"{best['text'][0]!r} and {best['matched_text'][0]!r}, cosine {best['cosine'][0]:.2f}"
