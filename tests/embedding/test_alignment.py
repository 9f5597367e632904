from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ehr_embed.core.errors import UserError
from ehr_embed.data.store import build_store
from ehr_embed.data.vocabulary import FIRST_TOKEN, UNKNOWN, Vocabulary, VocabularySettings
from ehr_embed.embedding.aligning import AlignmentSettings, aligned_table
from ehr_embed.embedding.alignment import SHIPPED_RULES, Rules, clean
from ehr_embed.embedding.match_table import align, share_of_new
from ehr_embed.embedding.own_pairs import read_pairs
from ehr_embed.sources.meds import MedsSource
from tests.helpers.small_meds import Event, write_meds

WORDS = ("sodium", "potassium", "heart", "rate", "fever", "chills", "glasgow", "coma", "score", "motor", "zebra")


def embed(texts: list[str]) -> np.ndarray:
    """A bag of words, and a share that no two texts have in common."""
    found = np.zeros((len(texts), len(WORDS) + 97), np.float32)
    for row, text in enumerate(texts):
        for word in text.lower().split():
            found[row, WORDS.index(word) if word in WORDS else len(WORDS) + sum(map(ord, word)) % 97] += 1
    return found


def vocabulary(folder: Path, codes: dict[str, tuple[str, float | None]], *, values: str = "both") -> Vocabulary:
    """A vocabulary of codes with their text and the mean of their numbers, 20 events each of ten subjects."""
    rng = np.random.default_rng(0)
    splits: dict[str, list[Event]] = {"train": [], "tuning": [], "held_out": []}
    for split, first in (("train", 0), ("tuning", 100), ("held_out", 200)):
        for subject in range(first, first + 10):
            for n, (code, (_, mean)) in enumerate(codes.items()):
                number = [None if mean is None else float(x) for x in (rng.normal(mean or 0, abs(mean or 1) / 10, 2))]
                splits[split] += [(subject, float(n), code, number[0]), (subject, float(n), code, number[1])]
    rows = [(code, text, None) for code, (text, _) in codes.items()]
    source = MedsSource(root=str(write_meds(folder / "set", splits, codes=rows)))
    return build_store(folder / "store", source, VocabularySettings(values=values, n_bins=4, min_count=1)).vocabulary


RUN = {
    "NA": ("Sodium in serum (mEq/L)", 140.0),
    "HR": ("Heart rate (beats per minute)", 80.0),
    "GCS": ("Glasgow Coma Score (3-15)", 13.0),
    "FEVER": ("Fever", None),
    "SAME": ("Zebra", 1.0),
}
HERE = {
    "lab//1": ("Labs: Sodium [mmol/L], hourly", 0.14),
    "vital//2": ("Vital signs > HR", 82.0),
    "exam//3": ("Exam: GCS motor part", 5.0),
    "dx//4": ("Diagnosis: fever", None),
    "dx//5": ("Diagnosis: chills", None),
    "note//6": ("Heart rate", None),
    "SAME": ("Chills", 1.0),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Vocabulary, Vocabulary]:
    return vocabulary(tmp_path_factory.mktemp("run"), RUN), vocabulary(tmp_path_factory.mktemp("here"), HERE)


def matched(table: pl.DataFrame) -> dict[str, str | None]:
    rows = table.with_columns(pl.when(pl.col("gate") > 0).then("matched_code")).select("code", "matched_code")
    return dict(rows.iter_rows())


def test_each_code_goes_to_the_nearest_of_its_kind(two):
    found = align(*two, embed=embed, rules=Rules.read())
    assert matched(found.table) == {
        "lab//1": "NA", "vital//2": "HR", "exam//3": "GCS", "dx//4": "FEVER", "dx//5": None, "note//6": None, "SAME": "SAME",
    }  # fmt: skip
    row = {r["code"]: r for r in found.table.to_dicts()}
    assert row["lab//1"]["warning"].endswith("times as small")
    assert row["vital//2"]["warning"] == ""
    assert row["SAME"]["origin"] == "same code"
    assert row["lab//1"]["q10"] < row["lab//1"]["q50"] < row["lab//1"]["q90"] < 1 < row["lab//1"]["matched_q50"]
    assert found.table["share"].sum() == pytest.approx(1)
    assert found.matches["exam//3"][1] == pytest.approx((3 / 15**0.5 - 0.6) / 0.2, abs=1e-6)
    assert share_of_new(*two) == pytest.approx(6 / 7)


