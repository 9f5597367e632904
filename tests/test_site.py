"""The site and the reports in a real browser: at three widths, light and dark, nothing is clipped, dead, or from elsewhere."""

from __future__ import annotations

import csv
import json
import re
import runpy
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

import ehr_embed
from benchmarks import hospital_tables
from ehr_embed.comparison.report import report_folder
from ehr_embed.reports.html_report import write_report
from tests.helpers.browser import OUTSIDE_OF_PICTURE, SCHEMES, WIDTHS, browser, serve, troubles  # noqa: F401  (a fixture)
from tests.helpers.built_site import site  # noqa: F401  (a fixture)
from tests.helpers.small_meds import ROOT

OLD = ROOT / "tests" / "fixtures" / "ab44340" / "finished"
PICTURES = [*(ROOT / "docs").glob("*.svg"), *(ROOT / "docs" / "pictures").glob("*.svg")]
MANY_IN_DARK = ("index", "gallery", "architecture", "api", "results")
MOST_GALLERY_BYTES = 600_000


def test_pictures_are_those_of_the_pages():
    """`python docs/pictures.py` was run after a figure of a page, the version or the licence changed."""
    drawn = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["drawn"]()
    stored = {name: (ROOT / "docs" / "pictures" / name).read_text(encoding="utf-8") for name in drawn}
    assert stored == drawn, "Type: python docs/pictures.py"


def test_bars_are_as_long_as_their_figures():
    svg = (ROOT / "docs" / "pictures" / "speed-light.svg").read_text(encoding="utf-8")
    lengths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)" height="18"', svg)]
    figures = [float(figure) for figure in re.findall(r">([\d.]+)x</text>", svg)]
    assert len(lengths) == len(figures) >= 4
    assert [length / max(lengths) for length in lengths] == pytest.approx([f / max(figures) for f in figures], rel=0.01)


