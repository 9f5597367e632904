"""Draw the pictures of README.md and of the site's home page: `python docs/pictures.py`.

The figures in them are read from the tables of docs/asking.md and docs/speed.md and from the rows in docs/results/hospitals, so
that a picture is renewed with them; a test compares them. `python docs/pictures.py --terminal` records the terminal anew, by a real
run of the demo.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import tomllib
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import hospital_tables  # noqa: E402
from docs.drawing import MODES, Drawing, badge, bars  # noqa: E402

DOCS = ROOT / "docs"
PICTURES = DOCS / "pictures"
COLUMNS, N_FIRST_LINES = 104, 2
COMMAND = ("train", "data.n_subjects=2000", "trainer.epochs=4", "run_dir=runs/first")
"""The terminal picture shows this command: the second one of the first screen, with fewer subjects and epochs."""
EVENTS = (
    ("2 y", "Type 2 diabetes"),
    ("14 mo", "Creatinine = 1.9"),
    ("8 mo", "Shortness of breath"),
    ("20 d", "Furosemide 40 mg"),
    ("3 d", "Leg oedema"),
)
"""A record: how long before the prediction, and what."""
NUMBER = re.compile(r"\d+\.\d+")


def row(page: str, start: str) -> list[str]:
    """Return the cells of the first table row of a page that starts with a text.

    Raises:
        SystemExit: the page has no such row any more; its picture must then be thought over.
    """
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().replace("**", "") for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("|") and f"{cells[0]} |".startswith(start):
            return cells
    sys.exit(f"docs/{page} has no table row that starts with {start!r}; a picture of docs/pictures.py tells it")


def number(cell: str) -> float:
    """Return the first decimal number of a cell."""
    found = NUMBER.search(cell)
    if found is None:
        sys.exit(f"{cell!r} holds no number for a picture of docs/pictures.py")
    return float(found[0])


def interval(cell: str) -> tuple[float, float] | None:
    """Return the ends of a cell's interval, if it has one.

    >>> interval("0.806 [0.753, 0.851]"), interval("0.761")
    ((0.753, 0.851), None)
    """
    found = re.search(r"\[(\d+\.\d+), (\d+\.\d+)\]", cell)
    return (float(found[1]), float(found[2])) if found else None


def overview(c: dict[str, str]) -> str:
    """Draw the way from the texts of events to an answer."""
    d = Drawing(
        1000,
        250,
        "Event texts become vectors, a small model reads them, and a risk comes out, with held-out metrics",
        c,
    )
    heads = (
        (16, 225, "1  a record's events, as text"),
        (285, 195, "2  each text embedded once"),
        (524, 190, "3  a small model"),
        (758, 226, "4  an answer, checked"),
    )
    for x, width, title in heads:
        d.box(x, 44, width, 184)
        d.text(x + width / 2, 30, title, size=14, weight=600, anchor="middle")
    for number_, (when, text) in enumerate(EVENTS):
        y = 74 + 31 * number_
        d.text(66, y, when, size=12, colour="soft", anchor="end")
        d.dot(80, y - 4, colour="accent", radius=4)
        d.text(94, y, text, size=13)
    shades = ((9, 3, 6, 1, 8, 4), (2, 7, 5, 9, 1, 6), (6, 1, 8, 4, 3, 9), (3, 9, 2, 7, 5, 1), (8, 4, 1, 6, 9, 2))
    for line, values in enumerate(shades):
        for column, value in enumerate(values):
            d.parts.append(
                f'<rect x="{305 + 26 * column}" y="{60 + 31 * line}" width="24" height="20" rx="3" fill="{c["good"]}" '
                f'opacity="{value / 10}"/>'
            )
    d.text(382, 222, "one row per distinct text", size=12, colour="soft", anchor="middle")
    for name, y in (("transformer", 62), ("GRU", 106), ("code_tab", 150)):
        d.box(544, y, 150, 34, fill="paper")
        d.text(619, y + 22, name, size=13, anchor="middle")
    d.text(619, 204, "beside baselines on codes:", size=12, colour="soft", anchor="middle")
    d.text(619, 220, "boosting, logistic, Cox", size=12, colour="soft", anchor="middle")
    d.text(774, 76, "Heart failure within a year", size=13, weight=600)
    d.line(774, 106, 966, 106, colour="line", width=6)
    d.dot(881, 106, colour="green", radius=7)
    d.text(774, 136, "risk, and what moved it", size=13)
    for y, text in (
        (162, "metrics with 95 % intervals"),
        (186, "audit: no later event is seen"),
        (210, "report.html, model card"),
    ):
        d.text(774, y, f"✓ {text}", size=12, colour="soft")
    for x in (245, 484, 718):
        d.arrow(x, 136, x + 36)
    return d.svg()


def overview_narrow(c: dict[str, str]) -> str:
    """Draw the same from top to bottom, for a phone."""
    d = Drawing(
        360, 640, "Event texts become vectors, a small model reads them, and a risk comes out, with held-out metrics", c
    )
    parts = (
        (10, 156, "1  a record's events, as text"),
        (206, 96, "2  each text embedded once"),
        (342, 96, "3  a small model"),
        (478, 152, "4  an answer, checked"),
    )
    for y, height, title in parts:
        d.box(10, y, 340, height)
        d.text(26, y + 26, title, size=16, weight=600)
    for number_, (when, text) in enumerate(EVENTS[:4]):
        y = 66 + 26 * number_
        d.text(82, y, when, size=14, colour="soft", anchor="end")
        d.dot(98, y - 5, colour="accent", radius=4)
        d.text(114, y, text, size=15)
    for column, value in enumerate((9, 3, 6, 1, 8, 4, 2, 7, 5)):
        d.parts.append(
            f'<rect x="{26 + 28 * column}" y="246" width="25" height="18" rx="3" fill="{c["good"]}" opacity="{value / 10}"/>'
        )
    d.text(26, 288, "one row per distinct text", size=14, colour="soft")
    d.text(26, 394, "transformer, GRU, code_tab", size=14)
    d.text(26, 422, "beside boosting, logistic and Cox on codes", size=14, colour="soft")
    d.text(26, 532, "Heart failure within a year", size=15)
    d.line(26, 554, 330, 554, colour="line", width=6)
    d.dot(172, 554, colour="green", radius=7)
    d.text(26, 586, "✓ metrics with 95 % intervals", size=14, colour="soft")
    d.text(26, 610, "✓ no later event is seen; report.html", size=14, colour="soft")
    for y in (166, 302, 438):
        d.line(180, y + 4, 180, y + 30, colour="soft", width=2)
        d.parts.append(f'<path d="M175 {y + 28} l10 0 -5 9 z" fill="{c["soft"]}"/>')
    return d.svg()


def asking(c: dict[str, str]) -> str:
    """Draw what an outcome in words is answered with: as it stands in the records, kept out of pretraining, and beside others."""
    words, kept_out, many, supervised, boosting = (
        row("asking.md", start)
        for start in (
            'hazards, "osteoarthritis", seed 0 |',
            'hazards, "osteoarthritis", with every arthritis kept out',
            "100 such futures",
            "supervised, `experiment=gibleed`",
            "boosting, `model=gbm`",
        )
    )
    _, *seeds = (float(found) for found in NUMBER.findall(kept_out[1]))
    entries = [
        ("asked in words", number(words[1]), interval(words[1]), "good"),
        ("... its family kept out", number(kept_out[1]), (min(seeds), max(seeds)), "good"),
        ("100 sampled futures", number(many[1]), interval(many[1]), "other"),
        ("with all labels: encoder", number(supervised[1]), interval(supervised[1]), "other"),
        ("with all labels: boosting", number(boosting[1]), interval(boosting[1]), "other"),
    ]
    told = (
        "synthetic GiBleed, 710 held-out predictions of its onset within a year\n"
        "the first three rows read no label set; the last two read all labels\n"
        "bars: interval of one seed; family kept out: mean and range of 3"
    )
    return bars("Asked for “osteoarthritis” in words", told, entries, 0.5, 0.9, c)


def hospitals(c: dict[str, str]) -> str:
    """Draw what models keep in a hospital with other codes, beside the same without alignment and with wrong texts.

    Raises:
        SystemExit: the rows lack a model or a control of the picture.
    """
    rows = hospital_tables.read(DOCS / "results" / "hospitals" / hospital_tables.RUNS)

    def found(model: str, control: str) -> list[hospital_tables.Row]:
        about = {"way": "unchanged", "split": "all", "trained_on": "physionet2012", "applied_to": "eicu_demo_a"}
        of = hospital_tables.chosen(rows, model=model, control=control, **about)
        if not of:
            sys.exit(
                f"docs/results/hospitals has no row of {model} with {control}; a picture of docs/pictures.py tells it"
            )
        return of

    entries = []
    for title, model, control, colour in (
        ("code_tab, codes matched", "code_tab", "texts", "good"),
        ("boosting, codes matched", "gbm", "texts", "good"),
        ("boosting, not matched: age", "gbm", "none", "other"),
        ("code_tab, not matched", "code_tab", "none", "other"),
        ("code_tab, wrong texts ({} x)", "code_tab", "shuffled", "bad"),
    ):
        of = found(model, control)
        values = [float(one["auroc"]) for one in of]
        ends = (
            (float(of[0]["auroc/low"]), float(of[0]["auroc/high"]))
            if control != "shuffled"
            else (min(values), max(values))
        )
        entries.append((title.format(len(of)), fmean(values), ends, colour))
    first = found("code_tab", "texts")
    told = (
        f"PhysioNet 2012 to the eICU demo, unchanged: {first[0]['n']} stays, {first[0]['n_positive']} deaths\n"
        f"dots: mean of {len(first)} seeds; bars: interval of one seed (orange: range)"
    )
    return bars("A hospital with other codes", told, entries, 0.4, 1.0, c)


def speed(c: dict[str, str]) -> str:
    """Draw how many times faster or smaller things are than the designs that they are measured against, and how much of that is
    left where both sides do the same."""
    texts = row("speed.md", "embedding texts of events")[1]
    alike = re.search(r"([\d.]+)x on the distinct texts alone", texts)
    told = (
        (
            "training, per event",
            "the original pipeline, rebuilt",
            row("speed.md", "training, events/s against the original")[1],
            "good",
        ),
        (
            "... the same computation",
            "both without its dropout",
            row("speed.md", "the same without dropout")[1],
            "other",
        ),
        ("building batches", "meds-torch-data 0.9.0", row("speed.md", "building batches")[1], "good"),
        ("embedding texts", "one call per event", texts, "good"),
        ("... of distinct texts alone", "one call per text", alike[0] if alike else "", "other"),
        ("bytes on disk per event", "one .pt file per patient", row("speed.md", "bytes on disk per event")[1], "good"),
    )
    d = Drawing(480, 118 + 40 * len(told), "Speed and size against other designs", c)
    d.text(20, 32, "Times faster, times smaller", size=17, weight=600)
    d.text(20, 53, "2 CPU cores (AMD EPYC with AVX512-BF16), no GPU, 2026-11-25", size=12, colour="soft")
    d.text(20, 70, "grey: the same computation on both sides", size=12, colour="soft")
    ratios = []
    for *_, cell, _ in told:
        found = re.match(r"(?:1/)?([\d.]+)", cell)
        if found is None:
            sys.exit(f"docs/speed.md: {cell!r} does not begin with a ratio")
        ratios.append(float(found[1]))
    left, right, most = 205, 405, max(ratios)
    for place, ((name, against, _, colour), value) in enumerate(zip(told, ratios, strict=True)):
        y = 92 + 40 * place
        d.text(20, y + 13, name, size=13)
        d.text(20, y + 27, against, size=11, colour="soft")
        width = (right - left) * value / most
        d.box(left, y + 4, width, 18, fill=colour, line=colour, radius=3)
        d.text(left + width + 10, y + 18, f"{value:g}x", size=14, weight=600)
    # The other design itself, at 1x, on the same scale.
    d.line(left + (right - left) / most, 86, left + (right - left) / most, 92 + 40 * len(told), colour="bad", width=1.5)
    d.text(left + 8, 102 + 40 * len(told), "line: the other design, 1x", size=11, colour="bad")
    return d.svg()


def drawn() -> dict[str, str]:
    """Return every picture by file name, but the terminal."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = re.search(
        r'^__version__ = "(.+)"', (ROOT / "ehr_embed" / "__init__.py").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert version is not None
    found = {}
    draws = {
        "overview": overview, "overview-narrow": overview_narrow, "asking": asking, "hospitals": hospitals, "speed": speed
    }  # fmt: skip
    for name, draw in draws.items():
        for mode, colours in MODES.items():
            found[f"{name}-{mode}.svg"] = draw(colours)
    badges = {
        "version": version[1],
        "python": project["requires-python"].removeprefix(">=") + "+",
        "licence": project["license"],
    }
    return found | {f"badge-{name}.svg": badge(name, value) for name, value in badges.items()}


