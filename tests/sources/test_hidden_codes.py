"""Codes that train never sees: left out of train alone, described by metadata, and fitted on nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ehr_embed.core.errors import UserError
from ehr_embed.data.vocabulary import UNKNOWN, VocabularySettings, fit_vocabulary
from ehr_embed.embedders.hashing import HashingEmbedder
from ehr_embed.embedding.prepare import prepare
from ehr_embed.sources.hidden_codes import HiddenCodes, is_hidden
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.protocol import SPLITS
from tests.helpers.renamed_cohort import events_of, fitted
from tests.helpers.small_meds import write_meds

SPLIT_SHIFT = {split: 100.0 * number for number, split in enumerate(SPLITS)}


def write_codes(root: Path) -> Path:
    """40 described codes, each with values that depend on the split, two events a subject and code."""
    splits = {
        split: [
            (1000 * n + s, float(k), f"L{k}", SPLIT_SHIFT[split] + s) for s in range(6) for k in range(40) for _ in "ab"
        ]
        for n, split in enumerate(SPLITS)
    }
    codes = [(f"L{k}", f"Laboratory test {k}", None) for k in range(40)]
    return write_meds(root, splits, codes=codes)


def test_hidden_codes_leave_train_alone_and_nothing_is_fitted_elsewhere(tmp_path):
    inner = MedsSource(root=str(write_codes(tmp_path / "set")))
    source = HiddenCodes(inner, share=0.3, seed=1)
    hidden = {f"L{k}" for k in range(40) if is_hidden(f"L{k}", 0.3, 1)}
    assert 0 < len(hidden) < 40
    assert hidden != {f"L{k}" for k in range(40) if is_hidden(f"L{k}", 0.3, 2)}
    before, after = events_of(inner), events_of(source)
    for split in ("tuning", "held_out"):
        assert before.filter(split=split).equals(after.filter(split=split))
    train = after.filter(split="train")
    assert set(train["code"]) == {f"L{k}" for k in range(40)} - hidden
    assert train.equals(before.filter((pl.col("split") == "train") & ~pl.col("code").is_in(list(hidden))))

    vocabulary = fitted(source, values="both", describe_unseen=True)
    by_code = {row["code"]: row for row in vocabulary.codes.to_dicts()}
    for code in hidden:
        assert by_code[code]["bin_token"] == -1, "no bins: nothing was fitted"
        assert vocabulary.texts[by_code[code]["plain_token"]] == f"Laboratory test {code[1:]}"
    assert max(by_code[code]["loc"] for code in by_code if code not in hidden) < 100, "train's values alone"
    tokens, values = vocabulary.encode(pl.Series(sorted(hidden)), pl.Series([200.0] * len(hidden)))
    assert (tokens != UNKNOWN).all()
    assert np.isnan(values).all(), "a number without a scale is left out"
    decoded = vocabulary.decode(tokens.astype(np.int64), values)
    assert decoded["code"].to_list() == sorted(hidden)
    assert decoded["numeric_value"].null_count() == len(hidden)
    unknown, _ = fitted(source).encode(pl.Series(sorted(hidden)), pl.Series([200.0] * len(hidden)))
    assert (unknown == UNKNOWN).all(), "as long as describe_unseen is off"
    assert fitted(inner, describe_unseen=True).tokens.equals(fitted(inner).tokens), "train has all"
    with pytest.raises(UserError, match=r"data\.hidden_codes=1\.5: .*Type: data\.hidden_codes=0"):
        HiddenCodes(inner, share=1.5)


def test_a_described_code_that_is_also_a_parent_has_one_token(tmp_path):
    splits = {split: [(n, 0.0, "A", None), (n, 1.0, "B", None)] for n, split in enumerate(SPLITS)}
    splits["held_out"] += [(2, 2.0, "P", None), (2, 3.0, "Q", None)]
    codes = [("A", "Cough", None), ("B", "Rare cough", ["P"]), ("P", "Coughs", None), ("Q", None, ["P"])]
    root = write_meds(tmp_path / "set", splits, codes=codes)
    vocabulary = fit_vocabulary(MedsSource(root=str(root)), VocabularySettings(min_count=2, describe_unseen=True))
    assert len(set(vocabulary.strings)) == len(vocabulary)
    tokens, _ = vocabulary.encode(pl.Series(["B", "P", "Q"]), pl.Series([None] * 3, dtype=pl.Float32))
    assert set(tokens) == {vocabulary.strings.index("P")}


def test_hidden_codes_never_reach_the_store_of_train(tmp_path):
    inner = MedsSource(root=str(write_codes(tmp_path / "set")))
    settings = VocabularySettings(describe_unseen=True)
    store, whole = (
        prepare(source, settings, HashingEmbedder(), cache_dir=tmp_path / "cache").store
        for source in (HiddenCodes(inner, share=0.3), inner)
    )
    assert store.folder != whole.folder
    codes = [name.split("//")[0] for name in store.vocabulary.strings]
    tokens = [token for token, code in enumerate(codes) if code.startswith("L") and is_hidden(code, 0.3, 0)]
    assert tokens
    assert not np.isin(store.split("train").token_ids, tokens).any()
    assert np.isin(store.split("held_out").token_ids, tokens).any()
    assert store.manifest["splits"]["held_out"]["n_unknown"] == 0


def test_what_meds_itself_names_is_never_hidden():
    assert not any(is_hidden(code, 0.99, seed) for code in ("MEDS_BIRTH", "MEDS_DEATH") for seed in range(50))
    assert is_hidden("LAB//1", 0.99, 0)