def test_the_leaderboard_is_that_of_the_committed_tables():
    """`python docs/results.py` was run after a table was added to docs/results/, each row
    says how it was made, and no table names a folder of a machine."""
    module = runpy.run_path(str(ROOT / "docs" / "results.py"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    titles = yaml.safe_load((ROOT / "docs" / "results" / "titles.yaml").read_text(encoding="utf-8"))
    assert module["expanded"](page) == page, "Type: python docs/results.py"
    for path in (ROOT / "docs" / "results").glob("*.csv"):
        text = path.read_text(encoding="utf-8")
        assert "hardware" in text.splitlines()[0]
        for row in csv.DictReader(text.splitlines()):
            shown = module["marked"](row, titles.get(path.stem, {}).get("afterwards", {}))
            assert all(shown[name] for name in ("commit", "hardware", "date")), (path, row["runs"])
            # Members of an ensemble were trained by its command.
            assert shown["command"] or "/members/" in row["runs"], (path, row["runs"])
            assert shown["commit"] == row["commit"] or shown["commit"].endswith("†"), "what no run recorded is marked"
        assert re.findall(r"(?<![\w.])/[a-z]+/", text) == [], path


def test_tables_of_the_hospitals_page_are_those_of_the_committed_rows():
    """`python docs/results.py` was run after a row was added, the page shows every table, and no row names a machine's folder."""
    module = runpy.run_path(str(ROOT / "docs" / "results.py"))
    page = (ROOT / "docs" / "hospitals.md").read_text(encoding="utf-8")
    assert module["with_hospitals"](page) == page, "Type: python docs/results.py"
    assert sorted(re.findall(r"<!-- table: (\w+) -->", page)) == sorted(hospital_tables.tables(module["HOSPITALS"], {}))
    for path in module["HOSPITALS"].glob("*.csv"):
        assert re.findall(r"(?<![\w.])/[a-z]+/", path.read_text(encoding="utf-8")) == [], path
    runs = [
        row["run"]
        for row in hospital_tables.read(module["HOSPITALS"] / hospital_tables.RUNS)
        if row["split"] == "held_out"
    ]
    assert "few_pooltab_100_0" in runs
    assert "home_to_away_tab_texts_0" in runs


def test_a_release_has_one_version():
    assert f"version: {ehr_embed.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(
        rf"^## {re.escape(ehr_embed.__version__)}, \d{{4}}-\d\d-\d\d$",
        (ROOT / "CHANGELOG.md").read_text(),
        re.MULTILINE,
    )
    for path in (ROOT / ".github").rglob("*.yml"):
        assert yaml.safe_load(path.read_text()), path


def test_pictures_are_small_load_nothing_and_are_all_shown():
    for path in PICTURES:
        assert re.findall(r"(?:href|src)=[\"']?http|url\([\"']?http|@import|<script", path.read_text()) == [], path
    files = list((ROOT / "docs" / "gallery").glob("*.png"))
    assert sum(path.stat().st_size for path in files) < MOST_GALLERY_BYTES
    page = (ROOT / "docs" / "gallery.md").read_text()
    assert {path.name for path in files} == set(re.findall(r"\(gallery/([^)]+)\)", page))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_is_whole_at_every_width(site, browser, width, scheme):
    server, address = serve(site)
    try:
        pages = sorted(path.name for path in site.glob("*.html") if path.name != "404.html")
        if scheme == "dark":  # the layout is the same; the colours and the pictures differ
            pages = [name for name in pages if Path(name).stem in MANY_IN_DARK]
        assert len(pages) >= len(MANY_IN_DARK)
        assert troubles(browser, address, pages, width=WIDTHS[width], scheme=scheme) == {}
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_the_palette_follows_the_system_and_its_switch_works(site, browser):
    server, address = serve(site)
    try:
        for scheme, expected in (("light", "default"), ("dark", "slate")):
            page = browser.new_page(color_scheme=scheme, viewport={"width": 1366, "height": 900})
            page.goto(f"{address}/index.html")
            shown = "() => document.body.getAttribute('data-md-color-scheme')"
            assert page.evaluate(shown) == expected
            pictures = page.evaluate(
                "() => [...document.querySelectorAll('article img')].filter((i) => i.offsetWidth).map((i) => i.src)"
            )
            assert pictures
            assert all(f"-{scheme}.svg" in source for source in pictures), pictures
            page.locator("form[data-md-component=palette] label:visible").click()
            assert page.evaluate(shown) != expected
            page.close()
    finally:
        server.shutdown()
        server.server_close()


class Links(HTMLParser):
    """The addresses that a page links to, and the places in it that can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.places |= {value for name in ("id", "name") if (value := given.get(name))}
        if link := given.get("href" if tag in ("a", "link") else "src" if tag in ("img", "script") else ""):
            self.links.append(link)


@pytest.mark.slow
def test_no_link_of_the_site_is_dead(site):
    pages = {path: Links(path) for path in site.rglob("*.html") if path.name != "404.html"}
    dead, n_links = [], 0
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            n_links += 1
            target, _, place = unquote(link).partition("#")
            file = (path.parent / target).resolve() if target else path
            known = pages[file].places if file in pages else set()
            if not file.exists() or (place and file in pages and place not in known and place != "__skip"):
                dead.append((path.relative_to(site).as_posix(), link))
    assert n_links > 500
    assert dead == []


@pytest.mark.slow
def test_no_text_of_a_picture_is_cut_off(browser):
    page = browser.new_page()
    cut = {}
    for path in PICTURES:
        if path.name.startswith("terminal"):  # each of its lines has its own clip, as a terminal's does
            continue
        page.set_content(path.read_text(encoding="utf-8"))
        if found := page.evaluate(OUTSIDE_OF_PICTURE):
            cut[path.name] = found
    assert cut == {}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_reports_are_whole_at_every_width_and_a_table_sorts(browser, tmp_path, scheme):
    shutil.copytree(OLD, tmp_path / "run")
    write_report(tmp_path / "run")
    for number in range(3):
        shutil.copytree(OLD, tmp_path / "sweep" / str(number))
        outcome = {"state": "finished", "values": [0.5 + number / 10], "seconds": 1.0 + number, "error": None, "results": {},
                   "overrides": [f"seed={number}"]}  # fmt: skip
        (tmp_path / "sweep" / str(number) / "outcome.json").write_text(json.dumps(outcome))
    report_folder(tmp_path / "sweep")
    pages = [(tmp_path / name / "report.html").as_uri() for name in ("run", "sweep")]
    for width in WIDTHS.values():
        assert troubles(browser, "", pages, width=width, scheme=scheme) == {}
    page = browser.new_page(color_scheme=scheme)
    page.goto(pages[1])
    first = "() => document.querySelector('table.sortable tbody tr').cells[2].textContent"
    assert page.evaluate(first) == "0.7000", "the best stands first"
    page.locator("table.sortable th", has_text="objective").click()
    assert page.evaluate(first) == "0.5000"
    page.locator("table.sortable th", has_text="objective").click()
    assert page.evaluate(first) == "0.7000"