def terminal() -> dict[str, str]:
    """Return the pictures of a terminal in which `ehr-embed train` runs, from a real run of the demo."""
    from rich.console import Console
    from rich.terminal_theme import DIMMED_MONOKAI, MONOKAI, TerminalTheme
    from rich.text import Text

    from docs.terminal import on_a_terminal

    with tempfile.TemporaryDirectory() as folder:
        # As in a user's terminal: folders below the present one, and as many threads as the run itself chooses.
        hidden = ("OMP_NUM_THREADS", "EHR_EMBED_CACHE")
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        environment |= {"COLUMNS": str(COLUMNS), "PYTHONPATH": str(ROOT)}
        command = ("-m", "ehr_embed", *COMMAND)
        code, output = on_a_terminal(
            *command, cwd=Path(folder), environment=environment, columns=COLUMNS, kind="xterm-256color"
        )
        if code:
            sys.exit(output)
    lines = [line.split("\r")[-1] for line in output.replace("\r\n", "\n").split("\n")]
    shown = [line for line in lines if line.strip()]
    first = next(number for number, line in enumerate(shown) if line.startswith("epoch"))
    shown = [*shown[:N_FIRST_LINES], f"... {first - N_FIRST_LINES} lines of what was read and prepared", *shown[first:]]
    if folder in "".join(shown):
        sys.exit("the capture names a folder of this machine")
    pictures = {}
    light = TerminalTheme((255, 255, 255), (27, 36, 48), list(DIMMED_MONOKAI.ansi_colors._colors))
    for mode, theme in (("light", light), ("dark", MONOKAI)):
        console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
        console.print(Text(f"$ ehr-embed {' '.join(COMMAND)}", style="bold"))
        for line in shown:
            console.print(Text.from_ansi(line), overflow="fold")
        svg = console.export_svg(title="ehr-embed train", theme=theme)
        # rich would load its font from another host.
        pictures[f"terminal-{mode}.svg"] = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return pictures


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    pictures = drawn() | (terminal() if "--terminal" in sys.argv else {})
    for name, svg in pictures.items():
        (PICTURES / name).write_text(svg, encoding="utf-8")
    print(f"wrote {len(pictures)} pictures into {PICTURES.relative_to(ROOT)}")