def test_own_pairs_override_texts_and_a_written_table_can_be_given_back(two, tmp_path):
    found = align(*two, embed=embed, rules=Rules.read())
    found.write(tmp_path / "alignment.csv")
    again = align(*two, embed=embed, rules=Rules.read(), pairs=read_pairs(str(tmp_path / "alignment.csv")))
    assert matched(again.table) == matched(found.table)
    mine = pl.DataFrame({"code": ["dx//5", "lab//1"], "matched_code": ["FEVER", ""]})
    mine.write_csv(tmp_path / "mine.csv")
    own = align(*two, embed=embed, rules=Rules.read(), pairs=read_pairs(str(tmp_path / "mine.csv")))
    assert matched(own.table) == matched(found.table) | {"dx//5": "FEVER", "lab//1": None}
    assert own.matches["dx//5"] == ("FEVER", 1.0)
    assert own.digest != found.digest
    assert set(own.table.filter(origin="pair")["code"]) == {"dx//5", "lab//1"}


def test_a_code_that_is_taken_is_no_other_ones_where_each_is_matched_once(two):
    run, here = two
    once = align(run, here, embed=embed, rules=Rules.read(), matching="one_to_one")
    found = matched(once.table)
    assert found["SAME"] == "SAME", "a code of one name is sure, whatever its text says"
    assert found["lab//1"], found["vital//2"] == ("NA", "HR")
    taken = [to for to in found.values() if to is not None]
    assert len(taken) == len(set(taken))
    kinds = {code: mean is None for code, (_, mean) in (RUN | HERE).items()}
    assert all(kinds[code] == kinds[to] for code, to in found.items() if to is not None)
    with pytest.raises(UserError, match=r"data\.alignment_matching 'one'"):
        AlignmentSettings(matching="one")


def test_shuffled_texts_leave_no_code_its_own(two):
    found = align(*two, embed=embed, rules=Rules.read(), texts="shuffled")
    true = matched(align(*two, embed=embed, rules=Rules.read()).table)
    for code, to in matched(found.table).items():
        assert to is None or to != true[code], code
    kinds = {code: mean is None for code, (_, mean) in (RUN | HERE).items()}
    assert all(kinds[code] == kinds[to] for code, (to, _) in found.matches.items()), (
        "numbers go to numbers in the control too"
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("code,matched_code\nlab//9,NA\n", r"names lab//9, .* this dataset .*did you mean lab//1"),
        ("code,matched_code\nlab//1,NAA\n", r"names NAA, .* the run .*did you mean NA"),
        ("code,matched_code\nlab//1,NA\nlab//1,HR\n", r"p\.csv: .*lab//1 .*twice"),
        ("code,to\nlab//1,NA\n", r"expected columns code,matched_code"),
        ("code,matched_code,gate\nlab//1,NA,7\n", "gate of lab//1 .*'7', .* 0 to 1"),
    ],
)
def test_pairs_that_cannot_be_meant_are_refused(two, tmp_path, text, match):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(UserError, match=match):
        align(*two, embed=embed, rules=Rules.read(), pairs=read_pairs(str(tmp_path / "p.csv")))


def test_files_that_cannot_be_read_are_refused_when_settings_are_made(tmp_path):
    with pytest.raises(UserError, match=r"data\.alignment_pairs=\S*none\.csv"):
        AlignmentSettings(pairs=str(tmp_path / "none.csv"))
    with pytest.raises(UserError, match=r"data\.alignment_rules=\S*none\.yaml"):
        AlignmentSettings(rules=str(tmp_path / "none.yaml"))
    for text, match in (
        ("cosines: [0.9, 0.8]\nremoved: []\nlevels: x\nwords: {}\n", r"0 <= first < second <= 1"),
        ("cosines: [0.6, 0.8]\nremoved: ['(']\nlevels: x\nwords: {}\n", r"Expected two cosines, regular expressions"),
        ("cosines: [0.6, 0.8]\nremove: []\nlevels: x\nwords: {}\n", r"unknown key .*'remove': did you mean 'removed'"),
        ("- 1\n", r"expected a mapping with cosines"),
    ):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(UserError, match=match):
            AlignmentSettings(rules=str(tmp_path / "r.yaml"))
    with pytest.raises(UserError, match=r"data\.alignment_texts 'shuffle': did you mean 'shuffled'"):
        AlignmentSettings(texts="shuffle")


def test_nothing_in_common_is_refused(two, tmp_path):
    other = vocabulary(tmp_path, {"Q1": ("Quux", 1.0), "Q2": ("Corge", None)})
    with pytest.raises(UserError, match=r"data\.alignment_pairs=FILE\.csv.*aligned_to=none"):
        align(two[0], other, embed=embed, rules=Rules.read())


