"""Give every file of the repository that a page links to, and every notebook, a page of its own on the mkdocs site.

A link such as `../conf/train.yaml` then works on the site as it does in the repository.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
SHOWN = "repository"
"""Folder of the site that holds the pages of these files."""
LOG = "log.md"
LINK = re.compile(r"\]\(([^)#\s:]+)(#[^)\s]*)?\)")
TABLE = re.compile(r"<table[^>]*>(.*)</table>", flags=re.DOTALL)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".md": "markdown", ".toml": "toml"}


def outside(target: str, page: str) -> str | None:
    """The repository's file that a link of a page means, None where the target lies in docs/ or is no file.

    >>> outside("../conf/train.yaml", "axes.md"), outside("data.md", "axes.md"), outside("../absent.yaml", "axes.md")
    ('conf/train.yaml', None, None)
    """
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return path if path.split("/")[0] not in ("docs", "..") and (ROOT / path).is_file() else None


def output_page(output: dict[str, Any]) -> str:
    """Return one output of a cell as Markdown: a picture, else a table, else text without its colours.

    >>> print(output_page({"output_type": "stream", "text": ["\\x1b[1mepoch\\x1b[0m 1\\n"]}))
    ```{ .text .no-copy }
    epoch 1
    ```
    >>> output_page({"output_type": "display_data", "data": {"image/png": "aGk=", "text/plain": "<Figure>"}})
    '<img alt="The figure that the cell returns" src="data:image/png;base64,aGk=">'
    """
    data = output.get("data", {})
    if "image/png" in data:
        content = "".join("".join(data["image/png"]).split())
        return f'<img alt="The figure that the cell returns" src="data:image/png;base64,{content}">'
    table = TABLE.search("".join(data.get("text/html", [])))
    if table:
        return f"<table>{table[1]}</table>"
    text = COLOUR.sub("", "".join(output.get("text", data.get("text/plain", [])))).rstrip()
    return f"```{{ .text .no-copy }}\n{text}\n```" if text.strip() else ""


def notebook_page(notebook: dict[str, Any], name: str) -> str:
    """Return a notebook as Markdown: its texts, its code, and the outputs that it holds.

    >>> cells = [{"cell_type": "markdown", "source": ["# A"]}, {"cell_type": "code", "source": ["1 + 1"], "outputs": []}]
    >>> print(notebook_page({"cells": cells}, "a.ipynb"))
    # A
    <BLANKLINE>
    ```python
    1 + 1
    ```
    <BLANKLINE>
    [The notebook as a file](a.ipynb)
    <BLANKLINE>
    """
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        shown_outputs = [shown for output in cell.get("outputs", []) if (shown := output_page(output))]
        if shown_outputs:
            parts += ['<div class="output" markdown="1">', *shown_outputs, "</div>"]
    executed = notebook.get("metadata", {}).get("executed")
    where = f", executed on {executed['hardware']}, {executed['date']}" if executed else ""
    return "\n\n".join([*parts, f"[The notebook as a file]({name}){where}"]) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every notebook, and for every file of the repository that is linked to."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        notebook = json.loads(Path(str(file.abs_src_path)).read_text(encoding="utf-8"))
        # Code and tables need the room of the table of contents.
        page = "---\nhide: [toc]\n---\n\n" + notebook_page(notebook, posixpath.basename(file.src_uri))
        files.append(File.generated(config, file.src_uri.removesuffix(".ipynb") + ".md", content=page))
    found = {
        path
        for page in files.documentation_pages()
        for target, _ in LINK.findall(page.content_string)
        if (path := outside(target, page.src_uri))
    }
    for path in sorted(found):
        files.append(File.generated(config, f"{SHOWN}/{path}.md", content=shown(path)))
    return files


def shown(path: str) -> str:
    """Return a file of the repository as a page."""
    language = LANGUAGES.get(Path(path).suffix, "text")
    fence = "`" * 8  # longer than any in the file
    unsearched = "---\nsearch:\n  exclude: true\n---\n\n"  # or the search would answer with source code first
    return f"{unsearched}# {path}\n\n{fence}{language}\n{(ROOT / path).read_text(encoding='utf-8')}{fence}\n"


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point the links of a page to the pages of the files."""
    here = page.file.src_uri
    if here.startswith(f"{SHOWN}/"):
        return markdown
    if here == LOG:  # what failed is not the first answer to a question
        page.meta.setdefault("search", {"boost": 0.001})

    def pointed(link: re.Match[str]) -> str:
        path = outside(link[1], here)
        if path is None:
            return link[0]
        return f"]({posixpath.relpath(f'{SHOWN}/{path}.md', posixpath.dirname(here) or '.')})"

    return LINK.sub(pointed, markdown)
