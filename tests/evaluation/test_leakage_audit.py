"""Each planted leak is found, and none where there is none: the demo, GiBleed, PhysioNet 2012."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import read_json
from ehr_embed.data.store import STATIC_TIME, EventStore, SplitEvents, build_store
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.evaluation import leakage_audit
from ehr_embed.evaluation.code_screening import (
    COUNT,
    LAST_VALUE,
    PRESENCE,
    Entries,
    aurocs,
    code_groups,
    sample_features,
)
from ehr_embed.evaluation.leakage_audit import audit, duplicate_subjects, record_hashes, split_overlap
from ehr_embed.experiment.run import run
from ehr_embed.sources.demo import demo_source
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.tasks.classification import Classification
from ehr_embed.tasks.multilabel import Multilabel
from tests.helpers.configs import composed
from tests.helpers.refusals import refused
from tests.helpers.small_meds import Event, write_labels, write_meds

PREDICTION = 30.0
Plant = Callable[[int, bool, list[Event]], list[Event]]


def nothing(subject: int, case: bool, events: list[Event]) -> list[Event]:
    return events


def write_set(
    root: Path, plant: Plant = nothing, *, n: int = 60, at: Callable[[int, bool], float] | None = None
) -> Path:
    """Subjects with 11 to 17 events of noise before their prediction time and one after it; `plant` adds the leak."""
    rng = np.random.default_rng(0)
    splits: dict[str, list[Event]] = {}
    labels = []
    for number, split in enumerate(SPLITS):
        splits[split] = []
        for subject in range(1000 * number, 1000 * number + n):
            case = subject % 5 < 2
            events: list[Event] = [(subject, None, f"SEX//{'FM'[int(rng.integers(2))]}", None)]
            for day in np.sort(rng.uniform(0, 29, rng.integers(11, 18))):
                code = f"N{rng.integers(6)}"
                events.append((subject, float(day), code, float(rng.normal()) if code == "N0" else None))
            events.append((subject, 40.0, "LATER", None))
            events = sorted(plant(subject, case, events), key=lambda event: -1.0 if event[1] is None else event[1])
            splits[split] += events
            labels.append((subject, PREDICTION if at is None else at(subject, case), case))
    return write_meds(root, splits, labels={"case": labels})


def audited(root: Path, *, values: str = "both", mode: str = "warn") -> dict:
    source = MedsSource(root=str(root))
    folder = root.parent / f"store-{values}"
    store = EventStore(folder) if folder.exists() else build_store(folder, source, VocabularySettings(values=values))
    task = Classification(labels="case")
    task.setup(store, source.labels_dir, 512)
    report = audit(store, task.samples, task.class_names, mode=mode)
    assert report is not None
    return report


def leaks(report: dict) -> list[tuple[str, str]]:
    """(check, what it is about) of each leak."""
    found = [finding for finding in report["findings"] if finding["level"] == "leak"]
    return [(finding["check"], finding["details"].get("name", "")) for finding in found]


def test_nothing_is_found_where_nothing_is(tmp_path):
    report = audited(write_set(tmp_path / "set"))
    assert report["findings"] == []
    assert report["not_checked"] == []
    assert report["share_with_later_events"]["train"]["true"] == {"true": 1.0, "not true": 1.0}


@pytest.mark.parametrize(
    ("code", "plant", "feature"),
    [
        ("BILLED", lambda s, case, e: [*e, (s, 3.0, "BILLED", None)] if case else e, "count"),
        ("HEALTHY", lambda s, case, e: e if case else [*e, (s, 3.0, "HEALTHY", None)], "count"),
        ("VISIT", lambda s, case, e: e + [(s, d, "VISIT", None) for d in range(3 if case else 1)], "count"),
        ("STATUS", lambda s, case, e: [*e, (s, 3.0, "STATUS", s % 7 + 10.0 * case)], "last value"),
        (
            "CLOSED",
            lambda s, case, e: [*e, (s, PREDICTION if case else 5.0, "CLOSED", None)],
            "presence at the prediction time",
        ),
    ],
)  # fmt: skip
def test_a_code_that_tells_the_label_is_found(tmp_path, code, plant, feature):
    report = audited(write_set(tmp_path / "set", plant))
    (found,) = [f for f in report["findings"] if f["level"] == "leak" and f["check"] == "single_code"]
    assert found["details"]["name"] == code
    assert found["details"]["feature"] == feature
    assert found["details"]["auroc"] in (0.0, 1.0)
    assert code in found["message"]
    assert "alone predicts class 'true' in train" in found["message"]


def test_a_last_value_is_found_in_bins_too(tmp_path):
    def plant(subject: int, case: bool, events: list[Event]) -> list[Event]:
        return [*events, (subject, 1.0, "STATUS", 1.0 - case), (subject, 3.0, "STATUS", 1.0 * case)]

    report = audited(write_set(tmp_path / "set", plant), values="bins")
    assert leaks(report) == [("single_code", "STATUS")]


def test_a_code_after_the_prediction_time_is_no_leak(tmp_path):
    plant: Plant = lambda s, case, e: [*e, (s, 35.0, "DIED", None)] if case else e  # noqa: E731
    assert leaks(audited(write_set(tmp_path / "set", plant))) == []


def test_few_samples_are_not_flagged_by_chance_and_it_is_said(tmp_path):
    plant: Plant = lambda s, case, e: [*e, (s, 3.0, "BILLED", None)] if case else e  # noqa: E731
    report = audited(write_set(tmp_path / "set", plant, n=30))
    assert leaks(report) == []
    assert "fewer than 20" in report["not_checked"][0]


def test_death_before_the_prediction_is_found_in_every_split(tmp_path):
    plant: Plant = lambda s, case, e: [*e, (s, 29.5, "MEDS_DEATH", None)] if s in (3, 7, 2005) else e  # noqa: E731
    report = audited(write_set(tmp_path / "set", plant))
    found = [f["details"] for f in report["findings"] if f["check"] == "death_before_prediction"]
    assert [(d["split"], d["n"]) for d in found] == [("train", 2), ("held_out", 1)]
    after: Plant = lambda s, case, e: [*e, (s, 41.0, "MEDS_DEATH", None)] if case else e  # noqa: E731
    (tmp_path / "after").mkdir()
    assert leaks(audited(write_set(tmp_path / "after" / "set", after))) == []


def test_a_prediction_time_that_tells_the_label_is_found(tmp_path):
    root = write_set(tmp_path / "set", at=lambda s, case: 30.0 if case else 39.0)
    assert [check for check, _ in leaks(audited(root))] == ["record_shape"] * 2


@pytest.mark.parametrize(("copies_to", "level"), [(2001, "leak"), (5, "note")])
def test_a_copy_under_another_id_is_found_even_with_shifted_dates(tmp_path, copies_to, level):
    record: list[Event] = []

    def plant(subject: int, case: bool, events: list[Event]) -> list[Event]:
        if subject == 2:
            record[:] = events
        if subject != copies_to:
            return events
        return [(subject, None if day is None else day + 7, code, value) for _, day, code, value in record]

    root = write_set(tmp_path / "set", plant, at=lambda s, case: 50.0 if s == copies_to else PREDICTION)
    (found,) = [f for f in audited(root)["findings"] if f["check"] == "duplicate_subjects"]
    assert found["level"] == level
    assert found["details"]["groups"] == [[2, copies_to]]
    assert "duplicate_subjects" not in {f["check"] for f in audited(write_changed(tmp_path, plant))["findings"]}


def write_changed(folder: Path, plant: Plant) -> Path:
    """The same, with one value of the copies another."""
    (folder / "changed").mkdir()
    change: Plant = lambda s, case, e: [  # noqa: E731
        (s, day, code, s / 100 if code == "N0" and s > 2 else value) for s, day, code, value in plant(s, case, e)
    ]
    return write_set(folder / "changed" / "set", change)


def test_short_records_are_equal_by_chance_and_no_copies(tiny, tmp_path):
    source = MedsSource(root=str(tiny))
    store = build_store(tmp_path / "store", source, VocabularySettings(min_count=1))
    assert duplicate_subjects({split: store.split(split) for split in SPLITS}) == []


def test_records_that_differ_in_order_only_have_other_hashes():
    times, values = np.array([5, 5, 9, 9], np.int64), np.array([1, np.nan, np.nan, 1], np.float32)
    events = SplitEvents(
        np.array([2, 3, 3, 2], np.int32), times, values, np.array([1, 2]), np.array([0, 2, 4]), np.full(2, STATIC_TIME)
    )
    assert len(set(record_hashes(events).tolist())) == 2
    assert record_hashes(events, chunk_events=1).tolist() == record_hashes(events).tolist()


def test_a_subject_in_two_splits_is_found_whatever_the_source():
    empty = np.empty(0)
    one, other = (
        SplitEvents(empty, empty, None, np.array(ids), np.array([0]), np.array([])) for ids in ([1, 2], [2, 3])
    )
    (found,) = split_overlap({"train": one, "tuning": other})
    assert found.details["subject_ids"] == [2]


def test_a_prevalence_that_changes_is_noted(tmp_path):
    root = write_set(tmp_path / "set", n=300)
    source = MedsSource(root=str(root))
    store = build_store(tmp_path / "store", source, VocabularySettings())
    task = Classification(labels="case")
    task.setup(store, source.labels_dir, 512)
    task.samples["held_out"].labels[:] = (np.arange(300) < 30).astype(np.int64)
    report = audit(store, task.samples, task.class_names)
    assert report is not None
    assert [(f["check"], f["level"]) for f in report["findings"]] == [("prevalence", "note")]
    assert "in held_out" in report["findings"][0]["message"]


def test_several_labels_and_classes_are_each_looked_at(tmp_path):
    plant: Plant = lambda s, case, e: [*e, (s, 3.0, "BILLED", None)] if case else e  # noqa: E731
    root = write_set(tmp_path / "set", plant)
    rng = np.random.default_rng(1)
    subjects = [1000 * k + i for k in range(3) for i in range(60)]
    write_labels(root / "labels" / "other", [(s, PREDICTION, bool(rng.random() < 0.5)) for s in subjects])
    source = MedsSource(root=str(root))
    store = build_store(tmp_path / "store", source, VocabularySettings())
    task = Multilabel(labels=["other", "case"])
    task.setup(store, source.labels_dir, 512)
    report = audit(store, task.samples, task.class_names)
    assert report is not None
    assert [f["details"]["class"] for f in report["findings"]] == ["case"]


def test_aurocs_equal_those_of_sklearn(tmp_path):
    root = write_set(tmp_path / "set")
    source = MedsSource(root=str(root))
    store = build_store(tmp_path / "store", source, VocabularySettings(values="both"))
    task = Classification(labels="case")
    task.setup(store, source.labels_dir, 512)
    events, samples = store.split("train"), task.samples["train"]
    features = sample_features(store.vocabulary, events, samples)
    groups, names, _ = code_groups(store.vocabulary)
    y = samples.labels == 1
    counts = np.zeros((len(samples), len(names)))
    values = np.full(len(samples), np.nan)
    assert events.values is not None
    for i in range(len(samples)):
        index = [*range(samples.static_start[i], samples.static_stop[i]), *range(samples.start[i], samples.stop[i])]
        for event in index:
            counts[i, groups[events.token_ids[event]]] += 1
            if names[groups[events.token_ids[event]]] == "N0" and not np.isnan(events.values[event]):
                values[i] = events.values[event]
    for feature, table in ((COUNT, counts), (PRESENCE, counts > 0)):
        found = aurocs(features.entries[feature], y)
        expected = [roc_auc_score(y, table[:, column]) for column in range(len(names))]
        np.testing.assert_allclose(found, expected, atol=1e-12)
    has = ~np.isnan(values)
    found = aurocs(features.entries[LAST_VALUE], y, min_per_class=1)[names.index("N0")]
    np.testing.assert_allclose(found, roc_auc_score(y[has], values[has]), atol=1e-12)


def test_a_column_without_cells_ranks_nothing():
    none = np.empty(0, np.int64)
    y = np.arange(50) < 25
    assert aurocs(Entries(none, none, none.astype(float), 2, True), y).tolist() == [0.5, 0.5]
    assert np.isnan(aurocs(Entries(none, none, none.astype(float), 2, False), y)).all()


def arguments(root: Path, *overrides: str) -> list[str]:
    return [
        "data=meds", f"data.root={root}", f"cache_dir={root.parent / 'cache'}", f"run_dir={root.parent / 'run'}",
        "embedder=hashing", "embedder.embedding_dim=16", "model=encoder_small", "model.n_layers=1", "model.model_dim=16",
        "trainer.epochs=1", "trainer.n_bootstrap=0", *overrides,
    ]  # fmt: skip


def test_a_leak_stops_a_run_that_asks_for_it_and_is_written_down_otherwise(tmp_path, caplog):
    plant: Plant = lambda s, case, e: [*e, (s, 3.0, "BILLED", None)] if case else e  # noqa: E731
    root = write_set(tmp_path / "set", plant)
    with refused("1 possible leaks", "BILLED", "AUROC 1.000"):
        run(composed(*arguments(root, "audit=error")))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"unknown audit 'eror': did you mean 'error'"):
        run(composed(*arguments(root, "audit=eror")))
    run(composed(*arguments(root, "audit=off")))
    assert not (tmp_path / "run" / "audit.json").exists()
    run(composed(*arguments(root, "resume=overwrite")))
    assert any("BILLED" in record.message and record.levelname == "WARNING" for record in caplog.records)
    (finding,) = read_json(tmp_path / "run" / "audit.json")["findings"]
    assert finding["details"]["name"] == "BILLED"
    run(composed(*arguments(root, "resume=overwrite", "task=next_event", "model=decoder_small")))
    assert read_json(tmp_path / "run" / "audit.json")["findings"] == [], "there is no label to tell"


def test_the_demo_has_no_leak(tmp_path):
    source = demo_source(root=str(tmp_path / "demo"), n_subjects=2000, seed=0)
    store = build_store(tmp_path / "store", source, VocabularySettings(values="both"))
    task = Classification()
    task.setup(store, source.labels_dir, 512)
    report = audit(store, task.samples, task.class_names, mode="error")
    assert report is not None
    assert report["findings"] == []


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("gibleed", "gi_bleed_1y_after_nsaid"),
        ("gibleed", "osteoarthritis_onset_1y"),
        ("gibleed", "otitis_media_onset_1y"),
        pytest.param("physionet2012", "in_hospital_mortality_48h", marks=pytest.mark.slow),
    ],
)
def test_real_sets_have_no_leak(real_data, tmp_path, name, labels):
    source = MedsSource(root=str(real_data(name)))
    store = build_store(tmp_path / "store", source, VocabularySettings(values="both"))
    task = Classification(labels=labels)
    task.setup(store, source.labels_dir, 512)
    report = audit(store, task.samples, task.class_names, mode="error")
    assert report is not None
    assert report["findings"] == []


def test_samples_beyond_the_limit_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("ehr_embed.evaluation.code_screening.MAX_SAMPLES", 80)
    plant: Plant = lambda s, case, e: [*e, (s, 3.0, "BILLED", None)] if case else e  # noqa: E731
    monkeypatch.setattr("ehr_embed.evaluation.code_screening.CHUNK_EVENTS", 20)
    report = audited(write_set(tmp_path / "set", plant, n=120))
    assert leaks(report) == [("single_code", "BILLED")]
    assert report["findings"][0]["details"]["n"] == 80


def test_the_next_run_reads_no_event_and_other_labels_read_the_samples_alone(tmp_path, monkeypatch):
    root = write_set(tmp_path / "set", lambda n, case, events: [*events, (n, 5.0, "TELLS", None)] if case else events)
    store = build_store(tmp_path / "store", MedsSource(root=str(root)), VocabularySettings(min_count=1))
    read: list[str] = []
    for name in ("record_hashes", "sample_features"):
        real = getattr(leakage_audit, name)
        monkeypatch.setattr(
            leakage_audit,
            name,
            lambda *args, name=name, real=real, **options: read.append(name) or real(*args, **options),
        )

    def audited(**options) -> dict:
        read.clear()
        task = Classification(labels="case", **options)
        task.setup(store, root / "labels", 512)
        return audit(store, task.samples, task.class_names)

    first = audited()
    assert {finding["check"] for finding in first["findings"]} == {"single_code"}
    assert set(read) == {"record_hashes", "sample_features"}
    again = audited()
    assert not read
    assert again | {"seconds": 0} == first | {"seconds": 0}
    assert not audited(shuffle_labels=1)["findings"]
    assert read == ["sample_features"]
    task = Classification(labels="case")
    task.setup(store, root / "labels", 512)
    with pytest.raises(UserError, match=r"audit=error: 1 possible leaks"):
        audit(store, task.samples, task.class_names, mode="error")
