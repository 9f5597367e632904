"""Data do not vanish without a word: the count is said, and nothing is done where nearly all would go."""

from __future__ import annotations

import logging
from pathlib import Path

import polars as pl
import pytest

from ehr_embed.core.errors import UserError
from ehr_embed.data.store import EventStore, build_store, encode_split
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.embedding.prepare import report
from ehr_embed.inference.trained_run import samples_to_predict
from ehr_embed.sources.case_labels import read_case_labels
from ehr_embed.sources.code_texts import read_lookups, resolve_texts
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.tasks.classification import Classification
from ehr_embed.tasks.multilabel import Multilabel
from ehr_embed.tasks.set_up import set_up
from tests.helpers.refusals import refused
from tests.helpers.small_meds import Event, write_labels, write_meds

N = 40


def write_set(root: Path, names: list[str] | None = None, **options) -> Path:
    """40 subjects with two events each, whose splits have the given names in turn; None = those of MEDS."""
    names = list(SPLITS) if names is None else names
    splits: dict[str, list[Event]] = {name: [] for name in names}
    for subject in range(N):
        splits[names[subject % len(names)]] += [
            (subject, None, "SEX", None),
            *((subject, d, "A", None) for d in (1.0, 2.0)),
        ]
    write_meds(root, splits, **options)
    for shard in (root / "data").rglob("*.parquet"):  # one folder, so that subject_splits.parquet alone decides
        shard.rename(root / "data" / f"{shard.parent.name}.parquet")
    return root


def store_of(root: Path, **options) -> EventStore:
    source = MedsSource(root=str(root), **options)
    return build_store(root.parent / "store", source, VocabularySettings(min_count=1))


