"""Check the names of splits: near-misses of MEDS' names are refused, other splits are left out with a warning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from ehr_embed.core.errors import UserError
from ehr_embed.core.lost_data import say_or_refuse
from ehr_embed.sources.protocol import SPLITS

SYNONYMS = {
    "train": ("train", "training", "trn"),
    "tuning": ("tuning", "tune", "val", "valid", "validation", "validate", "dev", "development"),
    "held_out": ("heldout", "holdout", "test", "testing", "tst"),
}
"""Other names in use for each split, in lower case and without spaces, hyphens, dots and underscores."""


def meant_split(name: str) -> str | None:
    """Return the split of MEDS that a name seems to stand for; None for a name that resembles none of them.

    >>> [meant_split(name) for name in ("Train", "held-out", "Held Out", "val", "test", "tunning", "external", "fold_3")]
    ['train', 'held_out', 'held_out', 'tuning', 'held_out', 'tuning', None, None]
    """
    plain = "".join(letter for letter in name.lower() if letter not in " -_.")
    split_of = {synonym: split for split, synonyms in SYNONYMS.items() for synonym in synonyms}
    if plain in split_of:
        return split_of[plain]
    close = get_close_matches(plain, ("train", "tuning", "heldout"), n=1, cutoff=0.8) if plain.isalpha() else []
    return split_of[close[0]] if close else None


def refuse_near_misses(names: Iterable[str], *, where: str, column: str = "split") -> None:
    """Refuse near-misses of the names of MEDS' splits, since their subjects would be left out.

    Args:
        names: names of splits as the data have them.
        where: the file or source of the names, for the message.
        column: the column of the names.

    Raises:
        UserError: a name is a near-miss; the message gives the names and the probable right ones.
    """
    meant = {name: split for name in sorted(names) if name not in SPLITS and (split := meant_split(name))}
    if meant:
        listed = ", ".join(f"{name!r} (for {split}?)" for name, split in meant.items())
        raise UserError(
            f"{where}: splits named {listed}; expected {', '.join(SPLITS)}, as MEDS 0.4 names them. The subjects of other splits "
            "are left out, which can hardly be meant here. Rename them: polars.read_parquet(FILE).with_columns("
            f'polars.col("{column}").replace({meant})).write_parquet(FILE), or, to leave these subjects out, give their split a '
            "name that is like none of the three, such as unused."
        )


def check_split_names(counts: Mapping[str, int], *, where: str, of: str = "subjects", column: str = "split") -> None:
    """Refuse near-misses of the names of MEDS' splits, and warn of subjects or events in splits with other names.

    Args:
        counts: number of subjects, or of events, of each split.
        where: the file or source of the names, for the message.
        of: what `counts` counts, "subjects" or "events".
        column: the column of the names.

    Raises:
        UserError: a name is a near-miss, or nearly all subjects or events are in splits with other names.
    """
    refuse_near_misses(counts, where=where, column=column)
    others = {name: n for name, n in sorted(counts.items()) if name not in SPLITS}
    listed = ", ".join(f"{name!r}: {n:,}" for name, n in list(others.items())[:10])
    say_or_refuse(
        sum(others.values()),
        sum(counts.values()),
        f"{of} of {where} are in splits other than {', '.join(SPLITS)} ({listed}), and are left out",
        remedy="Give them one of the three names if they belong to the experiment.",
    )
