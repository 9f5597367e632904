"""Write names that come from data and configurations into Markdown, so that every reader of it shows them as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

ACTIVE = re.compile(
    r"[\\`*\[<~$]"  # escapes, code, emphasis, links, HTML, strike-through and formulas
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # emphasis; within a word an underscore is none
    r"|&(?=#?\w+;)"  # entities
    r"|:(?=//)|(?<=www)\."  # addresses, which GitHub links
)


def plain(text: object) -> str:
    r"""Return a text so that Markdown shows it as it is; a line break becomes a space.

    A vertical bar stays as it is, since only a table cares, and `table` escapes it.

    >>> plain("SEX//F"), plain("label_1y"), plain("*a* <b> [c](d)"), plain("http://e"), plain(r"a\b &amp; _c_")
    ('SEX//F', 'label_1y', '\\*a\\* \\<b> \\[c](d)', 'http\\://e', 'a\\\\b \\&amp; \\_c\\_')
    """
    return ACTIVE.sub(r"\\\g<0>", " ".join(str(text).split()))


def code(text: object) -> str:
    """Return a text as code, between more backticks than it holds.

    >>> code("a"), code("a`b"), code("`")
    ('`a`', '``a`b``', '`` ` ``')
    """
    told = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", told)), default=0))
    space = " " if told.startswith("`") or told.endswith("`") else ""
    return f"{fence}{space}{told}{space}{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, with the vertical bars within its cells escaped.

    >>> print(table(["a", "b"], [["1", "x|y"]]))
    | a | b |
    |---|---|
    | 1 | x\\|y |
    """
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(
        "|" + "|".join(line) + "|" if number == 1 else "| " + " | ".join(line) + " |"
        for number, line in enumerate(cells)
    )