def test_codes_of_the_run_that_say_the_same_take_the_same_events(tmp_path, two, caplog):
    twice = {
        **RUN,
        "APACHE": ("Worst value: Sodium [mEq/L]", 139.0),
        "WORDS": ("Sodium", None),
        "K": ("Potassium", 4.0),
    }
    run = vocabulary(tmp_path, twice)
    with caplog.at_level("INFO"):
        found = align(run, two[1], embed=embed, rules=Rules.read())
        found.say()
    assert found.matches["lab//1"][0] in ("NA", "APACHE")
    assert {frozenset(pair) for pair in found.twins.items()} == {frozenset(("NA", "APACHE"))}, (
        "of one kind, and of one text"
    )
    assert "APACHE" in caplog.text
    assert found.digest != align(two[0], two[1], embed=embed, rules=Rules.read()).digest
    assert align(run, two[1], embed=embed, rules=Rules.read(), matching="one_to_one").twins == {}


def test_one_text_with_numbers_on_one_side_alone_is_said(two, caplog):
    """A code whose numbers cannot agree with those of the run's has no match, and its loss is said."""
    table = align(*two, embed=embed, rules=Rules.read())
    assert table.table.filter(code="note//6").select("gate", "warning").row(0) == (0.0, "numbers there and none here")
    table.say()
    assert "numbers cannot agree" in caplog.text
    assert "data.alignment_pairs=FILE.csv" in caplog.text
    assert "Heart rate (numbers there and none here)" in caplog.text
    pairs = pl.DataFrame({"code": ["note//6"], "matched_code": ["HR"], "gate": [None]})
    table = align(*two, embed=embed, rules=Rules.read(), pairs=pairs).table.filter(code="note//6")
    assert table.select("gate", "warning").row(0) == (1.0, "numbers there and none here"), (
        "own pairs override kinds, with a warning"
    )


def test_a_number_without_a_match_is_no_warning(tmp_path, two, caplog):
    """Creatinine has no match at all, and no code of the run has its text, so that nothing is of another kind."""
    run = vocabulary(tmp_path / "run", {"NA": ("Sodium", 140.0)})
    here = vocabulary(tmp_path / "here", {"a": ("Sodium", 140.0), "b": ("Creatinine", 1.0)})
    pairs = pl.DataFrame(
        {"code": ["b"], "matched_code": [None], "gate": [None]}, schema_overrides={"matched_code": pl.String}
    )
    for how in ({"pairs": pairs}, {"matching": "one_to_one"}):
        found = align(run, here, embed=embed, rules=Rules.read(), **how)
        assert found.table.filter(code="b").select("matched_code", "warning").row(0) == (None, "")
        found.say()
    pairs = pl.DataFrame({"code": ["note//6"], "matched_code": ["HR"], "gate": [0.0]})
    align(*two, embed=embed, rules=Rules.read(), pairs=pairs).say()
    assert "of another kind" not in caplog.text, "nor does a pair without a match call for one"


def test_own_pairs_decide_about_twins(tmp_path):
    run = vocabulary(tmp_path / "run", {
        "NA": ("Sodium", 140.0), "APACHE": ("Worst value: Sodium", 139.0), "K": ("Potassium", 4.0),
    })  # fmt: skip
    how = {"embed": embed, "rules": Rules.read()}

    def given_back(found, change=lambda frame: frame):
        found.write(tmp_path / "alignment.csv")
        change(pl.read_csv(tmp_path / "alignment.csv")).write_csv(tmp_path / "alignment.csv")
        return align(run, one, pairs=read_pairs(str(tmp_path / "alignment.csv")), **how)

    one = vocabulary(tmp_path / "one", {"x": ("Sodium", 140.0), "y": ("Potassium", 4.0)})
    found = align(run, one, **how)
    lead, twin = found.matches["x"][0], next(iter(found.twins))
    assert found.twins == {twin: lead}
    assert {twin, lead} == {"NA", "APACHE"}
    assert given_back(found).twins == found.twins
    assert given_back(found, lambda t: t.with_columns(twins=pl.lit(None, pl.String))).twins == {}
    mine = given_back(found, lambda t: t.with_columns(twins=pl.when(code="y").then(pl.lit(f'["{twin}"]'))))
    assert mine.twins == {twin: "K"}
    for text, match in (
        ('["NAA"]', "names NAA, .* the run"),
        ("APACHE", r"twins of x are 'APACHE', expected a JSON list"),
    ):
        with pytest.raises(UserError, match=match):
            given_back(found, lambda t, text=text: t.with_columns(twins=pl.lit(text)))
    assert align(run, one, has_twins=False, **how).twins == {}

    two_of_them = vocabulary(tmp_path / "two", {"NA": ("Sodium", 140.0), "w": ("Worst value: Sodium", 139.0)})
    pairs = pl.DataFrame(
        {"code": ["w"], "matched_code": [None], "gate": [None]}, schema_overrides={"matched_code": pl.String}
    )
    assert align(run, two_of_them, pairs=pairs, **how).twins == {}
    same = vocabulary(tmp_path / "same", {"NA": ("Sodium", 140.0), "K": ("Potassium", 4.0)})
    assert align(run, same, **how).twins == {}, "it has the run's own code, and lacks the other"


