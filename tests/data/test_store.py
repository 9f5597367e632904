"""The event store holds what the source holds, and is refused when it does not."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from ehr_embed.core.errors import UserError
from ehr_embed.data.store import STATIC_TIME, EventStore, build_store, check_fingerprint, store_folder
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.sources.meds import MedsSource
from tests.helpers.refusals import refused


def build(tiny, tmp_path, **settings) -> tuple[MedsSource, EventStore]:
    source = MedsSource(root=str(tiny))
    return source, build_store(tmp_path / "store", source, VocabularySettings(min_count=1, **settings))


def test_events_come_back_subject_by_subject(tiny, tmp_path):
    _, store = build(tiny, tmp_path)
    events = store.split("tuning")
    assert events.subject_ids.tolist() == [20, 21, 22]
    assert events.offsets.tolist() == [0, 5, 10, 15]
    strings = store.vocabulary.tokens["str"].to_list()
    first = [strings[token] for token in events.token_ids[:5]]
    assert first == ["SEX//M", "A//bin_1_of_4", "B", "A//bin_2_of_4", "C"]
    assert events.times[0] == STATIC_TIME
    days = (events.times[1:5] - events.times[1]) / 86_400_000_000
    assert days.tolist() == [0.0, 1.0, 1.0, 2.5]
    assert events.values is None


def test_counts_are_those_of_train(tiny, tmp_path):
    _, store = build(tiny, tmp_path, values="none")
    counts = dict(store.vocabulary.tokens.select("str", "count").iter_rows())
    assert counts == {"<padding>": 0, "<unknown>": 0, "A": 6, "B": 3, "C": 3, "SEX//M": 2, "SEX//F": 1}
    assert pl.read_csv(store.folder / "vocab.csv").columns == ["token", "str", "text", "count"]


def test_values_are_carried_beside_tokens(tiny, tmp_path):
    _, store = build(tiny, tmp_path, values="continuous")
    values = store.split("train").values
    assert values is not None
    assert np.isnan(values[[0, 2, 4]]).all()
    assert np.isfinite(values[[1, 3]]).all()


def test_other_data_are_refused(tiny, tmp_path):
    source, store = build(tiny, tmp_path)
    check_fingerprint(store, source)
    shard = tiny / "data" / "train" / "0.parquet"
    pl.read_parquet(shard).with_columns(pl.col("numeric_value") + 1).write_parquet(shard)
    with refused("other data", "data/train/0.parquet"):
        check_fingerprint(store, MedsSource(root=str(tiny)))


def test_a_file_that_changes_under_an_open_store_is_named(tiny, tmp_path):
    _, store = build(tiny, tmp_path)
    file = store.folder / "train" / "token_ids.bin"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"token_ids.bin: 56 bytes, expected 60"):
        store.split("train")


def test_an_interrupted_build_leaves_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("ehr_embed.data.store._SplitWriter.finish", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(tiny, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_settings_choose_the_folder(tiny, tmp_path):
    source = MedsSource(root=str(tiny))
    folders = {store_folder(tmp_path, source, VocabularySettings(n_bins=n)).name for n in (5, 10)}
    assert len(folders) == 2
    assert all(name.startswith("tiny-") for name in folders)


def test_a_missing_split_is_named(tiny, tmp_path):
    (tiny / "data" / "held_out" / "0.parquet").unlink()
    _, store = build(tiny, tmp_path)
    with refused("split held_out", "no events"):
        store.split("held_out")
