"""A name of a stranger stays a name in the model card, whoever reads its Markdown."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from ehr_embed.evaluation.subgroups import Subgroup
from ehr_embed.reports.markdown import code, plain, table
from ehr_embed.reports.model_card import _subgroups
from ehr_embed.reports.page import table_in

READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
NAMES = ("SEX//F | M", "*bold*", "**a**", "`code`", "a ` b", "<b>x</b>", "<script>alert(1)</script>", "[a](http://evil.example)",
         "![a](b)", "~~gone~~", "&lt;b&gt;", "_a_ __b__ label_1y", r"back\slash \| \\|", "http://evil.example", "<http://evil.example>",
         "# heading", "- item", "two\nlines")  # fmt: skip


def read(text: str) -> list[str]:
    """The texts of the cells of a table, whose tokens must be text alone."""
    tokens = READER.parse(text)
    cells = [t for t, before in zip(tokens[1:], tokens, strict=False) if before.type in ("td_open", "th_open")]
    for cell in cells:
        assert {child.type for child in cell.children} <= {"text"}, cell.content
    return ["".join(child.content for child in cell.children) for cell in cells]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is_and_stays_in_its_cell(name):
    shown = " ".join(name.split())
    assert read(table(["a", "b"], [[plain(name), "1"]])) == ["a", "b", shown, "1"]
    tokens = READER.parseInline(code(name))[0].children
    assert [(token.type, token.content) for token in tokens] == [("code_inline", shown)]


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab_|*`<>[]()!~&;\\#$: /"), min_size=1))
def test_any_name_does(name):
    assert read(table(["a", "b"], [[plain(name), "1"]])) == ["a", "b", " ".join(name.split()), "1"]


@pytest.mark.parametrize("name", NAMES)
def test_a_code_in_the_card_and_in_the_report(name):
    """The card's section of subgroups, and what report.html reads back from it."""
    section = _subgroups([Subgroup(name, None, None), Subgroup("SEX//F", 30, None)], 0)
    assert read(section)[5] == " ".join(name.split())
    head, rows, _ = table_in(section)
    assert [len(row) for row in rows] == [len(head)] * 2
    assert [row[0] for row in rows] == [" ".join(name.split()), "SEX//F"]
