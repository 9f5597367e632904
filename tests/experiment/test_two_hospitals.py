"""One model across two hospitals whose codes, units and habits differ, by `train.py` and by `predict` alike."""

import logging
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import read_json
from ehr_embed.embedding.aligning import AlignmentSettings
from ehr_embed.experiment.run import run
from ehr_embed.explain import explain
from ehr_embed.inference.predictor import Predictor
from ehr_embed.inference.representer import Representer
from ehr_embed.inference.trained_run import open_run
from ehr_embed.predict import predict
from tests.helpers.configs import composed
from tests.helpers.two_hospitals import AWAY, HOME, MODELS, TRAINER, config, write_hospital


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hospitals")
    write_hospital(folder / "home", HOME, heart_unit=1.0, noise=0, seed=0, first=0)
    write_hospital(folder / "away", AWAY, heart_unit=1 / 60, noise=6, seed=1, first=50_000)
    for kind in MODELS:
        run(config(folder, "home", kind, f"{kind}-home", TRAINER[0]))
    return folder


def auroc(folder: Path, run_dir: str, part: str = "held_out") -> float:
    return float(read_json(folder / run_dir / "metrics.json")[part]["auroc"]["value"])


@pytest.mark.parametrize("kind", MODELS)
def test_texts_carry_a_model_to_another_hospital_and_wrong_ones_do_not(hospitals, kind, caplog):
    start = [f"init_from={hospitals / f'{kind}-home'}", "trainer.epochs=0"]
    with caplog.at_level(logging.INFO):
        run(config(hospitals, "away", kind, f"{kind}-away", *start))
    assert "100.0% of the events have codes that the run never saw" in caplog.text
    assert "Vital signs > HR -> Heart rate (beats per minute)" in caplog.text
    assert auroc(hospitals, f"{kind}-home") > 0.95
    assert auroc(hospitals, f"{kind}-away") > 0.95
    metrics = read_json(hospitals / f"{kind}-away" / "metrics.json")
    assert metrics["all_splits"]["n"] == 270, "train's labels are new to this model too"
    table = pl.read_csv(hospitals / f"{kind}-away" / "alignment.csv")
    assert dict(table.filter(pl.col("gate") > 0).select("code", "matched_code").iter_rows()) == {
        "v//1": "HR", "l//2": "NA", "l//3": "GLU", "d//4": "FEVER",
    }  # fmt: skip
    assert (
        "1.3 here, " not in table.filter(code="l//2")["warning"][0] if table.filter(code="l//2")["warning"][0] else True
    )
    assert "times as small" in table.filter(code="v//1")["warning"][0]
    run(config(hospitals, "away", kind, f"{kind}-wrong", *start, "data.alignment_texts=shuffled"))
    assert auroc(hospitals, f"{kind}-wrong", "all_splits") < 0.65


@pytest.mark.parametrize("kind", ["gbm", "encoder"])
def test_predict_says_what_the_evaluation_says(hospitals, kind):
    start = [f"init_from={hospitals / f'{kind}-home'}", "trainer.epochs=0"]
    run(config(hospitals, "away", kind, f"{kind}-evaluated", *start))
    predictor = Predictor(hospitals / f"{kind}-home")
    found = predictor.predict_proba(hospitals / "away", labels="case", split="train")
    evaluated = pl.read_parquet(hospitals / f"{kind}-evaluated" / "predictions" / "train.parquet")
    both = found.join(evaluated, on=["subject_id", "prediction_time"])
    assert len(both) == len(found) == 90
    np.testing.assert_allclose(both["probability_true"], both["predicted_boolean_probability"], atol=2e-3)
    again = predictor.predict_proba(hospitals / "home", labels="case", split="held_out")
    own = pl.read_parquet(hospitals / f"{kind}-home" / "predictions" / "held_out.parquet")
    np.testing.assert_allclose(again["probability_true"], own["predicted_boolean_probability"], atol=1e-5)


def test_vectors_of_another_hospital_are_made_of_the_runs_own_codes(hospitals, caplog):
    predictor = Predictor(hospitals / "encoder-home", needs_classes=False)
    representer = Representer(predictor)

    def vectors(aligned_to: str) -> tuple[np.ndarray, np.ndarray]:
        frame = pl.concat(
            representer.frames(
                str(hospitals / "away"),
                labels="case",
                split="held_out",
                alignment=AlignmentSettings(aligned_to=aligned_to),
            )
        )
        return frame["vector"].to_numpy(), frame["boolean_value"].to_numpy()

    x, is_case = vectors("auto")
    away_from = x - x[::2].mean(0)
    direction = x[::2][is_case[::2]].mean(0) - x[::2][~is_case[::2]].mean(0)
    score, truth = (away_from @ direction)[1::2], is_case[1::2]
    assert (score[truth][:, None] > score[~truth]).mean() > 0.9
    assert not np.allclose(vectors("none")[0], x)
    with caplog.at_level(logging.WARNING):
        predictor.read(str(hospitals / "away"), labels="case", split="held_out", lookups=())
    assert "which are read by their texts alone" in caplog.text


