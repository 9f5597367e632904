"""The original's pickled token lists: read, cut off, labelled, put into words, and trained on."""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meds import CodeMetadataSchema, DataSchema, LabelSchema

from ehr_embed import convert
from ehr_embed.config.instantiate import instantiate
from ehr_embed.core.errors import UserError
from ehr_embed.experiment.run import run
from ehr_embed.sources.case_labels import read_case_labels
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.tokenized import Corpus
from tests.helpers.configs import composed
from tests.helpers.corpora import START, TOKENS, record, write_corpus
from tests.helpers.pickles import Call

TINY = (
    "model=encoder_small", "model.n_layers=1", "model.model_dim=16", "model.max_length=16", "embedder=hashing", "trainer=short",
    "trainer.epochs=1", "trainer.n_bootstrap=0", "trainer.precision=32-true", "trainer.accelerator=cpu",
)  # fmt: skip


def overrides(root: Path, *more: str) -> list[str]:
    lookups = [f"data.{name}_lookup_filepath={root}/{name}.csv" for name in ("medical", "lab", "region")]
    files = [
        f"data.data_dir={root}",
        f"data.vocab_filepath={root}/vocab.csv",
        f"data.labels_filepath={root}/labels.csv",
    ]
    return ["data=tokenized", f"cache_dir={root.parent}/cache", *files, *lookups, *more]


def opened(root: Path, *more: str) -> MedsSource:
    return instantiate(composed(*overrides(root, *more), name="embed").data.source)


def events_of(source: MedsSource) -> dict[int, list[tuple[Any, ...]]]:
    """subject -> (day or None, code), in reading order."""
    frame = pl.concat([source.read(shard) for shard in source.shards])
    start = START.replace(tzinfo=None)
    found: dict[int, list[tuple[Any, ...]]] = {}
    for subject, time, code in frame.select("subject_id", "time", "code").iter_rows():
        found.setdefault(subject, []).append((None if time is None else (time - start) / timedelta(days=1), code))
    return found


def labels_of(source: MedsSource, name: str) -> dict[int, tuple[Any, ...]]:
    frame = pl.read_parquet(source.labels_dir / name / "0.parquet")
    return {row[0]: row[1:] for row in frame.iter_rows()}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Cases 1, 3, 5 (diagnosed on day 90, site breast or lung), controls 2, 4, 6, unlabelled 7; two shards in train."""
    timed = [("MEDICAL//asthma", 0.0), ("LAB//CRP", 10.0), ("5.5", 10.0), ("MEDICAL//copd", 59.0), ("Q3", 80.0)]
    splits = {
        "train": [[record(1, timed), record(2, timed)], [record(7, timed)]],
        "tuning": [[record(3, timed), record(4, timed)]],
        "held_out": [[record(5, timed), record(6, timed)]],
    }
    date = (START + timedelta(days=90)).date()  # 2010-04-01; a month before is day 59, 1 March
    labels = [(s, 1, "breast" if s < 5 else "lung", date) for s in (1, 3, 5)] + [(s, 0, "", "") for s in (2, 4, 6, 99)]
    return write_corpus(tmp_path / "corpus", splits, labels)


@pytest.fixture
def converted(monkeypatch) -> Callable[..., None]:
    """`python -m ehr_embed.convert` in this process."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # Hydra raises, as under the command line's own error handling

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["convert", *arguments])
        try:
            convert.main()
        finally:
            logging.getLogger().handlers.clear()
            GlobalHydra.instance().clear()

    return call


def test_events_keep_their_order_and_their_split(corpus):
    source = opened(corpus)
    assert source.name == "corpus"
    static = [(None, "<start>"), (None, "AGE: 45")]
    timed = [
        (0.0, "MEDICAL//asthma"),
        (10.0, "LAB//CRP"),
        (10.0, "5.5"),
        (59.0, "MEDICAL//copd"),
        (80.0, "Q3"),
        (80.0, "<end>"),
    ]
    assert events_of(source) == dict.fromkeys(range(1, 8), static + timed)
    splits = pl.concat([source.read(shard) for shard in source.shards]).select("subject_id", "split").unique()
    assert dict(splits.iter_rows()) == {
        **dict.fromkeys((1, 2, 7), "train"), **dict.fromkeys((3, 4), "tuning"), **dict.fromkeys((5, 6), "held_out"),
    }  # fmt: skip


