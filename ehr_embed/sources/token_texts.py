"""Turn the token strings of the original pipeline into texts, by a table of prefixes.

A rule of the table, in YAML:

    "LAB//":                # the prefix; if several prefixes match a token, the longest one applies
      text: "{}"            # the text; {} stands for the term, or for the code in words
      lookup: lab           # name of the lookup file with the code's term; left out = no lookup
      rest: "(.*)"          # regular expression that the rest of the token must match; its group is the code
      code_is_text: false   # whether the code itself is a sufficient text if no term is known
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.plain_yaml import read_yaml
from ehr_embed.sources.code_texts import readable_code

LOOKUPS = ("medical", "lab", "region", "time")
TERM_COLUMNS = (("code", "term"), ("regionid", "Description"))
"""Columns of a lookup file: the usual ones, and those of the original pipeline's table of regions."""


@dataclass(frozen=True)
class PrefixRule:
    """Rule that turns the tokens with one prefix into texts; its attributes are the keys of the YAML above."""

    text: str
    lookup: str | None = None
    rest: str = "(.*)"
    code_is_text: bool = False


def read_rules(prefixes: Mapping[str, Any], prefix_file: str | None) -> dict[str, PrefixRule]:
    """Return the rules by prefix, the longest prefix first.

    Args:
        prefixes: the rules of the configuration; null in place of a rule removes the prefix.
        prefix_file: a YAML file with the user's rules, which replace rules of the same prefix; None = no file.

    Raises:
        UserError: the file is missing or no table, or a rule has an unknown key or lookup or an invalid expression.
    """
    table = dict(prefixes)
    if prefix_file is not None:
        if not Path(prefix_file).is_file():
            raise UserError(f"data.prefix_file: no such file {prefix_file}. Expected YAML of prefixes and their rules.")
        try:
            more = read_yaml(Path(prefix_file))
        except (YAMLError, OSError) as error:
            raise UserError(f"{prefix_file}: not readable as YAML ({error}).") from error
        if not isinstance(more, dict):
            raise UserError(f'{prefix_file}: expected prefixes and their rules, such as "LAB//": {{text: "{{}}"}}.')
        table |= {str(key): rule for key, rule in more.items()}
    rules = {str(prefix): _rule(str(prefix), rule) for prefix, rule in table.items() if rule is not None}
    return dict(sorted(rules.items(), key=lambda item: -len(item[0])))


def _rule(prefix: str, rule: Any) -> PrefixRule:
    try:
        found = TypeAdapter(PrefixRule).validate_python(rule)
        unknown = set(rule) - set(PrefixRule.__dataclass_fields__)
        if re.compile(found.rest).groups > 1:
            raise UserError(
                f"prefix {prefix!r}: rest={found.rest} has several groups, expected one, the code; write others as (?:...)."
            )
    except (ValidationError, re.error) as error:
        raise UserError(
            f"prefix {prefix!r}: {rule} is no rule ({error}). Expected text, lookup, rest, code_is_text."
        ) from error
    if unknown:
        raise unknown_name(f"key of prefix {prefix!r}", sorted(unknown)[0], PrefixRule.__dataclass_fields__)
    if found.lookup is not None and found.lookup not in LOOKUPS:
        raise unknown_name(f"lookup of prefix {prefix!r}", found.lookup, LOOKUPS)
    return found


def token_text(token: str, rules: Mapping[str, PrefixRule], lookups: Mapping[str, Mapping[str, str]]) -> str | None:
    """Return the text of a token; None if no rule applies, or if its code has no term and is no sufficient text.

    Args:
        token: the token's string.
        rules: as `read_rules` returns them, the longest prefix first.
        lookups: lookup name -> upper-case code -> term.

    >>> rules = read_rules({"LAB//": {"text": "{}", "lookup": "lab"}, "AGE": {"text": "Age {}", "rest": r"\\W*(.*)"},
    ...     "LAB//X": {"text": "Unit {}", "code_is_text": True}, "Q": {"text": "Quantile {}", "rest": r"(\\d+)"}}, None)
    >>> lookups = {"lab": {"NA": "Sodium"}}
    >>> [token_text(token, rules, lookups) for token in ("LAB//na", "LAB//na//mmol", "LAB//K", "AGE: 45", "Q7", "QT")]
    ['Sodium', 'Sodium, mmol', None, 'Age 45', 'Quantile 7', None]
    """
    for prefix, rule in rules.items():
        found = re.fullmatch(rule.rest, token[len(prefix) :], re.DOTALL) if token.startswith(prefix) else None
        if found is None:
            continue
        code = found.group(1) if found.groups() and found.group(1) is not None else found.group(0)
        if rule.lookup is None:
            return rule.text.replace("{}", readable_code(code) if code else "").strip()
        # A unit or another part may follow the code; the lookup file lists the code alone.
        first, *others = code.split("//")
        term = lookups.get(rule.lookup, {}).get(first.upper())
        if term is None and not rule.code_is_text:
            return None
        words = ", ".join([term or readable_code(first), *(readable_code(part) for part in others if part)])
        return rule.text.replace("{}", words).strip()
    return None


def read_lookup(name: str, path: str | None) -> dict[str, str]:
    """Return upper-case code -> term from a CSV with columns code,term (or regionid,Description); empty without a path.

    Raises:
        UserError: the file is missing or has other columns.
    """
    if path is None:
        return {}
    if not Path(path).is_file():
        raise UserError(f"data.{name}_lookup_filepath: no such file {path}. Expected a CSV with columns code,term.")
    frame = pl.read_csv(path, glob=False, infer_schema=False, encoding="utf8-lossy")
    for code, term in TERM_COLUMNS:
        if {code, term} <= set(frame.columns):
            return dict(
                frame.select(pl.col(code).str.strip_chars().str.to_uppercase(), pl.col(term).str.strip_chars())
                .drop_nulls()
                .filter(pl.col(term) != "")
                .iter_rows()
            )
    raise UserError(
        f"{path}: expected columns code,term, found {', '.join(frame.columns)}. Codes would have no text; mend the header."
    )


def read_token_strings(path: str | None) -> dict[int, str]:
    """Return token id -> string from a vocab.csv with columns token,str.

    Raises:
        UserError: the file is missing or has other columns, or an id is no number or occurs twice.
    """
    if path is None or not Path(path).is_file():
        raise UserError(
            f"data.vocab_filepath: no such file {path}. Expected the corpus' vocab.csv with columns token,str: "
            "without it token ids have no meaning."
        )
    frame = pl.read_csv(path, glob=False, infer_schema=False, encoding="utf8-lossy")
    if not {"token", "str"} <= set(frame.columns):
        raise UserError(f"{path}: expected columns token,str, found {', '.join(frame.columns)}.")
    ids = frame["token"].cast(pl.Int64, strict=False)
    for bad, why in ((ids.is_null(), "is no integer"), (ids.is_duplicated(), "stands twice")):
        if bad.any():
            row = int(bad.arg_true()[0])
            raise UserError(f"{path}, row {row}: token {frame['token'][row]!r} {why}; every token needs one id.")
    return dict(zip(ids.to_list(), frame["str"].fill_null("").to_list(), strict=True))