def test_runs_of_earlier_versions_have_no_twins_unless_they_are_asked_for(tmp_path, monkeypatch, caplog):
    from contextlib import nullcontext

    from ehr_embed.embedding import aligning

    monkeypatch.setattr(aligning, "bundled", lambda _: nullcontext(embed))
    run = vocabulary(tmp_path / "run", {"NA": ("Sodium", 140.0), "APACHE": ("Worst value: Sodium", 139.0)})
    here = vocabulary(tmp_path / "here", {"x": ("Sodium", 140.0)})
    with caplog.at_level("INFO"):
        assert AlignmentSettings().alignment(run, here, has_twins=False).twins == {}
    assert "data.alignment_twins=true gives them events" in caplog.text
    assert len(AlignmentSettings(twins=True).alignment(run, here, has_twins=False).twins) == 1
    assert len(AlignmentSettings().alignment(run, here, has_twins=True).twins) == 1
    assert AlignmentSettings(twins=False).alignment(run, here, has_twins=True).twins == {}


def test_tokens_have_the_vectors_of_what_they_match_as_far_as_the_gate_says(two):
    run, here = two
    found = align(run, here, embed=embed, rules=Rules.read())
    theirs, own = (np.random.default_rng(n).normal(size=(len(v), 5)).astype(np.float32) for n, v in enumerate(two))
    import torch

    table = aligned_table(found, run, here, torch.from_numpy(theirs), torch.from_numpy(own)).numpy()
    codes, bins = here.token_codes, here.token_bins
    run_tokens = {
        (c, b): t for t, (c, b) in enumerate(zip(run.token_codes, run.token_bins.tolist(), strict=True)) if b == b
    }
    n_binned = 0
    for token in range(FIRST_TOKEN, len(here)):
        to, gate = found.matches.get(codes[token], (None, 0.0))
        if to is None:
            np.testing.assert_array_equal(table[token], own[token])
        elif bins[token] == bins[token]:
            same_bin = theirs[run_tokens[to, bins[token]]]
            np.testing.assert_allclose(table[token], gate * same_bin + (1 - gate) * own[token], rtol=1e-5)
            n_binned += 1
    assert n_binned >= 12
    none = aligned_table(found, run, here, torch.from_numpy(theirs), None).numpy()
    token = codes.index("dx//5")
    np.testing.assert_array_equal(none[token], theirs[UNKNOWN])
    assert found.keeps(here).tolist() == [code in found.matches for code in codes]


def test_vocabularies_of_earlier_versions_have_no_quantiles_and_align_all_the_same(two):
    old = [Vocabulary(v.settings, v.tokens, v.codes.drop("quantiles"), v.report) for v in two]
    found = align(*old, embed=embed, rules=Rules.read())
    assert found.matches == align(*two, embed=embed, rules=Rules.read()).matches
    assert found.table.filter(code="lab//1")["matched_q50"][0] == pytest.approx(140, rel=0.1)


def test_shipped_rules_bring_two_hospitals_words_together():
    rules = Rules.read(SHIPPED_RULES)
    for one, other in (
        ("Bicarbonate in serum (mmol/L)", "HCO3 [mmol/L], hourly"),
        ("Platelets (cells/nL)", "Platelet count [K/uL], hourly"),
        ("Fractional inspired oxygen (0-1)", "Respiratory charting: FiO2 (%)"),
        ("Blood urea nitrogen (mg/dL)", "Worst value of the first ICU day: BUN [mg/dL]"),
    ):
        assert clean(one, rules) == clean(other, rules), (one, other)
    assert clean("BP (diastolic)", rules) != clean("BP (systolic)", rules), "round brackets may say what is measured"