def test_the_cut_off_is_by_calendar_months_and_spares_static_events_and_the_end_mark(corpus):
    events = events_of(opened(corpus, "data.cutoff_months=1"))
    # Day 59 is the boundary itself, one month before the diagnosis: cut, as in the original.
    assert events[1] == [
        (None, "<start>"), (None, "AGE: 45"), (0.0, "MEDICAL//asthma"), (10.0, "LAB//CRP"), (10.0, "5.5"), (10.0, "<end>"),
    ]  # fmt: skip
    assert len(events[2]) == len(events[7]) == 8
    only_static = events_of(opened(corpus, "data.cutoff_months=4"))[1]
    assert only_static == [(None, "<start>"), (None, "AGE: 45"), (None, "<end>")]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    timed=st.lists(st.tuples(st.sampled_from(["Q3", "5.5", "LAB//CRP"]), st.floats(0.1, 200)), max_size=12),
    diagnosed=st.none() | st.integers(0, 200),
    months=st.none() | st.integers(1, 4),
)
def test_the_cut_off_agrees_with_the_rule_of_the_original(tmp_path, timed, diagnosed, months):
    """The original's rule, written with the library it used: keep what is static, earlier, or the end mark."""
    timed = sorted(timed, key=lambda event: event[1])
    date = None if diagnosed is None else (START + timedelta(days=diagnosed)).date()
    labels = tmp_path / "labels.csv"
    labels.write_text(f"subject_id,is_case,cancerdate\n1,1,{date or ''}\n")
    shard = tmp_path / "0.pkl"
    original = record(1, timed)
    shard.write_bytes(pickle.dumps([original]))
    expected = []
    for token, seconds in zip(original["tokens"], original["timestamps"], strict=True):
        cut = None if date is None or months is None else pd.Timestamp(date) - pd.DateOffset(months=months)
        if seconds == 0 or cut is None or seconds < cut.timestamp() or TOKENS[token] == "<end>":
            expected.append(TOKENS[token])
    corpus = Corpus(dict(enumerate(TOKENS)), read_case_labels(str(labels)), months)
    events = corpus.events(shard)
    assert events["code"].to_list() == expected
    last = corpus.last_times()["last_time"][0]
    assert events["time"].max() == last, "the end mark tells nothing of what was cut"


def test_events_out_of_order_are_put_in_order_and_said(corpus, caplog):
    shuffled = record(1, [("Q3", 5.0), ("5.5", 1.0), ("LAB//CRP", 1.0)]) | {"timestamps": None}
    times = [
        0,
        (START + timedelta(days=5)).timestamp(),
        *[(START + timedelta(days=1)).timestamp()] * 2,
        0,
        START.timestamp() + 9e5,
    ]
    (corpus / "train" / "0.pkl").write_bytes(pickle.dumps([shuffled | {"timestamps": times}]))
    # AGE, second in the list, has day 5; LAB, fifth, is static.
    assert [code for _, code in events_of(opened(corpus))[1]] == [
        "<start>",
        "LAB//CRP",
        "Q3",
        "5.5",
        "AGE: 45",
        "<end>",
    ]
    assert any("were not in order of time" in message for message in caplog.messages)


def test_labels_are_those_of_the_original_at_the_last_event(corpus):
    source = opened(corpus)
    last = START.replace(tzinfo=None) + timedelta(days=80)
    cases = labels_of(source, "is_case")
    assert {subject: row[1] for subject, row in cases.items()} == {
        1: True,
        2: False,
        3: True,
        4: False,
        5: True,
        6: False,
    }
    assert {row[0] for row in cases.values()} == {last}
    sites = {1: "breast", 2: "Control", 3: "breast", 4: "Control", 5: "lung", 6: "Control"}
    assert {subject: row[1] for subject, row in labels_of(source, "site").items()} == sites
    cut = labels_of(opened(corpus, "data.cutoff_months=1"), "is_case")
    assert cut[1][0] == last - timedelta(days=70), "the time of the last event that is left"
    assert cut[2][0] == last


