"""Write the tables of docs/axes.md from the head comments of conf/ and sweeps/: `python docs/options.py`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AXES = ROOT / "docs" / "axes.md"
TABLE = re.compile(r"(<!-- options: (\S+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def summary(path: Path) -> str:
    """Return the first paragraph of a YAML's head comment, escaped so that Markdown shows it as it is written."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line != "# @package _global_"]
    head = []
    for line in lines:
        if not line.startswith("# "):
            break
        head.append(line.removeprefix("# "))
    return re.sub(r"[*|<]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(head))


def table(folder: str) -> str:
    """Return a table with one row per option of a folder; the row links to the option's YAML."""
    rows = [
        f"| [`{path.stem}`](../{folder}/{path.name}) | {summary(path)} |"
        for path in sorted((ROOT / folder).glob("*.yaml"))
    ]
    return "\n".join(["", "| option | what |", "|---|---|", *rows, "", ""])


def expanded(page: str) -> str:
    """Return the page with the tables between its markers written anew."""
    return TABLE.sub(lambda found: found[1] + table(found[2]) + found[3], page)


if __name__ == "__main__":
    AXES.write_text(expanded(AXES.read_text(encoding="utf-8")), encoding="utf-8")