@pytest.mark.parametrize("kind", ["code_tab", "encoder"])
def test_an_aligned_model_goes_on_learning_and_is_opened_as_it_ended(hospitals, kind):
    name = f"{kind}-tuned"
    start = [f"init_from={hospitals / f'{kind}-home'}", "trainer.epochs=1"]
    run(config(hospitals, "away", kind, name, *start, "trainer.learning_rate=1e-4"))
    assert auroc(hospitals, name) > 0.95
    assert open_run(hospitals / name).matches is not None
    found = Predictor(hospitals / name).predict_proba(hospitals / "away", labels="case", split="held_out")
    own = pl.read_parquet(hospitals / name / "predictions" / "held_out.parquet")
    np.testing.assert_allclose(found["probability_true"], own["predicted_boolean_probability"], atol=1e-5)
    with pytest.raises(UserError, match=r"Type: init_from= that run, or data\.aligned_to=none"):
        run(config(hospitals, "home", kind, f"{kind}-third", f"init_from={hospitals / name}", "trainer.epochs=0"))


def test_a_strong_pull_leaves_the_model_as_it_came(hospitals):
    start = [f"init_from={hospitals / 'encoder-home'}"]
    run(config(hospitals, "away", "encoder", "pulled", *start, "trainer.epochs=1", "trainer.pull=1e9"))
    run(config(hospitals, "away", "encoder", "untouched", *start, "trainer.epochs=0"))
    found, expected = (
        pl.read_parquet(hospitals / name / "predictions" / "held_out.parquet") for name in ("pulled", "untouched")
    )
    np.testing.assert_allclose(*(f["predicted_boolean_probability"] for f in (found, expected)), atol=1e-6)
    with pytest.raises(UserError, match=r"trainer\.pull=0\.1: .*init_from=RUN_DIR"):
        run(config(hospitals, "away", "encoder", "refused", "trainer.epochs=1", "trainer.pull=0.1"))


def test_own_pairs_and_none(hospitals, tmp_path):
    start = [f"init_from={hospitals / 'gbm-home'}", "trainer.epochs=0"]
    (tmp_path / "swap.csv").write_text("code,matched_code\nv//1,NA\nl//2,HR\n")
    run(config(hospitals, "away", "gbm", "gbm-swapped", *start, f"data.alignment_pairs={tmp_path / 'swap.csv'}"))
    assert auroc(hospitals, "gbm-swapped", "all_splits") < 0.65, "a person's word counts more than a text's"
    run(config(hospitals, "away", "gbm", "gbm-none", *start, "data.aligned_to=none"))
    assert not (hospitals / "gbm-none" / "alignment.csv").exists()
    assert auroc(hospitals, "gbm-none", "all_splits") == 0.5, "boosting knows no code of the other hospital"


def test_what_cannot_be_aligned_is_refused_before_the_run_begins(hospitals, tmp_path):
    start = [f"init_from={hospitals / 'gbm-home'}", "trainer.epochs=0"]
    (tmp_path / "p.csv").write_text("code,matched_code\nv//9,HR\n")
    for overrides, match in (
        ([*start, f"data.alignment_pairs={tmp_path / 'p.csv'}"], r"data\.alignment_pairs .*v//9"),
        ([*start, f"data.alignment_pairs={tmp_path / 'none.csv'}"], r"data\.alignment_pairs=\S*none\.csv"),
        (
            ["data.aligned_to=somewhere", "trainer.epochs=1"],
            r"data\.aligned_to=somewhere: .*init_from=RUN_DIR",
        ),
    ):
        with pytest.raises(UserError, match=match):
            run(config(hospitals, "away", "gbm", "refused", *overrides))
    assert not (hospitals / "refused").exists()
    with pytest.raises(UserError, match=r"data\.alignment_pairs=\S*none\.csv"):
        predict(composed(
            f"run={hospitals / 'gbm-home'}", f"data.root={hospitals / 'away'}", f"output={tmp_path / 'o.parquet'}",
            f"data.alignment_pairs={tmp_path / 'none.csv'}", name="predict",
        ))  # fmt: skip