def test_the_import_is_valid_meds(corpus):
    source = opened(corpus)
    for shard in source.shards:
        DataSchema.validate(pq.read_table(shard))
    CodeMetadataSchema.validate(pq.read_table(source.root / "metadata" / "codes.parquet"))
    for name in ("is_case", "site"):
        LabelSchema.validate(pq.read_table(source.labels_dir / name / "0.parquet"))


def test_token_strings_become_text_by_their_prefix(corpus, tmp_path):
    texts = dict(opened(corpus).code_metadata().select("code", "description").iter_rows())
    assert texts == {
        "<start>": "Start of the record", "<end>": "End of the record", "<unknown>": "Unknown event", "GENDER//F": "Gender F",
        "GENDER//M": "Gender M", "AGE: 45": "Age 45", "REGION//1": "Region North East", "MEDICAL//asthma": "Asthma",
        "MEDICAL//copd": None, "LAB//CRP": "C-reactive protein", "5.5": "Value 5.5", "Q3": "Value in quantile 3",
        "very high": "Value very high", "<time_interval_1d-2d>": "Time passed: 1d-2d", "DIAG_I10": "Hypertension",
        "MED_aspirin": "Medication: aspirin", "PROC_K5": None, "LAB_NA": "Sodium", "MEASUREMENT//bp": "Blood pressure",
        "LIFESTYLE//smoker": "Lifestyle smoker", "ETHNICITY//WHITE": "Ethnicity White", "DRUG//x": None,
    }  # fmt: skip
    mine = tmp_path / "mine.yaml"
    mine.write_text('"DRUG//": {text: "Drug {}"}\n"LAB//": {text: "Test: {}", lookup: lab}\n')
    root = f"data.root={tmp_path / 'mine'}"
    changed = dict(
        opened(corpus, f"data.prefix_file={mine}", root).code_metadata().select("code", "description").iter_rows()
    )
    assert {code for code in texts if changed[code] != texts[code]} == {"DRUG//x", "LAB//CRP"}
    assert (changed["DRUG//x"], changed["LAB//CRP"]) == ("Drug x", "Test: C-reactive protein")


def test_it_trains_as_its_conversion_does(corpus, tmp_path, converted, capsys):
    for split in ("train", "tuning", "held_out"):
        records = [record(100 * len(split) + i, [("MEDICAL//asthma", 1.0), ("Q3", 2.0)]) for i in range(8)]
        (corpus / split / "more.pkl").write_bytes(pickle.dumps(records))
        with open(corpus / "labels.csv", "a") as file:
            file.writelines(f"{r['subject_id']},{i % 2},{'lung' if i % 2 else ''},\n" for i, r in enumerate(records))
    run(composed(*overrides(corpus, *TINY), "task.labels=is_case", f"run_dir={tmp_path}/pickles"))
    out = tmp_path / "meds"
    converted(*overrides(corpus), f"data.root={out}")
    assert f"MEDS dataset {out} (7 shards, label sets: is_case, site)" in capsys.readouterr().out
    meds = ("data=meds", f"data.root={out}", f"cache_dir={tmp_path}/other", "data.values=none", "task.labels=is_case")
    run(composed(*meds, *TINY, f"run_dir={tmp_path}/meds_run"))
    pickles, converted = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("pickles", "meds_run")
    )
    assert pickles["held_out"] == converted["held_out"]
    assert pickles["held_out"]["n"] == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=meds", "data.root=x"], r"Type: python -m ehr_embed\.convert data=tokenized"),
        (["data=tokenized", "data.data_dir=x"], r"Type: data\.root=OUT"),
    ],
)
def test_a_conversion_of_nothing_or_to_nowhere_is_refused(converted, arguments, message):
    with pytest.raises(UserError, match=message):
        converted(*arguments)


