"""Align the codes of one dataset with those that a model knows, by their texts: pure functions from texts and vectors to matches.

A code of the target goes to the nearest code of the source, and a gate says how far the two texts mean the same. Suffixes of array
names give their axes: S codes of the source, T codes of the target.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import scipy  # which loads a part when it is first used
import yaml

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.settings import OneOf
from ehr_embed.embedders.synonyms import Synonyms, tidy

SHIPPED_RULES = Path(__file__).with_name("alignment.yaml")
SHIPPED_SYNONYMS = "shipped"
"""Value of the key `synonyms` of a file of rules that names the table of the package."""
Floats = npt.NDArray[np.float64]
Matching = Annotated[str, OneOf("nearest", "one_to_one")]
"""Several codes may go to the nearest code, or each is gone to at most once."""
OTHER_KIND, SURE = -2.0, 3.0
"""Values below and above every cosine: of codes of another kind, and of a pair that is no matter of text."""
ONE_TO_ONE_COSINES = (0.1, 0.3)
"""Cosines of the gate where each code is matched once: that it is left over for this one says most of what a cosine would."""


@dataclass(frozen=True)
class Rules:
    """Rules by which texts are cleaned before they are compared, and the cosine from which on two texts mean the same.

    Attributes:
        cosines: below the first a match counts nothing, from the second on all.
        removed: regular expressions that are removed from texts in lower case, in this order.
        levels: regular expression of the separators of a text's levels.
        words: words that stand for others, in lower case.
        synonyms: terms in whose other words texts are compared too.
    """

    cosines: tuple[float, float]
    removed: tuple[re.Pattern[str], ...]
    levels: re.Pattern[str]
    words: Mapping[str, str]
    synonyms: Synonyms

    @classmethod
    def read(cls, path: Path = SHIPPED_RULES) -> Rules:
        """Read the rules of a YAML file with the keys of conf's `data.alignment_rules`.

        Raises:
            UserError: the file is missing or is no such YAML, a regular expression in it is none, or its table of synonyms cannot
                be read.
        """
        if not path.is_file():
            raise UserError(
                f"data.alignment_rules={path}: no such file. Expected YAML with cosines, removed, levels and words, as "
                f"{SHIPPED_RULES} has them; data.alignment_rules=null takes these."
            )
        try:
            found: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())[:200]}.") from error
        keys = tuple(cls.__dataclass_fields__)
        if isinstance(found, dict):
            found.setdefault("synonyms", None)  # rules of earlier versions name none
        if not isinstance(found, dict) or sorted(found) != sorted(keys):
            for key in found if isinstance(found, dict) else ():
                if key not in keys:
                    raise unknown_name(f"key of {path}", str(key), keys)
            raise UserError(f"{path}: expected a mapping with {', '.join(keys)}. Copy {SHIPPED_RULES} and change it.")
        try:
            low, high = map(float, found["cosines"])
            removed = tuple(re.compile(pattern) for pattern in found["removed"])
            levels, words = re.compile(found["levels"]), {str(k).lower(): str(v) for k, v in found["words"].items()}
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise UserError(
                f"{path}: {error}. Expected two cosines, regular expressions and a mapping of words, as in {SHIPPED_RULES}."
            ) from error
        if not 0 <= low < high <= 1:
            raise UserError(f"{path}: cosines are {low} and {high}; expected 0 <= first < second <= 1.")
        table = found["synonyms"]
        if table is None:
            synonyms = Synonyms({})
        else:  # a file's name is relative to that of the rules
            own = path.parent / Path(str(table)).expanduser()
            synonyms = Synonyms.read() if table == SHIPPED_SYNONYMS else Synonyms.read(own)
        return cls((low, high), removed, levels, words, synonyms)


def clean(text: str, rules: Rules) -> str:
    """Return a text without the name of its table, units and the like, in lower case, with abbreviations spelt out.

    >>> rules = Rules.read()
    >>> clean("Albumin in serum (g/dL)", rules), clean("Albumin [g/dL], hourly", rules)
    ('albumin', 'albumin')
    >>> clean("Physical exam: GCS", rules), clean("BP (systolic)", rules)
    ('glasgow coma score', 'blood pressure systolic')
    """
    found = text.lower()
    for pattern in rules.removed:
        found = pattern.sub(" ", found)
    found = _words(tidy(found), rules.words)
    return found or text.lower().strip()


def _words(text: str, words: Mapping[str, str]) -> str:
    """Return the text with each word of `words` replaced, the longest first, and every place at most once.

    >>> _words("hr by o2 sat", {"hr": "heart rate", "o2": "oxygen", "o2 sat": "oxygen saturation"})
    'heart rate by oxygen saturation'
    """
    if not words:
        return text
    longest = sorted(words, key=len, reverse=True)
    pattern = rf"(?<![\w-])(?:{'|'.join(re.escape(word) for word in longest)})(?![\w-])"
    return re.sub(pattern, lambda found: words[found[0]].lower(), text)


def phrasings(text: str, rules: Rules) -> list[str]:
    """Return the distinct cleaned forms in which a text is compared: as a whole, its last two levels, and its last, then all of
    these in the words of synonyms.

    >>> phrasings("Exam: Vital signs > Pressure > BP (systolic)", Rules.read())
    ['vital signs pressure blood pressure systolic', 'pressure blood pressure systolic', 'blood pressure systolic']
    >>> phrasings("Fracture of hip", Rules.read())
    ['fracture of hip', 'broken hip']
    """
    head = text
    levels = [level.strip() for level in rules.levels.split(head) if level.strip()]
    wholes = [head, *(" ".join(levels[-n:]) for n in (2, 1) if len(levels) > n)]
    cleaned = [clean(part, rules) for part in wholes]
    return list(dict.fromkeys([*cleaned, *(other for part in cleaned for other in rules.synonyms.restated(part))]))


def gate(cosine: Floats, rules: Rules) -> Floats:
    """Return how far a match counts, from 0 to 1, of any shape.

    >>> gate(np.array([0.5, 0.7, 0.9]), Rules.read()).round(2).tolist()
    [0.0, 0.5, 1.0]
    """
    low, high = rules.cosines
    return np.clip((cosine - low) / (high - low), 0.0, 1.0)


@dataclass(frozen=True)
class Nearest:
    """The nearest code of the source of each code of the target.

    Attributes:
        source: (T,) int64, its number; -1 = none of the same kind.
        cosine: (T,) float64, the largest cosine of their phrasings.
    """

    source: npt.NDArray[np.int64]
    cosine: Floats


def nearest(
    source: Sequence[Floats],
    target: Sequence[Floats],
    is_number_S: npt.NDArray[np.bool_],
    is_number_T: npt.NDArray[np.bool_],
) -> Nearest:
    """Return the nearest code of the source of each code of the target; codes with numbers go to codes with numbers only.

    Args:
        source, target: for each code the unit vectors (n, E) of its n phrasings.
        is_number_S, is_number_T: (S,), (T,) whether a code's events carry numbers.

    >>> one, other = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> yes, no = np.array([True, True]), np.array([True, False])
    >>> nearest([one, other], [other, one], yes, no).source.tolist()
    [1, -1]
    """
    if not len(source) or not len(target):
        return Nearest(np.full(len(target), -1), np.zeros(len(target)))
    best, cosine = np.full(len(target), -1, np.int64), np.zeros(len(target))
    for number, found_S in enumerate(_cosines(source, target, is_number_S, is_number_T)):
        at = int(found_S.argmax())
        if found_S[at] > OTHER_KIND:
            best[number], cosine[number] = at, found_S[at]
    return Nearest(best, cosine)


def one_to_one(
    source: Sequence[Floats],
    target: Sequence[Floats],
    is_number_S: npt.NDArray[np.bool_],
    is_number_T: npt.NDArray[np.bool_],
    same: Sequence[tuple[int, int]] = (),
) -> Nearest:
    """Return the codes of the source as which those of the target are read, each of them at most once, so that the sum of all
    cosines is the greatest; this suits two coding systems for the same things, where a code that is taken is no other's.

    Args:
        source, target, is_number_S, is_number_T: as in `nearest`.
        same: pairs (target, source) that are sure, such as codes of one name.

    >>> one, other = np.array([[1.0, 0.0]]), np.array([[0.6, 0.8]])
    >>> yes = np.array([True, True])
    >>> nearest([one, other], [np.array([[0.9, 0.1]]), np.array([[0.96, 0.28]])], yes, yes).source.tolist()
    [0, 0]
    >>> one_to_one([one, other], [np.array([[0.9, 0.1]]), np.array([[0.96, 0.28]])], yes, yes).source.tolist()
    [0, 1]
    """
    best, cosine = np.full(len(target), -1, np.int64), np.zeros(len(target))
    if not len(source) or not len(target):
        return Nearest(best, cosine)
    found_TS = np.stack(list(_cosines(source, target, is_number_S, is_number_T)))
    value_TS = found_TS.copy()
    for row, column in same:
        value_TS[row, column] = SURE
    rows, columns = scipy.optimize.linear_sum_assignment(value_TS, maximize=True)
    found = found_TS[rows, columns]
    kept = found > OTHER_KIND
    best[rows[kept]], cosine[rows[kept]] = columns[kept], found[kept]
    return Nearest(best, cosine)


def _cosines(
    source: Sequence[Floats],
    target: Sequence[Floats],
    is_number_S: npt.NDArray[np.bool_],
    is_number_T: npt.NDArray[np.bool_],
) -> Iterator[Floats]:
    """Yield for each code of the target the largest cosine of its phrasings with those of each code of the source, (S,)."""
    code_K = np.repeat(np.arange(len(source)), [len(v) for v in source])
    vectors_KE = np.concatenate(list(source))
    starts_S = np.searchsorted(code_K, np.arange(len(source)))
    for number, vectors in enumerate(target):
        found_S = np.maximum.reduceat((vectors @ vectors_KE.T).max(0), starts_S)
        yield np.where(is_number_S == is_number_T[number], found_S, OTHER_KIND)