def test_a_hospital_or_a_run_without_texts_is_refused_before_the_run_begins(hospitals, tmp_path):
    silent = dict.fromkeys(("q//1", "q//2", "q//3", "q//4", "q//5"), "")
    write_hospital(hospitals / "silent", silent, heart_unit=1.0, noise=0, seed=2, first=90_000)
    run(config(hospitals, "silent", "gbm", "gbm-silent", TRAINER[0]))
    for data, start in (("silent", "gbm-home"), ("away", "gbm-silent")):
        with pytest.raises(UserError, match=r"may lack texts: .*metadata/codes\.parquet"):
            run(config(hospitals, data, "gbm", "refused", f"init_from={hospitals / start}", "trainer.epochs=0"))
        with pytest.raises(UserError, match=r"may lack texts: .*data\.aligned_to=none"):
            predict(composed(
                f"run={hospitals / start}", f"data.root={hospitals / data}", f"output={tmp_path / 'o.parquet'}", name="predict"
            ))  # fmt: skip
    assert not (hospitals / "refused").exists()
    assert not (tmp_path / "o.parquet").exists()


def test_a_cache_of_texts_changes_no_prediction_and_is_read_again(hospitals, tmp_path, monkeypatch):
    def predicted(name: str, **cache: str) -> pl.DataFrame:
        overrides = [f"data.{key}={value}" for key, value in cache.items()]
        predict(composed(
            f"run={hospitals / 'encoder-home'}", f"data.root={hospitals / 'away'}", f"output={tmp_path / name}",
            "task.labels=case", "split=tuning", *overrides, name="predict",
        ))  # fmt: skip
        return pl.read_parquet(tmp_path / name)

    kept = tmp_path / "kept"
    expected = predicted("none.parquet")
    assert predicted("written.parquet", alignment_cache=str(kept)).equals(expected)
    assert list((kept / "embeddings").glob("*.sqlite"))

    def embeds(self, texts):
        raise AssertionError(f"embedded again: {texts}")

    monkeypatch.setattr("ehr_embed.embedders.sentence_transformer.SentenceTransformerEmbedder.embed", embeds)
    assert predicted("read.parquet", alignment_cache=str(kept)).equals(expected)


def test_numbers_are_ranked_without_labels_and_without_other_splits(hospitals):
    """Held-out numbers, however wild, change no probability of train's subjects."""
    predictor = Predictor(hospitals / "gbm-home")
    before = predictor.predict_proba(hospitals / "away", labels="case", split="train")
    path = hospitals / "away" / "data" / "held_out" / "0.parquet"
    kept = pl.read_parquet(path)
    try:
        kept.with_columns(pl.col("numeric_value") * 1e6).write_parquet(path)
        start = [f"init_from={hospitals / 'gbm-home'}", "trainer.epochs=0", f"cache_dir={hospitals / 'other'}"]
        run(composed(*[o for o in _overrides(hospitals) if not o.startswith("cache_dir")], *start))
    finally:
        kept.write_parquet(path)
    after = pl.read_parquet(hospitals / "wild" / "predictions" / "train.parquet")
    both = before.join(after, on=["subject_id", "prediction_time"])
    np.testing.assert_allclose(both["probability_true"], both["predicted_boolean_probability"], atol=2e-3)


def _overrides(folder: Path) -> list[str]:
    return [
        "data=meds", f"data.root={folder / 'away'}", "data.values=continuous", "data.min_count=1", *MODELS["gbm"], *TRAINER[1:],
        f"run_dir={folder / 'wild'}",
    ]  # fmt: skip


def test_settings_say_when():
    assert AlignmentSettings(aligned_to="runs/a").is_wanted(0.0)
    assert AlignmentSettings().is_wanted(0.6)
    assert not AlignmentSettings(aligned_to="none").is_wanted(1.0)


def test_an_explanation_reads_another_hospitals_codes_as_the_prediction_does(hospitals, tmp_path):
    path = tmp_path / "p.parquet"
    common = [f"data.root={hospitals / 'away'}", "task.labels=case"]
    for kind in ("gbm", "encoder"):
        asked = [f"run={hospitals / f'{kind}-home'}", *common]
        predict(composed(*asked, f"output={path}", name="predict"))
        subject = int(pl.read_parquet(path)["subject_id"][3])
        explain(composed(*asked, f"subject={subject}", f"output={tmp_path / kind}", name="explain"))
        table = pl.read_csv(tmp_path / kind / f"subject_{subject}.csv")
        assert set(table["code"]) <= {"v//1", "l//2", "l//3", "d//4"}, (
            "events without a match are left out, as in predict"
        )
        moved = table.group_by("code").agg(pl.col("attribution").abs().sum()).sort("attribution")
        assert moved["code"][-1] == "v//1", "the heart rate means the label"