def test_changed_files_are_refused_until_imported_again(corpus):
    opened(corpus)
    with open(corpus / "lab.csv", "a") as file:
        file.write("K,Potassium\n")
    with pytest.raises(UserError, match=r"lab_lookup_filepath was \w+, now \w+.*overwrite=true"):
        opened(corpus)
    opened(corpus, "overwrite=true")
    opened(corpus)


BAD_RECORDS = {
    "no list": ({"subject_id": 1}, r"0\.pkl: .*list of records"),
    "missing key": (
        [{"subject_id": 1, "tokens": [1]}],
        r"0\.pkl, record 0: .*timestamps, found subject_id",
    ),
    "unknown token": (
        [{"subject_id": 1, "tokens": [0, 77], "timestamps": [0, 1]}],
        r"0\.pkl: subject 1 .*token 77",
    ),
    "lengths": (
        [{"subject_id": 1, "tokens": [0, 1], "timestamps": [0]}],
        r"0\.pkl, subject 1: 2 tokens and 1 timestamps",
    ),
    "no number": (
        [{"subject_id": "x", "tokens": [0], "timestamps": [0]}],
        r"0\.pkl, record 0: subject_id, tokens or timest",
    ),
    "float tokens": (
        [{"subject_id": 1, "tokens": [0.5], "timestamps": [0]}],
        r"0\.pkl, subject 1: .*integer tokens",
    ),
    "nan": ([{"subject_id": 1, "tokens": [0], "timestamps": [float("nan")]}], r"subject 1: .*1 of them NaN"),
    "two splits": ([record(3, [("Q3", 1.0)])], r"subject 3 .*train.*tuning"),
    "code": ([Call(os.system, "touch pwned")], r"0\.pkl: .*posix\.system.*write the file again as plain data"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_shard_is_named_and_nothing_is_left(corpus, name):
    content, message = BAD_RECORDS[name]
    (corpus / "train" / "0.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message):
        opened(corpus)
    assert not list((corpus.parent / "cache" / "imported").glob("corpus-*"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.data_dir=nowhere", r"nowhere/train: .*\{train,tuning,held_out\}/\*\.pkl"),
        ("data.data_dir=null", r"data\.data_dir .*Type: "),
        ("data.vocab_filepath=nowhere.csv", r"data\.vocab_filepath: .*nowhere\.csv"),
        ("data.vocab_filepath=CORPUS/lab.csv", r"lab\.csv: .*token,str, found code, term"),
        ("data.labels_filepath=null", r"data\.labels_filepath\b"),
        ("data.labels_filepath=CORPUS/lab.csv", r"lab\.csv: column `subject_id` is missing"),
        ("data.lab_lookup_filepath=CORPUS/vocab.csv", r"vocab\.csv: .*code,term, found token, str"),
        ("data.region_lookup_filepath=nowhere.csv", r"data\.region_lookup_filepath: .*nowhere\.csv"),
        ("data.cutoff_months=0", r"cutoff_months=0: expected 1 or more"),
        ("data.prefix_file=nowhere.yaml", r"data\.prefix_file: .*nowhere\.yaml"),
        ("data.prefix_file=CORPUS/bad.yaml", "prefix 'X' 'txt'"),
        ("data.root=CORPUS", r"Type: data\.root=ANOTHER_FOLDER"),
    ],
)
def test_a_mistake_in_the_configuration_is_explained(corpus, override, message):
    (corpus / "bad.yaml").write_text('"X": {text: "{}", txt: "{}"}\n')
    with pytest.raises(UserError, match=message):
        opened(corpus, override.replace("CORPUS", str(corpus)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("8,2,,", r"labels\.csv, row 7: is_case is '2', expected 0 or 1"),
        ("8,1,lung,31/03/2015", "row 7: cancerdate .*'31/03/2015', .*2015-03-31"),
        ("1,1,lung,", "row 0: subject_id .*'1', .*one row"),
        ("x,1,lung,", "row 7: subject_id .*'x', .*integer"),
    ],
)
def test_a_bad_label_is_named_by_its_row(corpus, row, message):
    with open(corpus / "labels.csv", "a") as file:
        file.write(f"{row}\n")
    with pytest.raises(UserError, match=message):
        opened(corpus)
