"""Say a text in other words, by a table of terms and their synonyms; `synonyms.csv` holds the one that comes with the package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ehr_embed.core.csv_tables import read_csv_table
from ehr_embed.core.errors import UserError

SHIPPED = Path(__file__).with_name("synonyms.csv")
COLUMNS = ("term", "synonym")


@dataclass(frozen=True)
class Synonyms:
    """Synonyms of terms, in both directions.

    Attributes:
        of: term -> its synonyms, in the order of the table, all in lower case and without punctuation that says nothing.
    """

    of: dict[str, tuple[str, ...]]

    @classmethod
    def read(cls, path: Path = SHIPPED) -> Synonyms:
        """Read a CSV file with the columns term and synonym, one row per pair; a term may have several.

        Raises:
            UserError: the file is missing, is no such CSV, or a row lacks one of the two.
        """
        if not path.is_file():
            raise UserError(
                f"synonyms {path}: no such file. Expected a CSV file with columns {','.join(COLUMNS)}, such as {SHIPPED}; "
                "synonyms: null in the file of rules uses none."
            )
        frame = read_csv_table(path, COLUMNS)
        pairs = [(tidy(term or ""), tidy(synonym or "")) for term, synonym in frame.select(COLUMNS).iter_rows()]
        for number, pair in enumerate(pairs):
            if not all(pair):
                raise UserError(f"{path}: row {number + 2} lacks a term or a synonym. Complete or remove the row.")
        return cls.of_pairs(pairs)

    @classmethod
    def of_pairs(cls, pairs: list[tuple[str, str]]) -> Synonyms:
        """Return the synonyms of pairs of tidy texts, each of which stands for the other."""
        found: dict[str, dict[str, None]] = {}
        for one, other in pairs:
            found.setdefault(one, {})[other] = None
            found.setdefault(other, {})[one] = None
        return cls({term: tuple(others) for term, others in found.items()})

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest = sorted(self.of, key=len, reverse=True)
        return re.compile(rf"(?<![\w-])(?:{'|'.join(re.escape(term) for term in longest)})(?![\w-])")

    def restated(self, text: str) -> list[str]:
        """Return a tidy text in other words: with every term that the table has, the longest first, in its first synonym, in its
        second, and so on; a term with fewer keeps its last one.

        >>> table = Synonyms.of_pairs([("fracture of", "broken"), ("hip", "upper thigh"), ("hip", "coxa")])
        >>> table.restated("closed fracture of hip")
        ['closed broken upper thigh', 'closed broken coxa']
        >>> table.restated("broken hip")[0], table.restated("asthma")
        ('fracture of upper thigh', [])
        """
        if not self.of:
            return []
        most = max((len(self.of[term]) for term in self._pattern.findall(text)), default=0)
        return [self._pattern.sub(lambda found, n=n: _at(self.of[found[0]], n), text) for n in range(most)]  # type: ignore[misc]


def _at(synonyms: tuple[str, ...], number: int) -> str:
    return synonyms[min(number, len(synonyms) - 1)]


def tidy(text: str) -> str:
    """Return a text in lower case, without punctuation that says nothing.

    >>> tidy("Thyroxine (T4), free ")
    'thyroxine t4 free'
    """
    return re.sub(r"[^\w+%./'-]+", " ", text.lower()).strip()
