"""report.html of a run and of a search: it tells what the folder holds, loads nothing, and runs nothing that a stranger wrote."""

from __future__ import annotations

import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ehr_embed.comparison.report import report_folder
from ehr_embed.comparison.search_report import report_of_folder
from ehr_embed.config.check import check_config
from ehr_embed.config.keys import ReportKeys
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import read_json
from ehr_embed.experiment.run import run
from ehr_embed.report import report
from ehr_embed.reports.html_report import report_of, write_report
from ehr_embed.reports.page import render, sections
from ehr_embed.run_folder.finish import read_config, read_metrics
from tests.helpers.configs import composed
from tests.helpers.homonyms import KINDS, config
from tests.helpers.people import FIRST_ID, write_people
from tests.helpers.small_meds import ROOT

OLD = ROOT / "tests" / "fixtures" / "ab44340" / "finished"
HOSTILE = '<script>alert("x")</script><img src=http://evil.example/a.png onerror=alert(1)>[a](javascript:alert(2))![b](http://evil.example/b)'
LOADING = {"src", "href", "srcset", "action", "data", "poster", "background", "formaction", "xlink:href"}


class Page(HTMLParser):
    """Collect the parts of a page that could load, run or send something, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in LOADING]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def checked_page(path: Path) -> Page:
    """The page, after it was found to load nothing from anywhere and to run one script, its own."""
    page = Page(path)
    assert [a for a in page.addresses if not a.startswith(("data:image/png;base64,", "#"))] == []
    assert page.handlers == []
    assert page.tags.count("script") == 1
    assert not {"link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    source = path.read_text(encoding="utf-8")
    assert re.search(r"Content-Security-Policy\" content=\"default-src &#39;none&#39;; img-src data:", source)
    assert re.findall(r"url\(|@import", source) == []
    return page


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    root = write_people(folder / "people")
    run(config(root, folder / "run", *KINDS["frozen"], "trainer.epochs=2", "trainer.n_bootstrap=20", "seed=3"))
    return folder


def test_a_run_leaves_its_report(folder):
    page = checked_page(folder / "run" / "report.html")
    text, metrics = " ".join(page.text), read_json(folder / "run" / "metrics.json")
    entry = metrics["held_out"]["auroc"]
    assert f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]" in text
    for said in (
        "Curves",
        "Calibration",
        "Subgroups of held_out",
        "SEX//F",
        "Texts",
        "Leakage audit",
        "Limits",
        "Configuration",
    ):
        assert said in text, said
    assert page.tags.count("img") == len(list((folder / "run" / "plots").glob("*.png"))) >= 4
    assert page.tags.count("svg") > 10, "intervals are drawn"
    assert re.search(r"seed\s+3\s+0", re.sub(r"\s+", " ", text)), "a key that differs from its option"
    assert str(folder) not in text
    assert str(FIRST_ID)[:4] not in text, "no subject"


def test_an_old_run_gets_one_in_well_under_a_second(tmp_path):
    shutil.copytree(OLD, tmp_path / "old")
    (tmp_path / "old" / "explained").mkdir()
    (tmp_path / "old" / "explained" / "texts.csv").write_text("text,n_samples,mean_attribution\nFever,7,0.25\n")
    began = time.process_time()
    assert report(composed(f"run={tmp_path / 'old'}", name="report")) == tmp_path / "old" / "report.html"
    assert time.process_time() - began < 1
    text = " ".join(checked_page(tmp_path / "old" / "report.html").text)
    assert "What moved the predictions" in text
    assert "Fever" in text
    with pytest.raises(UserError, match=r"no finished run.*run=RUN_DIR"):
        report(composed(f"run={tmp_path}", name="report"))
    with pytest.raises(UserError, match=r"run"):
        check_config(composed("run=''", name="report"), ReportKeys)


def test_what_strangers_wrote_stays_text(folder, tmp_path):
    """Hostile text in codes, texts, names of classes, findings and configurations stays text in Markdown, HTML and attributes."""
    shutil.copytree(folder / "run", tmp_path / "run")
    card = tmp_path / "run" / "model_card.md"
    card.write_text(card.read_text().replace("SEX//F", HOSTILE).replace("## Texts", f"## Texts\n\n{HOSTILE}"))
    audit = {
        "findings": [{"level": "leak", "check": HOSTILE, "message": HOSTILE, "details": {}}],
        "not_checked": [HOSTILE],
    }
    (tmp_path / "run" / "audit.json").write_text(json.dumps(audit))
    (tmp_path / "run" / "explained").mkdir()
    (tmp_path / "run" / "explained" / "texts.csv").write_text(
        f'text,n\n"{HOSTILE.replace(chr(34), chr(34) * 2)}","{1}"\n'
    )
    (tmp_path / "run" / "plots" / "evil.png").write_bytes(b"<svg onload=alert(1)>")
    (tmp_path / "run" / "plots" / '"><script>.png').write_bytes((tmp_path / "run" / "plots" / "roc.png").read_bytes())
    hostile = read_config(tmp_path / "run") | {
        "seed": HOSTILE,
        "tracker": {"api_key": "k3y-of-the-tracker", "own": "/home/ann/ward"},
    }
    metrics = read_metrics(tmp_path / "run")
    metrics["held_out"][HOSTILE] = metrics["held_out"]["auroc"]
    page = report_of(tmp_path / "run", config=hostile, metrics=metrics, choices=[HOSTILE])
    (tmp_path / "page.html").write_text(page)
    found = checked_page(tmp_path / "page.html")
    assert sum("evil.example" in text for text in found.text) >= 8, "all of it is shown, as text"
    assert "k3y-of-the-tracker" not in page
    assert "/home/ann" not in page
    without = report_of(tmp_path / "run", config=hostile, metrics=metrics, choices=[], has_codes=False)
    assert "SEX//M" in page
    assert "SEX//M" not in without
    assert "sentence-transformers" in page
    private = report_of(tmp_path / "run", config=hostile, metrics=metrics, choices=[], has_environment=False)
    assert "sentence-transformers" not in private, "a tracker is not told the packages"


def test_a_report_can_be_switched_off_and_a_finding_names_no_subject(folder, tmp_path):
    run(
        config(
            folder / "people",
            tmp_path / "run",
            *KINDS["frozen"],
            "trainer.epochs=1",
            "trainer.n_bootstrap=0",
            "report=false",
        )
    )
    assert not (tmp_path / "run" / "report.html").exists()
    found = {"level": "leak", "check": "split_overlap", "message": "2 subjects are in train and in tuning, such as 4711",
             "details": {"subject_ids": [4711]}}  # fmt: skip
    (tmp_path / "run" / "audit.json").write_text(json.dumps({"findings": [found], "not_checked": []}))
    text = write_report(tmp_path / "run").read_text()
    assert "2 subjects are in train and in tuning" in text
    assert "4711" not in text


def test_a_search_leaves_a_table_that_sorts_and_its_tests(folder, tmp_path):
    sweep = tmp_path / "sweep"
    for number, seed in enumerate((3, 4)):
        shutil.copytree(folder / "run", sweep / str(number))
        outcome = {"state": "finished", "values": [0.5 + number / 10], "seconds": 1.0, "error": None, "results": {},
                   "overrides": [f"seed={seed}", f"+data.note={HOSTILE}{number}"]}  # fmt: skip
        (sweep / str(number) / "outcome.json").write_text(json.dumps(outcome))
    report_folder(sweep)
    (sweep / "comparison").mkdir()
    (sweep / "comparison" / "comparisons.csv").write_text(
        f"metric,run,other,difference,low,high,p,p_holm\nauroc,{sweep}/1,{sweep}/0,0.01,-0.01,0.03,0.4,0.8\n"
    )
    page = checked_page(report_of_folder(sweep))
    text = " ".join(page.text)
    for said in (
        "2 finished",
        "Paired tests",
        "sweep/1 minus each other run",
        "+0.0100 [-0.0100, +0.0300]",
        "Learning curves",
    ):
        assert said in text, said
    assert "evil.example" in text
    assert str(tmp_path) not in text
    assert (sweep / "plots" / "learning_curves.png").is_file()
    source = (sweep / "report.html").read_text()
    assert 'class="sortable"' in source
    assert "objective" in text


def test_a_page_is_made_of_what_it_is_given():
    assert sections("no heading") == {}
    with pytest.raises(Exception, match="undefined"):
        render("run.html.jinja")
