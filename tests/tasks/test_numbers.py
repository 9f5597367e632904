"""task=regression and task=multitask: a planted number is learned, metrics equal the libraries', and no row vanishes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import mean_absolute_error, r2_score

import ehr_embed
from ehr_embed.comparison.compare import paired_tests
from ehr_embed.comparison.tabulate import samples_digest, tabulate
from ehr_embed.core.errors import UserError
from ehr_embed.data.labels import read_labels
from ehr_embed.data.store import build_store
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.evaluation.predictions import read_predictions
from ehr_embed.evaluation.regression import regression_metrics
from ehr_embed.experiment.outlook import tell_outlook
from ehr_embed.experiment.preflight import preflight
from ehr_embed.experiment.run import run
from ehr_embed.inference.predictor import Predictor
from ehr_embed.inference.representer import Representer
from ehr_embed.models.label_outputs import LabelOutputs, OutputGroup
from ehr_embed.predict import predict
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.tasks.classification import Classification
from ehr_embed.tasks.multitask import Multitask
from ehr_embed.tasks.regression import Regression
from ehr_embed.tasks.set_up import set_up
from tests.helpers.configs import composed
from tests.helpers.refusals import refused
from tests.helpers.search_app.run import trials_of
from tests.helpers.searches import train
from tests.helpers.small_meds import Event, day, write_labels, write_meds

N = 120


def write_stays(root: Path) -> Path:
    """Subjects whose count of SICK events decides the stay (0, 4 or 8 days, and noise), the death of the odd ones and the stage of
    the first half; ids below 10,000 have labels of all sets, some at other times."""
    rng, splits = np.random.default_rng(0), {}
    stay, visits, dies, stage = [], [], [], []
    for number, split in enumerate(SPLITS):
        splits[split] = []
        for i in range(N):
            subject, level = 1000 * (number + 1) + i, i % 3
            codes = ["SICK" if k < level else f"N{rng.integers(3)}" for k in range(4)]
            events: list[Event] = [(subject, float(k), code, None) for k, code in enumerate(codes)]
            splits[split] += [*events, (subject, 50.0, "SICK", None)]
            stay.append((subject, 20.0, 100 + 4.0 * level + float(rng.normal(0, 0.5))))
            visits.append((subject, 20.0, 10 * level))
            if i % 2:
                dies.append((subject, 20.0, level == 2))
            if i < N // 2:
                stage.append((subject, 30.0, "ABC"[level]))
    labels = {"stay": stay, "visits": visits, "dies": dies, "stage": stage}
    return write_meds(root, splits, labels=labels)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_stays(tmp_path_factory.mktemp("stays") / "set")


def config(root: Path, name: str, *overrides: str):
    return composed(
        "data=meds", f"data.root={root}", "data.min_count=1", "embedder=hashing", "embedder.embedding_dim=16", "trainer=short",
        "trainer.n_bootstrap=40", "trainer.epochs=25", "trainer.learning_rate=1e-2", "trainer.warmup_steps=5",
        "trainer.patience=25", "trainer.precision=32-true",
        f"run_dir={root.parent / name}", f"cache_dir={root.parent / 'cache'}", *overrides,
    )  # fmt: skip


STAY = ("task=regression", "task.labels=stay")
MODELS = {"mean_pool": [], "gbm": ["model.min_leaf_samples=10", "model.learning_rate=0.1"], "ridge": []}


@pytest.fixture(scope="module")
def runs(root) -> dict[str, Path]:
    for model, more in MODELS.items():
        run(config(root, model, *STAY, f"model={model}", *more))
    return {model: root.parent / model for model in MODELS}


@pytest.fixture(scope="module")
def several(root) -> Path:
    run(
        config(
            root,
            "several",
            "task=multitask",
            "model=mean_pool",
            "task.labels=[stay,dies,stage]",
            "task.weights=balanced",
        )
    )
    return root.parent / "several"


def test_a_planted_number_is_learned_by_every_model_and_the_run_is_whole(runs):
    for model, folder in runs.items():
        held_out = json.loads((folder / "metrics.json").read_text())["held_out"]
        assert held_out["r2"]["value"] > 0.9, model
        assert held_out["mae"]["low"] < held_out["mae"]["value"] < 1, model
        assert held_out["label_mean"] == pytest.approx(104, abs=0.3)
        found = pl.read_parquet(folder / "predictions" / "held_out.parquet")
        assert found.columns == ["subject_id", "prediction_time", "float_value", "predicted_float_value"]
        assert found["predicted_float_value"].mean() == pytest.approx(104, abs=1), "in the labels' unit"
        assert (folder / "plots" / "predicted.png").is_file()
        card = (folder / "model_card.md").read_text()
        assert "label, mean (SD)" in card
        assert "| mae |" in card
        assert "Intervals wider" not in card or "mae (" not in card


def test_a_run_that_predicts_numbers_predicts_again_is_compared_and_tabulated(runs, root, capsys):
    written = pl.read_parquet(runs["mean_pool"] / "predictions" / "held_out.parquet")
    loaded = ehr_embed.load(runs["mean_pool"])
    again = loaded.predict_proba(root, labels="stay", split="held_out")
    assert again.columns == ["subject_id", "prediction_time", "predicted_stay"]
    np.testing.assert_allclose(again["predicted_stay"], written["predicted_float_value"], rtol=1e-5)
    for model in ("gbm", "mean_pool"):
        path = predict(composed(f"run={runs[model]}", f"data.root={root}", "task.labels=stay", "split=held_out",
                                f"output={root.parent / f'{model}.parquet'}", name="predict"))  # fmt: skip
        own = pl.read_parquet(runs[model] / "predictions" / "held_out.parquet")
        assert pl.read_parquet(path)["float_value"].equals(own["float_value"])
        np.testing.assert_allclose(
            pl.read_parquet(path)["predicted_float_value"], own["predicted_float_value"], rtol=1e-5
        )
    Representer(Predictor(runs["mean_pool"])).write(
        root.parent / "vectors.parquet", str(root), labels="stay", split="held_out"
    )
    assert pl.read_parquet(root.parent / "vectors.parquet")["float_value"].equals(written["float_value"])
    tell_outlook(config(root, "outlook", *STAY, "model=mean_pool"), root.parent / "outlook")
    assert re.search(r"label stay +train 120 \(median 10[34]", capsys.readouterr().out)
    predictions = {name: read_predictions(folder / "predictions" / "held_out.parquet") for name, folder in runs.items()}
    pairs = paired_tests(predictions, n_bootstrap=50)
    assert set(pairs["metric"]) == {"mae", "rmse", "r2", "spearman"}
    metrics = {name: json.loads((folder / "metrics.json").read_text())["held_out"] for name, folder in runs.items()}
    first = pairs[(pairs["metric"] == "mae") & (pairs["other"] == "ridge")].iloc[0]
    assert first["difference"] == pytest.approx(metrics["mean_pool"]["mae"]["value"] - metrics["ridge"]["mae"]["value"])
    table = tabulate(list(runs.values()), metrics=["held_out/mae", "ensemble/r2"], by=["folder"])
    assert all(group.statistics["ensemble/r2"].mean > 0.9 for group in table.groups)


def test_label_sets_of_all_kinds_are_learned_together_each_on_its_own_rows(several, root):
    metrics = json.loads((several / "metrics.json").read_text())["held_out"]
    own = metrics["per_label"]
    assert {name: own[name]["n"] for name in own} == {"stay": N, "dies": N // 2, "stage": N // 2}
    assert own["stay"]["r2"]["value"] > 0.9
    assert own["dies"]["auroc"]["value"] > 0.95
    assert own["stage"]["accuracy"]["value"] > 0.9
    assert metrics["auroc"]["value"] == pytest.approx(
        (own["dies"]["auroc"]["value"] + own["stage"]["auroc"]["value"]) / 2
    )
    assert metrics["r2"] == {"value": own["stay"]["r2"]["value"], "low": None, "high": None}
    found = pl.read_parquet(several / "predictions" / "held_out.parquet")
    assert len(found) == N + N // 2, "the stages are at another time, and no row is lost"
    assert found["stay/label"].null_count() == N // 2
    assert found["stage/label"].drop_nulls().unique().sort().to_list() == ["A", "B", "C"]
    again = ehr_embed.load(several).predict_proba(root, labels="dies", split="held_out")
    both = found.join(again, on=["subject_id", "prediction_time"])
    np.testing.assert_allclose(both["probability_dies"], both["dies/probability"], atol=1e-5)
    np.testing.assert_allclose(both["predicted_stay"], both["stay/predicted"], rtol=1e-5)
    np.testing.assert_allclose(both["probability_stage=B"], both["stage/probability_B"], atol=1e-5)
    assert {path.name for path in (several / "plots").iterdir()} >= {"roc.png", "predicted_stay.png"}
    vectors = root.parent / "vectors_of_several.parquet"
    Representer(Predictor(several)).write(vectors, str(root), labels="stay", split="held_out")
    assert len(pl.read_parquet(vectors)) == N
    card = (several / "model_card.md").read_text()
    assert all(re.search(rf"\b{name}\b", card) for name in own), card
    with refused("multitask", "tabulate"):
        read_predictions(several / "predictions" / "held_out.parquet")
    assert samples_digest(several) == str(len(found))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "metric", "least_is_best"),
    [(STAY, "mae", True), (("task=multitask", "task.labels=[stay,dies]"), "loss", True), (STAY, "r2", False)],
)
def test_a_search_takes_the_better_run_of_numbers_whichever_way_the_metric_points(
    root, tmp_path, task, metric, least_is_best
):
    output = train(
        "-m", "hydra/sweeper=study", "hydra/sweeper/sampler=grid", "hydra.sweeper.study_name=numbers", "data=meds",
        f"data.root={root}", "data.min_count=1", "embedder=hashing", "embedder.embedding_dim=16", "trainer=short",
        "model=mean_pool", "trainer.epochs=6", "trainer.warmup_steps=2", "trainer.n_bootstrap=20", *task,
        f"task.monitor={metric}", "trainer.learning_rate=0.02,1e-7", cwd=tmp_path,
    )  # fmt: skip
    assert "2 runs, best first" in output
    rates = {trial.params["trainer.learning_rate"]: trial.value for trial in trials_of(tmp_path, "numbers")}
    assert (rates["0.02"] < rates["1e-07"]) == least_is_best
    listed = output.partition("2 runs, best first")[2]
    assert listed.index("0.02") < listed.index("1e-07")


def store_of(root: Path, name: str):
    return build_store(root.parent / f"store_{name}", MedsSource(root=str(root)), VocabularySettings(min_count=1))


def test_a_missing_label_changes_no_loss_and_weights_hold_over_train(root):
    store = store_of(root, "weights")
    task = Multitask(labels=["stay", "dies", "stage"], weights="balanced")
    set_up(task, store, root / "labels", 16)
    known = ~np.isnan(task.samples["train"].labels)
    weights = task._weights_T.numpy()
    np.testing.assert_allclose((weights * known.sum(0)), (weights * known.sum(0))[0], rtol=1e-6)
    assert (weights * known).sum() / known.sum() == pytest.approx(1)
    logits = torch.randn(4, 5, requires_grad=True)
    targets = torch.tensor(
        [[0.5, 1, 2], [torch.nan, 0, torch.nan], [torch.nan, torch.nan, 0], [-1, torch.nan, torch.nan]]
    )
    loss = task.loss(logits, targets)
    assert ((loss == 0) == targets.isnan()).all()
    loss.sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[1] != 0).tolist() == [False, True, False, False, False]
    twice = Multitask(labels=["stay", "dies", "stage"], weights={"dies": 2.0})
    set_up(twice, store, root / "labels", 16)
    assert twice._weights_T[1] == pytest.approx(2 * twice._weights_T[0].item())


def test_numbers_are_standardised_by_train_alone_and_shuffled_ones_are_not_learned(root):
    store = store_of(root, "shuffled")
    task = Regression(labels="stay")
    set_up(task, store, root / "labels", 16)
    train = task.samples["train"].labels
    assert task.group is not None
    assert (task.group.mean, task.group.sd) == (train.mean(), train.std())
    shuffled = Regression(labels="stay", shuffle_labels=0)
    set_up(shuffled, store, root / "labels", 16)
    other = shuffled.samples["train"].labels
    assert sorted(other) == sorted(train)
    assert abs(np.corrcoef(other, train)[0, 1]) < 0.3
    outputs = LabelOutputs([OutputGroup(**(task.group.plain()))])
    labels = torch.from_numpy(train)
    torch.testing.assert_close(outputs.decode(outputs.standard(labels)[:, None])[:, 0], labels, rtol=1e-6, atol=1e-4)
    whole = Regression(labels="visits")
    set_up(whole, store, root / "labels", 16)
    assert set(whole.samples["train"].labels) == {0, 10, 20}


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_the_libraries_and_replicates_those_of_drawn_subjects(seed):
    rng = np.random.default_rng(seed)
    y, x = rng.integers(0, 6, 80).astype(float), rng.normal(0, 2, 80).round(1)
    ids = rng.integers(0, 30, 80)
    found = regression_metrics(y, x, subject_ids=ids, n_bootstrap=300, split_name="tuning")
    assert found["mae"]["value"] == pytest.approx(mean_absolute_error(y, x))
    assert found["rmse"]["value"] == pytest.approx(np.sqrt(np.mean((y - x) ** 2)))
    assert found["r2"]["value"] == pytest.approx(r2_score(y, x))
    assert found["spearman"]["value"] == pytest.approx(spearmanr(y, x).statistic)
    # Draws of subjects by hand: the interval of Spearman's correlation is that of the repeated samples.
    subjects, drawn = np.unique(ids), []
    for _ in range(300):
        index = np.concatenate([np.flatnonzero(ids == s) for s in rng.choice(subjects, len(subjects))])
        drawn.append(spearmanr(y[index], x[index]).statistic)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert found["spearman"]["low"] == pytest.approx(low, abs=0.06)
    assert found["spearman"]["high"] == pytest.approx(high, abs=0.06)


def test_labels_that_are_no_numbers_or_cannot_be_judged_are_refused_before_work(root, tmp_path):
    store, labels = store_of(root, "bad"), root / "labels"

    def of(**options) -> None:
        set_up(Regression(**options), store, labels, 16)

    with refused("boolean_value", "task=classification"):
        of(labels="dies")
    with refused("float_value", "task=regression"):
        set_up(Classification(labels="stay"), store, labels, 16)
    subjects = [1000 * (number + 1) + i for number in range(3) for i in range(N)]
    same = write_labels(tmp_path / "same", [(s, 20.0, 7.0 if 2000 <= s < 3000 else float(s)) for s in subjects])
    with refused("split tuning", "are 7"):
        of(labels=str(same))
    odd = write_labels(tmp_path / "odd", [(s, 20.0, float("nan") if s == 1003 else float(s)) for s in subjects])
    with refused("split train", "NaN or infinite"):
        preflight(config(root, "never", "task=regression", f"task.labels={odd}"), root.parent / "never")
    file = tmp_path / "text.parquet"
    pl.DataFrame({"subject_id": [1], "prediction_time": [day(1.0)], "float_value": ["3.5"]}).write_parquet(file)
    with refused("`float_value`", "String"):
        read_labels(str(file), labels)
    for model, name in (("logistic", "model=ridge"), ("ridge", "task=regression")):
        own = STAY if model == "logistic" else ("task.labels=dies",)
        with refused(name):
            run(config(root, f"no_{model}", *own, f"model={model}"))


def test_options_of_several_label_sets_are_refused_before_work(root):
    def sets(**options):
        return Multitask(**options).label_sets(root / "labels")

    assert [own.are_numbers for own in sets(labels=["stay", "visits", "dies"])] == [True, True, False]
    assert [own.are_numbers for own in sets(labels=["stay", "visits"], kinds={"visits": "classes"})] == [True, False]
    with refused("task=multitask", "task.labels=[NAME,NAME]"):
        sets(labels=["stay"])
    with refused("task.main", "stay"):
        sets(labels=["stay", "dies"], main="stya")
    with refused("task.monitor=auroc", "task.monitor=loss"):
        sets(labels=["stay", "visits"], monitor="auroc")
    with refused("task.kinds.dies=classes", "binary"):
        sets(labels=["stay", "dies"], kinds={"dies": "classes"})
    with pytest.raises(UserError, match=r"task\.weights\.dies=0"):
        sets(labels=["stay", "dies"], weights={"dies": 0})
    with refused("Multitask", "task=classification"):
        run(config(root, "trees", "task=multitask", "task.labels=[stay,dies]", "model=gbm"))
