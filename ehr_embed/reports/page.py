"""Make self-contained HTML pages: templates that escape every value, Markdown that can do nothing, and pictures inside the page.

The texts on such a page come from data and configurations of strangers. Jinja escapes every value, the Markdown of a model card
is rendered without links, pictures and HTML, and a content security policy forbids the page every request to anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from markdown_it import MarkdownIt

TEMPLATES = Path(__file__).parent / "templates"
PNG = b"\x89PNG\r\n\x1a\n"
MOST_PICTURE_BYTES = 2**22
"""A larger picture is no plot of this package and would make the page heavy; the page names it instead."""


@lru_cache(1)
def environment() -> Environment:
    """Return the templates: every value is escaped, and a name that is missing is an error."""
    # Imported here, since only the end of a run needs it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["shown"] = shown
    return found


def render(template: str, **values: Any) -> str:
    """Return a page made by a template of `templates/`; a policy with the digests of its scripts and nothing else goes with it."""
    script = (TEMPLATES / "sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    # Both files are this package's own, the only texts on the page that are not escaped.
    from markupsafe import Markup

    return environment().get_template(template).render(
        script=Markup(script), style=Markup(style), policy=policy, **values
    )  # fmt: skip


def shown(value: Any) -> str:
    """Return a number with four digits, and any other value as text.

    >>> shown(0.12345), shown(12345), shown(None), shown("x"), shown(True), shown(float("nan"))
    ('0.1235', '12,345', '', 'x', 'true', '')
    """
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def picture(path: Path) -> str | None:
    """Return a PNG file as a `data:` address; None where it is absent, no PNG, or larger than any plot of this package."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size > MOST_PICTURE_BYTES:
        return None
    content = path.read_bytes()
    return f"data:image/png;base64,{base64.b64encode(content).decode()}" if content.startswith(PNG) else None


@lru_cache(1)
def _markdown() -> MarkdownIt:
    from markdown_it import MarkdownIt

    # "zero" knows paragraphs alone: links, pictures, HTML and addresses stay the text that they are.
    return MarkdownIt("zero").enable(["table", "list", "heading", "backticks", "emphasis", "escape"])


def sections(card: str) -> dict[str, str]:
    """Return the sections of a Markdown text by their headings of the second level.

    >>> sections("# A\\n\\n## B\\n\\ntext\\n\\n## C\\n\\nmore\\n")
    {'B': 'text', 'C': 'more'}
    """
    found = (part.partition("\n") for part in f"\n{card}".split("\n## ")[1:])
    return {heading.strip(): text.strip() for heading, _, text in found}


def from_markdown(text: str) -> Any:
    """Return Markdown as HTML that a template leaves as it is: tables, lists, code and emphasis, and nothing that loads or links.

    >>> str(from_markdown("**a** <img src=x> ![b](http://c)"))
    '<p><strong>a</strong> &lt;img src=x&gt; ![b](http://c)</p>\\n'
    """
    from markupsafe import Markup

    return Markup(_markdown().render(text))


def table_in(text: str) -> tuple[list[str], list[list[str]], str]:
    """Return the first table of a Markdown text as plain texts, and what follows it.

    Returns:
        The heading, the rows, and the text behind the table; all are empty where the text holds no table.

    >>> table_in("| a | b |\\n|---|---|\\n| 1 | x\\\\|y |\\n\\nmore")
    (['a', 'b'], [['1', 'x|y']], 'more')
    >>> table_in("| a |\\n|---|\\n| \\\\*b\\\\* `c` |")[1]
    [['*b* c']]
    """
    cells: list[list[str]] = []
    tokens, last = _markdown().parse(text), 0
    for token, following in itertools.pairwise(tokens):
        if token.type == "tr_open":
            cells.append([])
            last = token.map[1] if token.map else last
        elif token.type in ("th_open", "td_open"):
            cells[-1].append("".join(child.content for child in following.children or ()))
        elif token.type == "table_close":
            break
    if not cells:
        return [], [], ""
    return cells[0], cells[1:], "\n".join(text.splitlines()[last:]).strip()
