"""Labels and tasks: values, weights, thresholds, and refusal of what cannot be scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.data.labels import available_labels, read_labels
from ehr_embed.data.store import build_store
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.sources.meds import MedsSource
from ehr_embed.tasks.classification import Classification
from ehr_embed.tasks.multilabel import Multilabel
from tests.helpers.refusals import refused
from tests.helpers.small_meds import write_labels

SUBJECTS = [10, 11, 12, 20, 21, 22, 30, 31, 32]


@pytest.fixture
def prepared(tiny, tmp_path):
    return build_store(tmp_path / "store", MedsSource(root=str(tiny)), VocabularySettings(min_count=1)), tiny / "labels"


def setup(prepared, task):
    store, labels_dir = prepared
    task.setup(store, labels_dir, 16)
    return task


def test_boolean_labels(prepared):
    task = setup(prepared, Classification(labels="outcome"))
    assert task.num_classes == 2
    assert task.samples["tuning"].labels.tolist() == [0, 1, 0]
    assert task.samples["tuning"].lengths.tolist() == [4, 4, 4]
    assert setup(prepared, Classification()).samples["train"].subject_ids.tolist() == [10, 11, 12]


@pytest.mark.parametrize(("values", "names"), [((2, 10, 30), ["2", "10", "30"]), (("b", "a", "c"), ["a", "b", "c"])])
def test_integer_and_categorical_labels_are_multi_class(prepared, values, names):
    path = write_labels(prepared[1] / "many", [(s, 2.0, values[i % 3]) for i, s in enumerate(SUBJECTS)])
    task = setup(prepared, Classification(labels=str(path)))
    assert task.class_names == names
    probabilities = np.full((3, 3), 1 / 3)
    assert task.evaluate("tuning", probabilities, n_bootstrap=0)["auroc"]["value"] == 0.5


def test_class_weights_and_smoothing_enter_the_loss(prepared):
    logits, labels = torch.tensor([[2.0, -1.0], [0.5, 0.0]]), torch.tensor([0, 1])
    plain = setup(prepared, Classification(labels="outcome")).loss(logits, labels)
    balanced = setup(prepared, Classification(labels="outcome", class_weights="balanced"))
    assert balanced._weights is not None
    assert balanced._weights.tolist() == [0.75, 1.5]
    torch.testing.assert_close(balanced.loss(logits, labels), plain * torch.tensor([0.75, 1.5]))
    listed = setup(prepared, Classification(labels="outcome", class_weights=[1, 2]))
    assert listed._weights.tolist() == [0.75, 1.5]
    assert listed.sample_weights("train").mean() == 1
    smoothed = setup(prepared, Classification(label_smoothing=0.2)).loss(logits, labels)
    assert not torch.isclose(plain, smoothed).any()
    with refused("3 numbers", "2 classes: false, true"):
        setup(prepared, Classification(class_weights=[1, 2, 3]))


def test_the_threshold_is_chosen_on_tuning(prepared):
    task = setup(prepared, Classification(labels="outcome"))
    task.fit_thresholds(np.array([[0.9, 0.1], [0.7, 0.3], [0.8, 0.2]]))
    assert task.threshold == pytest.approx(0.3)
    held_out = task.evaluate("held_out", np.array([[0.5, 0.5], [0.8, 0.2], [0.9, 0.1]]), n_bootstrap=0)
    assert held_out["threshold"] == pytest.approx(0.3)
    assert held_out["recall"]["value"] == 0.0


def test_unknown_label_set_lists_those_present(prepared):
    with pytest.raises(UserError, match=r"unknown task\.labels 'outcme': did you mean 'outcome'"):
        setup(prepared, Classification(labels="outcme"))
    write_labels(prepared[1] / "second", [(10, 2.0, True)])
    with refused("outcome, second"):
        setup(prepared, Classification())


def refused_labels(prepared, rows, message, labels="bad"):
    write_labels(prepared[1] / labels, rows)
    with pytest.raises(UserError, match=message):
        setup(prepared, Classification(labels=labels))


def test_labels_of_subjects_without_events_are_left_out_and_said(prepared, caplog):
    write_labels(prepared[1] / "more", [*((s, 2.0, s % 2 == 1) for s in SUBJECTS), (99, 2.0, True)])
    task = setup(prepared, Classification(labels="more"))
    assert 99 not in np.concatenate([samples.subject_ids for samples in task.samples.values()])
    assert "1 of 10 subjects of the label set more (such as 99) have no events in any split" in caplog.text


def test_labels_that_cannot_be_used_are_refused(prepared):
    good = [(s, 2.0, s % 2 == 1) for s in SUBJECTS]
    refused_labels(prepared, [(99, 2.0, True)], r"none of its 1 subjects \(such as 99\) has events")
    refused_labels(prepared, [(s, 2.0, s == 11) for s in SUBJECTS], "split tuning: only one class")
    refused_labels(prepared, good[:6], "no labels for the held_out split")
    refused_labels(
        prepared, [*good, (10, 2.0, True)], "subject 10 has several labels at .* contradict each other, false and true"
    )
    refused_labels(
        prepared, [(s, 2.0, ("xz"[s % 2] if s < 20 else "y")) for s in SUBJECTS], "classes y do not occur in train"
    )


def test_prediction_before_any_event_is_refused(prepared, tiny):
    shard = tiny / "data" / "train" / "0.parquet"
    pl.read_parquet(shard).drop_nulls("time").write_parquet(shard)
    store = build_store(tiny.parent / "again", MedsSource(root=str(tiny)), VocabularySettings(min_count=1))
    write_labels(tiny / "labels" / "early", [(s, -1.0 if s == 11 else 2.0, s % 2 == 1) for s in SUBJECTS])
    with pytest.raises(UserError, match="subject 11: prediction_time 2019-12-31 00:00:00 lies before"):
        Classification(labels="early").setup(store, tiny / "labels", 16)


def test_label_files_are_checked(tmp_path):
    file = tmp_path / "l.parquet"
    pl.DataFrame({"subject_id": [1], "boolean_value": [True]}).write_parquet(file)
    with refused("`prediction_time`", "subject_id, boolean_value"):
        read_labels(str(file), tmp_path)
    pl.DataFrame({"subject_id": [1.5], "prediction_time": ["x"], "boolean_value": [True]}).write_parquet(file)
    with pytest.raises(UserError, match="column `subject_id` has dtype Float64"):
        read_labels(str(file), tmp_path)
    frame = pl.DataFrame({"subject_id": [1, 2], "prediction_time": pl.Series([0, 1]).cast(pl.Datetime("us"))})
    frame.write_parquet(file)
    with pytest.raises(UserError, match="0 filled value columns"):
        read_labels(str(file), tmp_path)
    frame.with_columns(boolean_value=pl.Series([True, None])).write_parquet(file)
    with pytest.raises(UserError, match="row 1: 1 null fields"):
        read_labels(str(file), tmp_path)


def test_multilabel(prepared):
    write_labels(prepared[1] / "second", [(s, 2.0, s % 2 == 0) for s in SUBJECTS])
    task = setup(prepared, Multilabel(labels=["outcome", "second"], class_weights="balanced"))
    assert task.num_classes == 2
    assert task.samples["train"].labels.tolist() == [[0, 1], [1, 0], [0, 1]]
    assert task._weights is not None
    np.testing.assert_allclose(task._weights, [[0.75, 1.5], [1.5, 0.75]])
    labels = torch.from_numpy(task.samples["train"].labels)
    assert (task.loss(labels * 20 - 10, labels) < task.loss(10 - labels * 20, labels)).all()
    probabilities = task.samples["tuning"].labels.astype(np.float64) * 0.8 + 0.1
    task.fit_thresholds(probabilities)
    result = task.evaluate("tuning", probabilities, n_bootstrap=0)
    assert result["auroc"]["value"] == 1.0
    assert set(result["per_label"]) == {"outcome", "second"}
    path = prepared[0].folder / "p.parquet"
    task.write_predictions(path, "tuning", probabilities)
    assert pl.read_parquet(path)["second/predicted"].to_list() == [True, False, True]


def test_multilabel_needs_two_boolean_sets_that_share_times(prepared):
    with pytest.raises(UserError, match=r"Type: task\.labels=\[NAME,NAME\]"):
        setup(prepared, Multilabel(labels=["outcome"]))
    write_labels(prepared[1] / "later", [(s, 2.25, True) for s in SUBJECTS])
    with pytest.raises(UserError, match=r"label set outcome .*joined: 0"):
        setup(prepared, Multilabel(labels=["outcome", "later"]))
    write_labels(prepared[1] / "kinds", [(s, 2.0, "a") for s in SUBJECTS])
    with pytest.raises(UserError, match=r"kinds .*Use task=classification"):
        setup(prepared, Multilabel(labels=["outcome", "kinds"]))


@pytest.fixture
def two_folders(tmp_path) -> Path:
    """Label sets in labels/ and in task_labels/, with nested names, with and without split folders."""
    for place in (
        "labels/plain",
        "labels/split/train",
        "labels/sharded/part_a",
        "task_labels/mortality/in_icu/first_24h/train",
        "task_labels/mortality/in_icu/first_24h/held_out",
        "task_labels/mortality/post/tuning",
        "task_labels/flat",
    ):
        subject = 2 if place.endswith("held_out") else 1
        write_labels(tmp_path / place, [(subject, 2.0, True)])
    return tmp_path / "labels"


def test_label_sets_lie_in_two_folders_and_names_may_be_nested(two_folders):
    nested = "mortality/in_icu/first_24h"
    assert available_labels(two_folders) == ["flat", nested, "mortality/post", "plain", "sharded", "split"]
    found = read_labels(nested, two_folders)
    assert (found.name, found.frame["subject_id"].to_list()) == (nested, [1, 2])
    assert [len(read_labels(name, two_folders).frame) for name in ("plain", "split", "sharded", "flat")] == [1, 1, 1, 1]
    assert read_labels("mortality/in_icu", two_folders).frame["subject_id"].to_list() == [1, 2], "a folder above"
    with pytest.raises(UserError, match=r"unknown task\.labels 'mortality/posts': did you mean 'mortality/post'"):
        read_labels("mortality/posts", two_folders)


def test_a_name_in_both_folders_is_refused(two_folders):
    write_labels(two_folders / "flat", [(1, 2.0, False)])
    with pytest.raises(UserError, match=r"task.labels=flat: .*labels/flat and .*task_labels/flat.*Type: task.labels=/"):
        read_labels("flat", two_folders)
    assert read_labels(str(two_folders / "flat"), two_folders).frame["value"].to_list() == ["false"]


def test_the_only_label_set_is_found_in_either_folder(tmp_path):
    write_labels(tmp_path / "task_labels" / "death" / "in_30d" / "train", [(1, 2.0, True)])
    assert read_labels(None, tmp_path / "labels").name == "death/in_30d"
