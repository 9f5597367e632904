"""SVG drawings of docs/pictures.py: two palettes, boxes, lines and words, values on an axis, and badges."""

from __future__ import annotations

from html import escape

FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, 'SF Mono', 'DejaVu Sans Mono', monospace"
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b2430",
    "soft": "#5a6675",
    "line": "#c9d3de",
    "band": "#f1f5fa",
    "good": "#0072b2",
    "other": "#9aa7b5",
    "bad": "#d55e00",
    "green": "#00795a",
    "accent": "#0072b2",
}
DARK = {
    "paper": "#0d1117",
    "ink": "#e6edf3",
    "soft": "#9da9b6",
    "line": "#39434f",
    "band": "#161d27",
    "good": "#56b4e9",
    "other": "#6d7a88",
    "bad": "#ff9a5c",
    "green": "#35c79c",
    "accent": "#56b4e9",
}
MODES = {"light": LIGHT, "dark": DARK}


class Drawing:
    """An SVG picture in one palette."""

    def __init__(self, width: int, height: int, title: str, colours: dict[str, str]) -> None:
        self.c = colours
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="10" fill="{colours["paper"]}"/>',
        ]

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 14,
        colour: str = "ink",
        weight: int = 400,
        anchor: str = "start",
        mono: bool = False,
    ) -> None:
        """Write a line of text."""
        family = MONO if mono else FONT
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-family="{family}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
            f'fill="{self.c.get(colour, colour)}">{escape(text)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = "band",
        line: str = "line",
        radius: int = 8,
    ) -> None:
        """Draw a box."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" fill="{self.c.get(fill, fill)}" '
            f'stroke="{self.c.get(line, line)}"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, *, colour: str = "line", width: float = 1.5) -> None:
        """Draw a line."""
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{self.c.get(colour, colour)}" '
            f'stroke-width="{width:g}"/>'
        )

    def dot(self, x: float, y: float, *, colour: str, radius: float = 5) -> None:
        """Draw a dot."""
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{self.c.get(colour, colour)}"/>')

    def arrow(self, x1: float, y: float, x2: float) -> None:
        """Draw an arrow to the right."""
        self.line(x1, y, x2 - 6, y, colour="soft", width=2)
        self.parts.append(f'<path d="M{x2 - 9:g} {y - 5:g} l9 5 -9 5 z" fill="{self.c["soft"]}"/>')

    def svg(self) -> str:
        """Return the picture."""
        return "\n".join([*self.parts, "</svg>", ""])


def bars(
    title: str,
    told: str,
    entries: list[tuple[str, float, tuple[float, float] | None, str]],
    low: float,
    high: float,
    c: dict[str, str],
    *,
    unit: str = "AUROC",
) -> str:
    """Draw values with intervals on one axis: (name, value, interval, colour)."""
    lines = told.split("\n")
    top = 66 + 17 * (len(lines) - 1)
    d = Drawing(480, top + 30 + 40 * len(entries), title, c)
    d.text(20, 32, title, size=17, weight=600)
    for number_, line in enumerate(lines):
        d.text(20, 53 + 17 * number_, line, size=12, colour="soft")
    left, right, bottom = 220, 400, top - 2 + 40 * len(entries)

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    for tick in (low, (low + high) / 2, high):
        d.line(at(tick), top, at(tick), bottom, colour="line", width=1)
        d.text(at(tick), bottom + 18, f"{tick:g}", size=11, colour="soft", anchor="middle")
    d.text(right + 68, bottom + 18, unit, size=11, colour="soft", anchor="end")
    for place, (name, value, ends, colour) in enumerate(entries):
        y = top + 20 + 40 * place
        d.text(left - 12, y + 5, name, size=13, anchor="end")
        if ends:
            d.line(at(ends[0]), y, at(ends[1]), y, colour=colour, width=3)
        d.dot(at(value), y, colour=colour, radius=6)
        d.text(right + 16, y + 5, f"{value:.3f}", size=14, weight=600, colour="soft" if colour == "other" else colour)
    return d.svg()


def badge(left: str, right: str) -> str:
    """Draw a badge: a name and a fact of this repository."""
    a, b = 7 * len(left) + 14, 7 * len(right) + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {a + b} 20" width="{a + b}" height="20" role="img">'
        f"<title>{escape(left)}: {escape(right)}</title>"
        f'<rect width="{a + b}" height="20" rx="4" fill="#3d4a59"/><rect x="{a}" width="{b}" height="20" rx="4" fill="#0072b2"/>'
        f'<rect x="{a}" width="6" height="20" fill="#0072b2"/>'
        f'<g fill="#ffffff" font-family="{FONT}" font-size="12" text-anchor="middle">'
        f'<text x="{a / 2:g}" y="14">{escape(left)}</text><text x="{a + b / 2:g}" y="14">{escape(right)}</text></g></svg>\n'
    )
