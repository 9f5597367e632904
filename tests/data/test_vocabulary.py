"""Tokens, bins, folding, and that nothing is fitted outside train."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehr_embed.core.errors import UserError
from ehr_embed.data import code_statistics as statistics
from ehr_embed.data.value_bins import bin_edges, robust_scale
from ehr_embed.data.vocabulary import UNKNOWN, Vocabulary, VocabularySettings, fit_vocabulary
from ehr_embed.sources.code_texts import coverage, read_lookups, resolve_texts
from ehr_embed.sources.meds import MedsSource
from tests.helpers.small_meds import write_meds

OTHER = {"tuning": [(2, 0.0, "A", 1.0)], "held_out": [(3, 0.0, "A", 1.0)]}


def fit(tmp_path, train, *, others=OTHER, codes=(), name="set", **settings) -> Vocabulary:
    root = write_meds(tmp_path / name, {"train": train, **others}, codes=codes)
    return fit_vocabulary(MedsSource(root=str(root)), VocabularySettings(**settings))


def encode(vocabulary: Vocabulary, *events: tuple[str, float | None]) -> list[str]:
    codes = pl.Series([code for code, _ in events], dtype=pl.String)
    tokens, _ = vocabulary.encode(codes, pl.Series([value for _, value in events], dtype=pl.Float32))
    return [vocabulary.tokens["str"][int(token)] for token in tokens]


def test_quantile_bins_enter_token_and_text(tmp_path):
    train = [(1, float(i), "HR", float(i)) for i in range(100)]
    vocabulary = fit(tmp_path, train, codes=[("HR", "Heart rate, beats per minute", None)])
    assert "Heart rate, beats per minute: high (8th of 10)" in vocabulary.texts
    assert encode(vocabulary, ("HR", 75.0)) == ["HR//bin_8_of_10"]
    assert encode(vocabulary, ("HR", -5.0), ("HR", 1e9), ("HR", None)) == ["HR//bin_1_of_10", "HR//bin_10_of_10", "HR"]


def test_nothing_is_fitted_on_tuning_or_held_out(tmp_path):
    train = [(1, float(i), "HR", float(i)) for i in range(50)]
    wild = {
        "tuning": [(2, float(i), "HR", 1e6 * i) for i in range(500)],
        "held_out": [(3, 0.0, "NEW", 5.0), (3, 1.0, "HR", -1e9)],
    }
    calm = fit(tmp_path, train, name="calm", values="both")
    shaken = fit(tmp_path, train, others=wild, name="wild", values="both")
    assert calm.tokens.equals(shaken.tokens)
    assert calm.codes.equals(shaken.codes)
    assert calm.report == shaken.report
    assert encode(shaken, ("NEW", 5.0)) == ["<unknown>"]


def test_rare_codes_fold_into_their_parent_or_keep_their_text(tmp_path):
    train = [(1, float(i), "COMMON", None) for i in range(9)] + [(1, 9.0, "CHILD", 3.0), (1, 10.0, "ORPHAN", 4.0)]
    codes = [("CHILD", "Rare fever", ["FEVER"]), ("FEVER", "Fever of any kind", None), ("UNSEEN", None, ["FEVER"])]
    vocabulary = fit(tmp_path, train, codes=codes, min_count=3)
    assert encode(vocabulary, ("CHILD", 3.0), ("ORPHAN", 4.0), ("UNSEEN", None)) == ["FEVER", "ORPHAN", "FEVER"]
    assert vocabulary.report["rare_codes_folded_into_parent"] == 1
    assert vocabulary.report["rare_codes_kept_as_plain_text"] == 1
    assert "Fever of any kind" in vocabulary.texts


@pytest.mark.parametrize(
    ("mode", "token", "has_value"),
    [
        ("bins", "HR//bin_10_of_10", False),
        ("both", "HR//bin_10_of_10", True),
        ("continuous", "HR", True),
        ("none", "HR", False),
    ],
)
def test_value_modes(tmp_path, mode, token, has_value):
    train = [(1, float(i), "HR", float(i)) for i in range(100)]
    vocabulary = fit(tmp_path, train, values=mode)
    assert encode(vocabulary, ("HR", 99.0)) == [token]
    _, values = vocabulary.encode(pl.Series(["HR", "HR"]), pl.Series([99.0, None], dtype=pl.Float32))
    assert np.isnan(values[1])
    assert np.isfinite(values[0]) == has_value
    if has_value:
        assert values[0] == pytest.approx((99 - 49.5) / (49.5 / 1.349), rel=1e-3)


def test_unknown_code_and_save_load(tmp_path):
    vocabulary = fit(tmp_path, [(1, float(i), 'odd "code", ü\n', float(i)) for i in range(20)], values="both")
    assert encode(vocabulary, ("never", None)) == ["<unknown>"]
    vocabulary.save(tmp_path)
    loaded = Vocabulary.load(tmp_path)
    assert loaded.tokens.equals(vocabulary.tokens)
    assert loaded.codes.equals(vocabulary.codes)
    assert loaded.settings == vocabulary.settings
    assert vocabulary.tokens.columns == ["token", "str", "text", "count"]
    assert vocabulary.tokens["token"][UNKNOWN] == UNKNOWN


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60), st.integers(2, 12))
def test_every_bin_is_used_and_order_is_kept(values, n_bins):
    array = np.array(values, dtype=np.float32)
    edges = bin_edges(array, n_bins)
    assert len(edges) <= n_bins - 1
    assert (np.diff(edges) > 0).all()
    bins = (edges <= array[:, None]).sum(1)
    assert set(bins) == set(range(len(edges) + 1))
    assert (len(np.unique(array)) > 1) == (len(edges) > 0)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60))
def test_the_scale_is_numpys(values):
    array = np.array(values, dtype=np.float32)
    low, median, high = np.quantile(array.astype(np.float64), [0.25, 0.5, 0.75])
    assert robust_scale(array) == (median, (high - low) / 1.349 or array.astype(np.float64).std() or 1.0)


class Shards:
    """Train events in shards, as a source reads them."""

    def __init__(self, frames: list[pl.DataFrame]) -> None:
        self.frames, self.shards = frames, range(len(frames))

    def read(self, shard: int) -> pl.DataFrame:
        return self.frames[shard].with_columns(split=pl.lit("train"))


@pytest.mark.parametrize("values_in_memory", [10, 1900, 10**9])
def test_a_code_is_summed_up_by_its_lowest_priorities(tmp_path, monkeypatch, values_in_memory):
    """However many numbers lie in files: those of a code that had too many are a sample over all shards."""
    monkeypatch.setattr(statistics, "MAX_VALUES_PER_CODE", 50)
    monkeypatch.setattr(statistics, "SPARE", 10 * 50**0.5)
    monkeypatch.setattr(statistics, "VALUES_IN_MEMORY", values_in_memory)
    rng = np.random.default_rng(1)
    frames = [
        pl.DataFrame({"code": pl.Series(rng.integers(0, 4 + i, 100)).cast(pl.String), "numeric_value": rng.random(100)})
        for i in range(40)
    ]
    frames = [x.with_columns(pl.when(pl.col("code") != "3").then("numeric_value").cast(pl.Float32)) for x in frames]
    counts, found = statistics.code_statistics(Shards(frames), list, scratch=tmp_path / "new", seed=7)

    every = pl.concat(
        x.drop_nulls().with_columns(priority=np.random.default_rng([7, i]).random(x["numeric_value"].count()))
        for i, x in enumerate(frames)
    )
    assert dict(counts.iter_rows()) == dict(pl.concat(frames)["code"].value_counts().iter_rows())
    assert counts["count"].is_sorted(descending=True)
    assert set(found) == set(every["code"])
    assert max(map(len, found.values())) == 50 < every["code"].value_counts()["count"].max()
    for code, values in found.items():
        group = every.filter(code=code)
        lowest = group.filter(pl.col("priority").rank() <= 50)
        assert values == lowest["numeric_value"].to_list()
    assert not list(tmp_path.rglob("*")) or list(tmp_path.rglob("*")) == [tmp_path / "new"], "files have no name"


def test_a_folder_that_takes_no_files_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "VALUES_IN_MEMORY", 1)
    frames = [pl.DataFrame({"code": ["A"] * 3, "numeric_value": pl.Series([1.0, 2.0, 3.0], dtype=pl.Float32)})]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file"):
        statistics.code_statistics(Shards(frames), list, scratch=tmp_path / "file", seed=0)


def test_settings_are_checked():
    with pytest.raises(UserError, match=r"unknown data\.values 'bin'.*did you mean 'bins'"):
        VocabularySettings(values="bin")
    with pytest.raises(UserError, match="n_bins=1"):
        VocabularySettings(n_bins=1)


def test_text_steps_and_coverage(tmp_path):
    lookup = tmp_path / "lookup.csv"
    lookup.write_text("code,term\nA,from lookup\n")
    schema = {"code": pl.String, "description": pl.String, "parent_codes": pl.List(pl.String)}
    rows = [("A", "from codes", None), ("B", "one", None), ("B", "two", None), ("C", None, ["B"]), ("D", " ", ["Z"])]
    metadata = pl.DataFrame(rows, schema=schema, orient="row")
    texts = resolve_texts(pl.Series(["A", "B", "C", "D"]), metadata, read_lookups([str(lookup)]))
    assert texts["text"].to_list() == ["from lookup", "one; two", "one; two", "D"]
    assert texts["step"].to_list() == ["lookup", "description", "parent", "readable"]
    shares = coverage(texts, pl.DataFrame({"code": ["A", "B", "C", "D"], "count": [1, 1, 1, 97]}))
    assert shares["codes"]["readable"] == 0.25
    assert shares["events"]["readable"] == 0.97


def test_bad_lookups_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv"):
        read_lookups([str(tmp_path / "none.csv")])
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"bad\.csv: .*code,term, found a, b"):
        read_lookups([str(tmp_path / "bad.csv")])
