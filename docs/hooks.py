"""Give every file of the repository that a page links to a page of its own on the mkdocs site.

A link such as `../conf/train.yaml` then works on the site as it does in the repository.
"""

from __future__ import annotations

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
LINK = re.compile(r"\]\(([^)#\s:]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".md": "markdown", ".toml": "toml"}


def outside(target: str, page: str) -> str | None:
    """The repository's file that a link of a page means, None where the target lies in docs/ or is no file.

    >>> outside("../conf/train.yaml", "axes.md"), outside("data.md", "axes.md"), outside("../absent.yaml", "axes.md")
    ('conf/train.yaml', None, None)
    """
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return path if path.split("/")[0] not in ("docs", "..") and (ROOT / path).is_file() else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every file of the repository that is linked to."""
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
    return f"# {path}\n\n{fence}{language}\n{(ROOT / path).read_text(encoding='utf-8')}{fence}\n"


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point the links of a page to the pages of the files."""
    here = page.file.src_uri
    if here.startswith(f"{SHOWN}/"):
        return markdown

    def pointed(link: re.Match[str]) -> str:
        path = outside(link[1], here)
        if path is None:
            return link[0]
        return f"]({posixpath.relpath(f'{SHOWN}/{path}.md', posixpath.dirname(here) or '.')})"

    return LINK.sub(pointed, markdown)