def warned(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


@pytest.mark.parametrize(
    ("names", "near"),
    [
        (["train", "Train", "tuning", "held_out", "held-out"], "'Train' (for train?), 'held-out' (for held_out?)"),
        (["train", "val", "test"], "'test' (for held_out?), 'val' (for tuning?)"),
        (["train", "tuning", "held_out", "test"], "'test' (for held_out?)"),
        (["train", "dev", "held_out"], "'dev' (for tuning?)"),
        (["train", "tuning ", "held_out"], "'tuning ' (for tuning?)"),
    ],
)
def test_names_that_nearly_are_splits_are_refused_with_the_remedy(tmp_path, names, near):
    root = write_set(tmp_path / "set", names)
    with pytest.raises(UserError) as caught:
        store_of(root)
    assert near in str(caught.value)
    assert "train, tuning, held_out, as MEDS 0.4 names them" in str(caught.value)
    # The remedy works as it stands.
    command = str(caught.value).split("Rename them: ")[1].split(", or, to leave")[0]
    path = root / "metadata" / "subject_splits.parquet"
    exec(f"import polars\n{command.replace('FILE', repr(str(path)))}")
    assert sum(split["n_subjects"] for split in store_of(root).manifest["splits"].values()) == N


def test_other_names_are_counted_and_refused_where_they_are_nearly_all(tmp_path, caplog):
    store_of(write_set(tmp_path / "set", [*SPLITS, "external"]))
    assert (
        f"10 of 40 subjects of {tmp_path / 'set' / 'metadata' / 'subject_splits.parquet'} are in splits other than"
        in warned(caplog)
    )
    assert "'external': 10" in warned(caplog)
    assert "30 of 120 events of set are in splits other than" in warned(caplog)
    with refused("40 of 40 subjects", "train, tuning, held_out", "'a': 14, 'b'"):
        store_of(write_set(tmp_path / "all", ["a", "b", "c"]))
    with pytest.raises(UserError, match=r"37 of 40 subjects"):
        store_of(write_set(tmp_path / "most", [*SPLITS, *["else"] * 37]))


def test_a_splits_file_of_ones_own_is_held_to_the_same(tmp_path, caplog):
    root, path = write_set(tmp_path / "set"), tmp_path / "folds.parquet"

    def folds(ids: range, names: list[str]) -> None:
        pl.DataFrame({"subject_id": ids, "fold": [names[i % len(names)] for i in range(len(ids))]}).write_parquet(path)

    folds(range(N), ["train", "valid", "test"])
    with pytest.raises(UserError, match=r"'valid' \(for tuning\?\).*column?.*"):
        store_of(root, splits=str(path), split_column="fold")
    folds(range(N - 30, N + 5), list(SPLITS))
    store_of(root, splits=str(path), split_column="fold")
    assert "10 of 40 subjects (30 of 120 events) have no split in" in warned(caplog)
    assert "5 of 35 subjects of" in warned(caplog), "the file names some that are not there"
    folds(range(1000, 1040), list(SPLITS))
    with refused("40 of 40 subjects", "folds.parquet"):
        store_of(root, splits=str(path), split_column="fold")


def test_a_source_of_ones_own_is_held_to_the_same(tmp_path, caplog):
    class Own(MedsSource):
        def read(self, shard: Path) -> pl.DataFrame:
            return super().read(shard).with_columns(pl.col("split").replace({"held_out": self.third}))

    source = Own(root=str(write_set(tmp_path / "set")))
    source.third = "HeldOut"
    with pytest.raises(UserError, match=r"'HeldOut' \(for held_out\?\)"):
        build_store(tmp_path / "store", source, VocabularySettings(min_count=1))
    assert not (tmp_path / "store").exists()
    source.third = "elsewhere"
    build_store(tmp_path / "store", source, VocabularySettings(min_count=1))
    assert "39 of 120 events of set are in splits other than" in warned(caplog)


def both(root: Path, days: float, n: int = N) -> Path:
    """Two boolean label sets for all subjects, of which `n` have other times in the second."""
    for name, shift in (("first", 0.0), ("second", days)):
        rows = [(s, 3.0 + (shift if s < n else 0.0), (s // 3) % 2 == 0) for s in range(N)]
        write_labels(root / "labels" / name, rows)
    return root


def test_a_join_says_what_it_loses_and_refuses_to_lose_nearly_all(tmp_path, caplog):
    root = both(write_set(tmp_path / "set"), 0.5, n=10)
    store = store_of(root)
    task = Multilabel(monitor="auroc")
    set_up(task, store, root / "labels", 8)
    assert sum(map(len, task.samples.values())) == 30
    for name in ("first", "second"):
        assert f"10 of 40 rows of the label set {name} share no subject and prediction time" in warned(caplog)
    for n in (36, 40):
        both(root, 0.5, n=n)
        with pytest.raises(UserError, match=rf"{n} of 40 rows .*joined: {40 - n}.*task=multitask"):
            set_up(Multilabel(monitor="auroc"), store, root / "labels", 8)
    write_labels(root / "labels" / "second", [(s, 3.0, (s // 3) % 2 == 0) for s in range(N)])
    write_labels(root / "labels" / "first", [(s, 3.0 + day, (s // 3) % 2 == 0) for s in range(N) for day in range(20)])
    set_up(Multilabel(monitor="auroc"), store, root / "labels", 8)
    assert "760 of 800 rows of the label set first" in warned(caplog), "a set may be much larger than the other"


def test_codes_with_several_texts_are_counted(tmp_path, caplog):
    rows = [("A", "fever"), ("A", "pyrexia"), ("A", "fever "), ("B", "cough"), ("Z", "x"), ("Z", "y")]
    schema = {"code": pl.String, "description": pl.String, "parent_codes": pl.List(pl.String)}
    codes = pl.DataFrame([(*row, None) for row in rows], schema=schema, orient="row")
    texts = resolve_texts(pl.Series(["A", "B"]), codes, read_lookups([]))
    assert texts["text"].to_list() == ["fever; pyrexia", "cough"]
    assert (
        'codes.parquet: 1 of 2 codes have several texts, such as A (fever | pyrexia); they are joined by "; "'
        in warned(caplog)
    )
    caplog.clear()
    lookup = tmp_path / "lookup.csv"
    lookup.write_text("code,term\nA,one\nA,two\nB,three\nC,\n")
    assert read_lookups([str(lookup)])["term"].to_list() == ["two", "three"]
    assert "1 of 2 codes have several texts, such as A (one | two); the last one is taken" in warned(caplog)
    assert "1 of 4 rows of" in warned(caplog)


def test_rows_without_a_code_are_counted(tmp_path, caplog):
    root = write_set(tmp_path / "set", codes=[("A", "fever", None), (None, "lost", None)])  # type: ignore[list-item]
    assert MedsSource(root=str(root)).code_metadata()["code"].to_list() == ["A"]
    assert "1 of 2 rows of" in warned(caplog)


def test_doubled_events_are_counted_and_kept(tmp_path, caplog):
    root = write_set(tmp_path / "set")
    shard = root / "data" / "train.parquet"
    events = pl.read_parquet(shard)
    pl.concat([events, events.filter(pl.col("code") == "A")]).sort(
        "subject_id", "time", nulls_last=False
    ).write_parquet(shard)
    store = store_of(root)
    assert store.manifest["splits"]["train"] == {"n_subjects": 14, "n_events": 70, "n_unknown": 0, "n_doubled": 28}
    assert store.manifest["splits"]["tuning"]["n_doubled"] == 0
    report(store, 0.0)
    assert "28 of 70 events of train are exact copies of another one" in warned(caplog)
    assert "of tuning" not in warned(caplog)


def labelled(root: Path, early: int, n: int = N) -> Path:
    """A label set whose first `early` subjects of each split are predicted in 1900."""
    rows = [(s, -43_829.0 if s // 3 < early else 1.5, (s // 3) % 2 == 0) for s in range(n)]
    write_labels(root / "labels" / "case", rows)
    return root


def test_prediction_times_before_every_event_are_counted_and_refused_where_they_are_nearly_all(tmp_path, caplog):
    root = labelled(write_set(tmp_path / "set"), early=3)
    store = store_of(root)
    set_up(Classification(labels="case", monitor="auroc"), store, root / "labels", 8)
    assert "3 of 14 prediction times of Classification, split train, such as 1900-01-01" in warned(caplog)
    caplog.clear()
    set_up(Classification(labels="case", monitor="auroc"), store, labelled(root, early=0) / "labels", 1)
    assert not warned(caplog), "that a static event fills all the room is no fault of the times"
    for early in (13, 14):
        labelled(root, early=early)
        with pytest.raises(UserError, match=rf"{min(early, 14)} of 14 prediction times .*subject"):
            set_up(Classification(labels="case", monitor="auroc"), store, root / "labels", 8)
    events = encode_split(MedsSource(root=str(root)), store.vocabulary, "held_out")
    with refused("13 of 13 prediction times", "labels case"):
        samples_to_predict(events, "case", root / "labels", max_length=8)


def test_subjects_without_a_last_event_are_counted(tmp_path, caplog):
    splits = {
        split: [(10 * i + s, None if s == 0 else 1.0, "A", None) for s in range(3)] for i, split in enumerate(SPLITS)
    }
    root = write_meds(tmp_path / "set", splits)
    store = store_of(root)
    assert len(samples_to_predict(store.split("tuning"), None, root, max_length=8)) == 2
    assert "1 of 3 subjects have static events only" in warned(caplog)


def test_labels_csv_and_corpus_are_compared(tmp_path, caplog):
    path = tmp_path / "labels.csv"
    path.write_text("subject_id,is_case\n1,1\n2,0\n9,0\n")
    labels = read_case_labels(str(path))
    last = pl.DataFrame(
        {"subject_id": [1, 2, 3, 4], "last_time": [None] * 4}, schema_overrides={"last_time": pl.Datetime("us")}
    )
    assert len(labels.label_sets(last, None)["is_case"]) == 2
    assert "1 of 3 subjects of labels.csv are not in the corpus" in warned(caplog)
    assert "2 of 4 subjects of the corpus are not in labels.csv" in warned(caplog)
    with refused("3 of 3 subjects", "labels.csv", "data.labels_filepath"):
        labels.label_sets(last.with_columns(pl.col("subject_id") + 100), None)
