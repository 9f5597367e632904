"""Draw docs/architecture.svg: the packages in the order of the import contract, each with the first sentence of its README.

Run `python docs/architecture.py` after a package was added or its README changed; a test compares the drawing with the code.
"""

from __future__ import annotations

import re
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DRAWING = ROOT / "docs" / "architecture.svg"
PAGE = ROOT / "docs" / "architecture.md"
MARKED = re.compile(r"(<!-- packages -->\n).*?(<!-- end -->)", flags=re.DOTALL)
WIDTH, ROW, LEFT, TOP = 1080, 40, 20, 84
NAMES = 150
STYLE = """
  .back { fill: #ffffff } .room { fill: #eef3fb; stroke: #4a6fa5 } .name { fill: #16325c; font-weight: 600 }
  .text { fill: #33415c } .arrow { stroke: #4a6fa5; fill: none; stroke-width: 1.5 } .head { fill: #4a6fa5 }
  text { font: 14px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
  .title { font-size: 18px; font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .back { fill: #14181f } .room { fill: #1f2a3a; stroke: #8fb3e8 } .name { fill: #cfe0fb }
    .text { fill: #c3cad6 } .arrow { stroke: #8fb3e8 } .head { fill: #8fb3e8 }
  }
"""


def layers() -> list[list[str]]:
    """Return the packages from the lowest layer of the import contract to the highest; siblings share a layer."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(c for c in settings["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    split = [re.split(r"\s*[|:]\s*", layer) for layer in contract["layers"]]
    return [[name.strip("() ").removeprefix("ehr_embed.") for name in names] for names in reversed(split)]


def sentence(package: str) -> str:
    """Return the first sentence below the heading of a package's README, without its markup."""
    text = (ROOT / "ehr_embed" / package / "README.md").read_text(encoding="utf-8")
    paragraph = " ".join(text.partition("\n")[2].strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.])\s", paragraph)[0].replace("`", "")


def draw() -> str:
    """Return the drawing as SVG: one row per layer, from the sources at the top to the commands at the bottom."""
    rows = [names for names in layers() if (ROOT / "ehr_embed" / names[0]).is_dir()]
    height = TOP + ROW * len(rows) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title">',
        '<title id="title">The packages of ehr_embed, in the order of the data</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="back" width="{WIDTH}" height="{height}" rx="8"/>',
        f'<text class="name title" x="{LEFT}" y="36">The packages of ehr_embed, in the order of the data</text>',
        f'<text class="text" x="{LEFT}" y="60">A package imports only those above it in this drawing. make lint checks it.</text>',
    ]
    for number, names in enumerate(rows):
        y = TOP + ROW * number
        label = escape(", ".join(names))
        parts += [
            f'<rect class="room" x="{LEFT}" y="{y}" width="{NAMES}" height="{ROW - 12}" rx="5"/>',
            f'<text class="name" x="{LEFT + 10}" y="{y + 19}">{label}</text>',
            f'<text class="text" x="{LEFT + NAMES + 16}" y="{y + 19}">{escape(sentence(names[0]))}</text>',
        ]
        if number:
            x = LEFT + NAMES // 2
            parts += [
                f'<path class="arrow" d="M{x} {y - 12} V{y - 4}"/>',
                f'<path class="head" d="M{x - 4} {y - 6} h8 l-4 6 z"/>',
            ]
    return "\n".join([*parts, "</svg>", ""])


def listed() -> str:
    """Return the same as a list, which a phone shows in the drawing's place."""
    rows = [names for names in layers() if (ROOT / "ehr_embed" / names[0]).is_dir()]
    return "\n".join(f"1. **{', '.join(names)}**: {sentence(names[0])}" for names in rows)


def expanded(page: str) -> str:
    """Return the page with the list written anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{listed()}\n\n{found[2]}", page)


if __name__ == "__main__":
    DRAWING.write_text(draw(), encoding="utf-8")
    PAGE.write_text(expanded(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {DRAWING.relative_to(ROOT)} and the list of {PAGE.relative_to(ROOT)}")
