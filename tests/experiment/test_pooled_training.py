"""One model over two hospitals at once: codes brought together by text, numbers ranked within their own, metrics of each."""

import logging
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import read_json
from ehr_embed.experiment.run import run
from ehr_embed.inference.predictor import Predictor
from ehr_embed.inference.trained_run import open_run
from tests.helpers.configs import composed
from tests.helpers.two_hospitals import AWAY, HOME, MODELS, TRAINER, write_hospital

KINDS = ["gbm", pytest.param("code_tab", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    write_hospital(folder / "home", HOME, heart_unit=1.0, noise=0, seed=0, first=0)
    write_hospital(folder / "away", AWAY, heart_unit=1 / 60, noise=6, seed=1, first=0)  # the same ids are other people
    return folder


def pooled(folder: Path, kind: str, run_dir: str, *overrides: str) -> dict:
    run(composed(
        "data=pooled", f"data.roots=[{folder / 'home'},{folder / 'away'}]", "data.min_count=1", *MODELS[kind], *TRAINER[1:],
        f"run_dir={folder / run_dir}", f"cache_dir={folder / 'cache'}", *overrides,
    ))  # fmt: skip
    return read_json(folder / run_dir / "metrics.json")


def auroc(metrics: dict, name: str) -> float:
    return float(metrics["datasets"][name]["held_out"]["auroc"]["value"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_hospital_with_four_labels_learns_from_the_other_by_what_texts_say(hospitals, kind, caplog):
    few = ["task.label_fraction=[1.0,0.04]", TRAINER[0]]
    with caplog.at_level(logging.INFO):
        metrics = pooled(hospitals, kind, f"{kind}-pool", *few)
    assert "away: 4 of 6 codes are read as those of the datasets before it" in caplog.text
    assert "times as small" in caplog.text, "units that do not agree are said"
    assert metrics["train"]["n"] == 90 + 4
    assert auroc(metrics, "home") > 0.95
    assert auroc(metrics, "away") > 0.9
    assert metrics["held_out"]["n"] == metrics["datasets"]["home"]["held_out"]["n"] * 2 == 180
    table = pl.read_csv(hospitals / f"{kind}-pool" / "alignment.csv")
    assert dict(table.filter(pl.col("origin") != "own").select("code", "matched_code").iter_rows()) == {
        "away//v//1": "home//HR", "away//l//2": "home//NA", "away//l//3": "home//GLU", "away//d//4": "home//FEVER",
    }  # fmt: skip
    card = (hospitals / f"{kind}-pool" / "model_card.md").read_text()
    assert "2 datasets, `home`, `away`" in card
    assert "All splits come from one dataset" not in card
    wrong = pooled(hospitals, kind, f"{kind}-wrong", *few, "data.alignment_texts=shuffled")
    assert auroc(wrong, "away") < auroc(metrics, "away") - 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_pooled_run_is_opened_as_it_ended_and_reads_further_hospitals(hospitals, kind):
    if not (hospitals / f"{kind}-pool").exists():
        pooled(hospitals, kind, f"{kind}-pool", "task.label_fraction=[1.0,0.04]", TRAINER[0])
    opened = open_run(hospitals / f"{kind}-pool")
    assert opened.is_pooled
    third = write_hospital(hospitals / f"third-{kind}", {f"t{n}": text for n, text in enumerate(AWAY.values())},
                           heart_unit=2.0, noise=3, seed=7, first=900)  # fmt: skip
    predictor = Predictor(hospitals / f"{kind}-pool", run=opened)
    before = {name: torch.as_tensor(x).clone() for name, x in opened.model.state_dict().items() if torch.is_tensor(x)}
    found = predictor.predict_proba(third, labels="case", split="train")
    labels = pl.read_parquet(third / "labels" / "case" / "0.parquet").join(found, on=["subject_id", "prediction_time"])
    cases = labels["boolean_value"].to_numpy()
    p = labels["probability_true"].to_numpy()
    assert (p[cases][:, None] > p[~cases]).mean() > 0.95
    after = opened.model.state_dict()
    for name, kept in before.items():
        torch.testing.assert_close(after[name], kept)
    again = predictor.predict_proba(third, labels="case", split="train")
    np.testing.assert_allclose(again["probability_true"], found["probability_true"], atol=1e-6)
    evaluated = pooled(hospitals, kind, f"{kind}-again", f"init_from={hospitals / f'{kind}-pool'}", "trainer.epochs=0")
    first = read_json(hospitals / f"{kind}-pool" / "metrics.json")
    assert auroc(evaluated, "away") == pytest.approx(auroc(first, "away"), abs=1e-6)


def test_one_dataset_is_left_out_and_read_unchanged(hospitals):
    folder = hospitals
    run(composed(
        "experiment=leave_one_out", f"data.roots=[{folder / 'home'},{folder / 'away'}]", "data.min_count=1", "data.tested=away",
        *MODELS["gbm"], *TRAINER[1:], f"run_dir={folder / 'left'}", f"cache_dir={folder / 'cache'}",
    ))  # fmt: skip
    metrics = read_json(folder / "left" / "metrics.json")
    assert list(metrics["datasets"]) == ["away"]
    assert list(read_json(folder / "left" / "pretrain" / "metrics.json")["datasets"]) == ["home"]
    assert metrics["all_splits"]["n"] == 270, "none of its labels was learned from"
    assert metrics["all_splits"]["auroc"]["value"] > 0.95


@pytest.mark.slow
def test_encoders_read_the_vectors_of_what_codes_are_read_as_and_datasets_may_weigh_alike(hospitals):
    metrics = pooled(
        hospitals, "encoder", "encoder", TRAINER[0], "data.pool_weights=datasets", "task.label_fraction=[1.0,0.1]"
    )
    assert auroc(metrics, "home") > 0.95
    assert auroc(metrics, "away") > 0.9
    with pytest.raises(UserError, match=r"label_fraction=\[0\.5\]: expected one share.*\(2\)"):
        pooled(hospitals, "gbm", "refused", "task.label_fraction=[0.5]")
