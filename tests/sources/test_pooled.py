import logging

import polars as pl
import pytest

from ehr_embed.core.errors import UserError
from ehr_embed.data.labels import read_labels
from ehr_embed.sources.pooled import PooledSource
from ehr_embed.sources.protocol import SPLITS
from tests.helpers.small_meds import write_labels, write_meds


def hospital(root, code: str, text: str, *, first: int = 1, labels: str = "case"):
    splits = {s: [(first + n, 0.0, code, 1.5), (first + n, 1.0, "MEDS_DEATH", None)] for n, s in enumerate(SPLITS)}
    rows = [(first + n, 0.5, bool(n % 2)) for n in range(3)]
    return write_meds(root, splits, codes=[(code, text, ["P"]), ("P", "Parent", None)], labels={labels: rows})


@pytest.fixture
def two(tmp_path):
    return [
        str(hospital(tmp_path / name / "meds", "HR", text)) for name, text in (("a", "Heart rate"), ("b", "Hematocrit"))
    ]


def source(tmp_path, roots, **keys) -> PooledSource:
    return PooledSource(roots=roots, cache_dir=str(tmp_path / "cache"), **keys)


def test_ids_codes_and_labels_of_two_datasets_stay_apart(tmp_path, two, caplog):
    with caplog.at_level(logging.WARNING):
        pool = source(tmp_path, two)
    assert "1 codes have one name and different texts" in caplog.text
    assert "'Heart rate' in meds, 'Hematocrit' in meds-2" in caplog.text
    events = pl.concat([pool.read(shard) for shard in pool.shards])
    assert sorted(events["subject_id"].unique()) == [2, 3, 4, 5, 6, 7], "id * 2 + number of the dataset"
    assert set(events["code"]) == {"meds//HR", "meds-2//HR", "MEDS_DEATH"}
    assert sorted(events.filter(split="tuning")["subject_id"].unique()) == [4, 5]
    texts = dict(pool.code_metadata().select("code", "description").iter_rows())
    assert texts["meds//HR"], texts["meds-2//HR"] == ("Heart rate", "Hematocrit")
    assert pool.code_metadata().filter(code="meds-2//HR")["parent_codes"].to_list() == [["meds-2//P"]]
    labels = read_labels("case", pool.labels_dir).frame
    assert dict(labels.select("subject_id", "value").iter_rows()) == {
        2: "false", 3: "false", 4: "true", 5: "true", 6: "false", 7: "false",
    }  # fmt: skip
    splits = pool.split_of_subjects(max_events=100)
    assert splits is not None
    assert sorted(splits.filter(split="held_out")["subject_id"]) == [6, 7]
    assert pool.n_events == 12


def test_a_part_of_the_pool_has_the_same_ids_and_names(tmp_path, two):
    for keys in ({"only": "meds-2"}, {"only": 1}, {"leave_out": ["meds"]}):
        part = source(tmp_path, two, **keys)
        events = pl.concat([part.read(shard) for shard in part.shards])
        assert sorted(events["subject_id"].unique()) == [3, 5, 7]
        assert set(events["code"]) == {"meds-2//HR", "MEDS_DEATH"}
        assert read_labels(None, part.labels_dir).frame["subject_id"].to_list() == [3, 5, 7]
        assert part.fingerprint()["pool"] == {"datasets": ["meds", "meds-2"], "read": ["meds-2"]}


def test_label_sets_of_other_names_become_one(tmp_path):
    roots = [
        str(hospital(tmp_path / "a", "X", "x", labels="death")),
        str(hospital(tmp_path / "b", "X", "x", labels="died")),
    ]
    assert read_labels("death+died", source(tmp_path, roots, labels=["death", "died"]).labels_dir).frame.height == 6
    with pytest.raises(UserError, match=r"holds 0 label sets"):
        read_labels(None, source(tmp_path, roots).labels_dir)
    write_labels(tmp_path / "b" / "labels" / "death", [(1, 0.5, 3)])
    pool = source(tmp_path, roots)
    with pytest.raises(UserError, match=r"value column: .*Use one kind of label"):
        read_labels("death", pool.labels_dir)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"roots": []}, r"data\.roots=\[\]"),
        ({"roots": ["A", "A"]}, r"names .*A twice"),
        ({"only": "medz"}, r"data\.only 'medz': did you mean 'A'|data\.only 'medz'.*A, B"),
        ({"only": "A", "leave_out": 0}, r"data\.only=.* and data\.leave_out=.* A, B\. Change one of them"),
        ({"labels": ["case"]}, r"data\.labels=\['case'\]: .* 2 label sets"),
        ({"labels": ["case", "cases"]}, r"data\.labels 'cases': did you mean 'case'.*label sets of B"),
        ({"root": "A"}, r"data\.root=A: .*data\.roots"),
    ],
)
def test_what_cannot_be_pooled_is_refused_in_words(tmp_path, keys, match):
    for name in "AB":
        hospital(tmp_path / name, "X", "x")
    roots = [str(tmp_path / name) for name in keys.pop("roots", ["A", "B"])]
    with pytest.raises(UserError, match=match):
        source(tmp_path, roots, **keys)


def test_ids_that_leave_no_room_for_the_datasets_number_are_refused(tmp_path):
    roots = [str(hospital(tmp_path / "a", "X", "x", first=2**62)), str(hospital(tmp_path / "b", "X", "x"))]
    with pytest.raises(UserError, match=r"subject_id 46\d+ .* by 2"):
        source(tmp_path, roots)
