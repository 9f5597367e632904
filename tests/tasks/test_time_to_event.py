"""task=time_to_event: targets equal the oracle, a planted risk is found and asked for in words, bad input is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml

import ehr_embed
from ehr_embed.ask import _shown, ask
from ehr_embed.core.errors import UserError
from ehr_embed.data.batches import BatchDataset
from ehr_embed.data.labels import read_labels
from ehr_embed.data.outcomes import EVENT, EXCLUDED, TokenPlaces, follow_up
from ehr_embed.data.samples import build_samples, window_samples
from ehr_embed.data.store import EventStore, build_store
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.embedding.aligning import AlignmentSettings
from ehr_embed.evaluation import survival_library
from ehr_embed.experiment.run import run
from ehr_embed.inference.asker import Asker
from ehr_embed.models import hazards
from ehr_embed.sources.meds import MedsSource
from ehr_embed.sources.protocol import SPLITS
from ehr_embed.tasks.hazards_everywhere import AutoOutcomes, targets
from ehr_embed.tasks.query import Query
from ehr_embed.tasks.set_up import set_up
from ehr_embed.tasks.time_to_event import TimeToEvent
from tests.helpers.configs import composed
from tests.helpers.refusals import refused
from tests.helpers.small_meds import Event, write_meds

TEXTS = [
    ("SMOKE", "Tobacco smoking", None),
    ("VISIT", "Visit to the clinic", None),
    ("MI", "Myocardial infarction", None),
    ("FLU", "Influenza", None),
    ("MEDS_DEATH", "Death", None),
    ("END", "End of follow-up", None),
]


def write_smokers(root: Path, *, n: int = 90) -> Path:
    """Records of 40 to 60 days: smokers have an infarction at a rate of 0.05 a day from day 10 on, others of 0.005; some die."""
    rng, splits, labels = np.random.default_rng(0), {}, []
    for number, split in enumerate(SPLITS):
        splits[split] = []
        for subject in range(1000 * number, 1000 * number + n):
            smokes = subject % 2 == 0
            events: list[Event] = [(subject, 0.0, "VISIT", None)]
            events += [(subject, float(day), "SMOKE" if smokes else "FLU", None) for day in (2, 5, 9)]
            events.append((subject, 10.0, "VISIT", None))
            end = float(rng.uniform(40, 60))
            infarction = 10 + float(rng.exponential(20 if smokes else 200))
            death = 10 + float(rng.exponential(300))
            events += [(subject, day, "VISIT", None) for day in np.arange(15.0, min(end, death), 5.0)]
            if infarction < min(end, death):
                events.append((subject, infarction, "MI", None))
            events.append((subject, death, "MEDS_DEATH", None) if death < end else (subject, end, "END", None))
            splits[split] += sorted(events, key=lambda event: event[1])
            labels.append((subject, 10.0, bool(infarction < min(40, end, death))))
    return write_meds(root, splits, codes=TEXTS, labels={"infarction_30d": labels})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_smokers(tmp_path_factory.mktemp("smokers") / "set")


@pytest.fixture(scope="module")
def store(root) -> EventStore:
    return build_store(root.parent / "store", MedsSource(root=str(root)), VocabularySettings(values="none"))


def small(root: Path, name: str, *overrides: str) -> list[str]:
    return [
        "data=meds", f"data.root={root}", f"run_dir={root.parent / name}", f"cache_dir={root.parent / 'cache'}", "data.values=none",
        "task=time_to_event", "embedder=hashing", "trainer=short", "trainer.n_bootstrap=20", "audit=off",
        "trainer.precision=32-true", "trainer.warmup_steps=5", *overrides,
    ]  # fmt: skip


INFARCTION = (
    "task.outcomes={infarction: {text_pattern: infarct}}",
    "task.times=infarction_30d",
    "task.horizons_days=[10,30]",
)


@pytest.fixture(scope="module")
def once(root) -> Path:
    """A run that was trained on infarctions from day 10 on."""
    run(composed(*small(root, "once", *INFARCTION, "task.end_of_follow_up=[END]", "model=mean_pool", "trainer.epochs=15",
                        "trainer.learning_rate=1e-2", "task.n_bins=2", "task.width=4")))  # fmt: skip
    return root.parent / "once"


@pytest.fixture(scope="module")
def everywhere(root) -> Path:
    """A run that was pretrained on all codes but infarctions, and on unions of them."""
    run(composed(*small(root, "everywhere", "task.outcomes=auto", "model=decoder_small", "model.pooling=last", "trainer.epochs=25",
                        "trainer.learning_rate=5e-3", "task.n_bins=3", "task.width=8", "task.auto.min_events=5",
                        "model.max_length=64") ))  # fmt: skip
    return root.parent / "everywhere"


def test_a_planted_risk_is_found_and_written(once):
    metrics = json.loads((once / "metrics.json").read_text())
    held_out = metrics["held_out"]
    assert 0.65 < held_out["concordance"]["value"] < 0.9
    assert held_out["concordance"]["low"] < held_out["concordance"]["value"] < held_out["concordance"]["high"]
    assert held_out["auroc_t"]["value"] > 0.65
    assert held_out["n_competing"] > 0
    at = held_out["at_horizons"]["30"]
    assert abs(at["predicted"] - at["observed"]) < 0.15
    found = pl.read_parquet(once / "predictions" / "held_out.parquet")
    assert found.columns[:2] == ["subject_id", "prediction_time"]
    assert set(found["infarction/status"]) == {"event", "censored", "competing"}
    assert (found["infarction/risk_30d"] > found["infarction/risk_10d"]).all()
    smokes = found["subject_id"] % 2 == 0
    risks = found["infarction/risk_30d"]
    assert risks.filter(smokes).mean() > 2 * risks.filter(~smokes).mean()
    assert (once / "plots" / "risk_groups_infarction.png").is_file()


def test_a_run_is_asked_for_its_own_outcome_in_python_and_on_the_command_line(once, root):
    asker = ehr_embed.load(once)
    assert isinstance(asker, Asker)
    answers = asker.ask([], root, horizon_days=30, labels="infarction_30d")
    written = pl.read_parquet(once / "predictions" / "held_out.parquet")
    both = written.join(answers.frame, on=["subject_id", "prediction_time"])
    assert len(both) == len(written)
    np.testing.assert_allclose(both["infarction/risk"], both["infarction/risk_30d"], atol=1e-5)
    folder = ask(composed(f"run={once}", f"data.root={root}", "horizon_days=30", "labels=infarction_30d", "n_bootstrap=10",
                          f"output={once.parent / 'asked'}", name="ask"))  # fmt: skip
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["held_out"]["auroc"]["value"] > 0.65
    survival = pl.read_parquet(folder / "answers.parquet")["infarction/survival"]
    assert (survival.list.len() == 12).all()
    assert survival.list.diff().list.slice(1).list.max().max() <= 0  # survival never rises
    assert len(list((folder / "plots").iterdir())) == 1


def test_pretraining_beats_constant_rates_and_answers_in_words(everywhere, root):
    metrics = json.loads((everywhere / "metrics.json").read_text())["held_out"]
    assert metrics["gain"]["value"] > 0.1
    asker = ehr_embed.load(everywhere)
    answers = asker.ask(["Myocardial infarction", "Influenza"], root, horizon_days=30, labels="infarction_30d")
    assert [event.code for event in answers.questions[0].events] == ["MI"]
    smokes = (answers.frame["subject_id"] % 2 == 0).to_numpy()
    risk = answers.incidence[:, 0, -1]
    assert risk[smokes].mean() > 1.3 * risk[~smokes].mean()
    assert answers.has_prior[:, 1].mean() == 0.5
    with pytest.raises(UserError, match="min_cosine"):
        asker.questions(["zzzz qqqq xxxx"])
    literal = asker.ask(["zzzz qqqq xxxx"], root, literal=True)
    assert np.isfinite(literal.incidence).all()
    by_code = asker.ask({"heart": {"codes": ["MI"]}}, root, horizon_days=30, labels="infarction_30d")
    np.testing.assert_allclose(by_code.incidence[:, 0], answers.incidence[:, 0], atol=1e-6)


def test_another_hospitals_codes_are_read_as_the_runs_own(everywhere, root, tmp_path):
    """The same subjects under other codes have the same risks and the same earlier outcomes as under the run's own."""
    away = {
        "SMOKE": ("x1", "Smokes tobacco"), "VISIT": ("x2", "Clinic visit"), "MI": ("x3", "Heart attack"),
        "FLU": ("x4", "Influenza"), "MEDS_DEATH": ("MEDS_DEATH", "Death"), "END": ("x5", "End of the follow-up"),
    }  # fmt: skip
    shutil.copytree(root, tmp_path / "away")
    for path in (tmp_path / "away" / "data").glob("*/*.parquet"):
        frame = pl.read_parquet(path)
        frame.with_columns(pl.col("code").replace({code: new for code, (new, _) in away.items()})).write_parquet(path)
    rows = [(code, text, None) for code, text in away.values()]
    schema = {"code": pl.String, "description": pl.String, "parent_codes": pl.List(pl.String)}
    pl.DataFrame(rows, schema=schema, orient="row").write_parquet(tmp_path / "away" / "metadata" / "codes.parquet")
    asker = ehr_embed.load(everywhere)
    asked = {"heart": {"codes": ["MI"]}, "flu": {"codes": ["FLU"]}}
    own = asker.ask(asked, root, horizon_days=30, labels="infarction_30d")
    settings = AlignmentSettings(matching="one_to_one")
    away_too = asker.ask(asked, tmp_path / "away", horizon_days=30, labels="infarction_30d", alignment=settings)
    np.testing.assert_allclose(away_too.incidence, own.incidence, atol=1e-6)
    np.testing.assert_array_equal(away_too.has_prior, own.has_prior)
    unread = asker.ask(
        asked,
        tmp_path / "away",
        horizon_days=30,
        labels="infarction_30d",
        alignment=AlignmentSettings(aligned_to="none"),
    )
    assert np.abs(unread.incidence - own.incidence).max() > 0.01


def test_prediction_times_that_share_a_record_have_the_answers_of_each_alone(everywhere, root, tmp_path, monkeypatch):
    times = read_labels("infarction_30d", root / "labels", needs_values=False).in_meds()
    times = times.select("subject_id", "prediction_time")
    later = [times.with_columns(pl.col("prediction_time") + pl.duration(days=days)) for days in (0, 4, 9, 12)]
    pl.concat(later).write_parquet(tmp_path / "times.parquet")
    asker = Asker(everywhere)
    questions = asker.questions({"flu": {"codes": ["FLU"]}, "smoking or death": {"codes": ["SMOKE", "MEDS_DEATH"]}})
    data = asker.read(str(root), labels=str(tmp_path / "times.parquet"), split="held_out", lookups=())
    read = []
    batches = Asker.batches

    def counted(self, data):
        read.append(len(data.samples))
        return batches(self, data)

    monkeypatch.setattr(Asker, "batches", counted)
    body, asked = asker.run.model.body, []
    at = body.attend_at
    monkeypatch.setattr(hazards, "FEW", 1)
    monkeypatch.setattr(body, "packs", False)  # a CPU leaves padding out, and then computes all places
    monkeypatch.setattr(body, "attend_at", lambda *given: asked.append(given[1].numel()) or at(*given))
    shared = asker.incidence(data, questions, [10.0, 30.0])
    alone = asker.incidence(data, questions, [10.0, 30.0], shares=False)
    n_subjects = len(np.unique(data.samples.subject_ids))
    assert read == [n_subjects, len(data.samples)]
    assert sum(asked) >= len(data.samples), "the last block was computed at the asked places alone"
    assert len(data.samples) == 4 * n_subjects
    np.testing.assert_allclose(shared, alone, rtol=1e-4, atol=1e-6)
    by_subject = alone[np.argsort(data.samples.subject_ids, kind="stable"), 0, -1].reshape(n_subjects, 4)
    assert (
        by_subject.std(1) > 1e-6
    ).mean() > 0.5  # the answers of a subject differ by time, so a mistaken place would show


def test_records_of_a_single_time_are_evaluated_with_nothing_to_predict(everywhere, store, root):
    own, asker = TimeToEvent(outcomes="auto", n_bins=3, width=8, auto={"min_events": 5}), Asker(everywhere)
    set_up(own, store, root / "labels", 64)
    events = store.split("held_out")
    first = pl.DataFrame({"subject_id": events.subject_ids, "prediction_time": events.times[events.offsets[:-1]]})
    samples = build_samples(events, first, np.zeros(len(first), np.int64), max_length=64)
    with torch.inference_mode():
        step = own.step(asker.run.model, asker.run.embedding, BatchDataset(events, samples)[np.arange(4)])
    assert (float(step.loss_sum), int(step.count)) == (0.0, 0)


def test_many_outcomes_are_judged_without_labels(everywhere, root, capsys):
    from benchmarks import asked_outcomes

    given = [str(everywhere), str(root), "--split", "held_out", "--horizon_days", "15", "--least", "3"]
    asked_outcomes.main([*given, "--unions", "12", "--each", "--leave_out", "influ"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["codes"] == len(found["each"]) > 0
    assert found["each"]["MI"] > 0.6, "smokers have infarctions"
    assert found["auroc"] == pytest.approx(np.mean(list(found["each"].values())), abs=1e-3)
    assert found["unions"] > 0
    assert 0 <= found["auroc_of_unions"] <= 1
    assert "FLU" not in found["each"]


def test_families_kept_out_of_pretraining_are_compared_with_themselves_in_training(
    everywhere, root, monkeypatch, capsys
):
    from benchmarks import outcome_families

    outcome_families.main(["draw", str(everywhere), "--folds", "2", "--leave_out", "influ"])
    folds = [yaml.safe_load(line.partition("=")[2])["codes"] for line in capsys.readouterr().out.splitlines()]
    assert len(folds) == 2
    assert not set(folds[0]) & set(folds[1])
    assert {"MI", "SMOKE"} <= {code for fold in folds for code in fold}
    assert "FLU" not in {code for fold in folds for code in fold}

    class KeepsOut(Asker):
        """A run that says of itself, if it is opened as `out`, that infarctions were in no set."""

        def __init__(self, run_dir):
            super().__init__(everywhere)
            self.run.config["task"]["auto"]["never"] = {"codes": ["MI"]} if run_dir == "out" else None

    monkeypatch.setattr(outcome_families, "Asker", KeepsOut)
    outcome_families.main(["judge", str(root), "out", "in", "--horizon_days", "15", "--least", "3"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["families"], found["codes"]) == (1, 1)
    assert found["auroc_kept_out"] == found["auroc_trained"] > 0.6, "both are the same run"
    assert found["share"] == found["families_above_0.9"] == 1.0


def test_a_question_takes_less_time_than_sampled_futures(everywhere, root, capsys):
    from benchmarks import ask as benchmark

    given = small(
        root, "next", "model=decoder_small", "model.max_length=80", "trainer.epochs=1", "trainer.n_bootstrap=0"
    )
    given[given.index("task=time_to_event")] = "task=next_event"
    run(composed(*given))
    runs = [str(everywhere), str(root.parent / "next")]
    benchmark.main(
        [*runs, str(root), "infarction_30d", "--question", "Influenza", "--subjects", "20", "--repeats", "1"]
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["predictions"] == 20
    assert found["cpu_ratio"] > 1
    assert found["cpu_ratio_alone"] > 1
    assert found["wall_ms_per_prediction_asked"] > 0


def test_a_query_is_judged_like_any_run_and_gives_the_risks_of_ask(everywhere, root, store, tmp_path, caplog):
    given = small(root, "query", "model=decoder_small", "model.max_length=64", f"init_from={everywhere}",
                  "task.text_pattern=infarct", "task.horizon_days=30", "task.labels=infarction_30d")  # fmt: skip
    given[given.index("task=time_to_event")] = "task=query"
    run(composed(*given))
    folder = root.parent / "query"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["held_out"]["auroc"]["value"] > 0.6
    asked = ehr_embed.load(everywhere).ask({"mi": {"codes": ["MI"]}}, root, horizon_days=30, labels="infarction_30d")
    written = pl.read_parquet(folder / "predictions" / "held_out.parquet")
    both = written.join(asked.frame, on=["subject_id", "prediction_time"])
    assert len(both) == len(written) == 90
    np.testing.assert_allclose(both["predicted_boolean_probability"], both["mi/risk"], atol=1e-5)
    caplog.set_level("INFO", logger="ehr_embed")
    in_words = [own for own in given if not own.startswith(("task.text_pattern", "run_dir"))]
    run(composed(*in_words, "task.words=heart infarction", "task.min_cosine=0.3", f"run_dir={tmp_path / 'words'}"))
    worded = pl.read_parquet(tmp_path / "words" / "predictions" / "held_out.parquet")
    assert worded.equals(written)
    assert "Myocardial infarction (cosine" in caplog.text
    with refused("zzzz", "task.min_cosine=SMALLER", "task.codes=[CODE]"):
        run(composed(*in_words, "task.words=zzzz qqqq", f"run_dir={tmp_path / 'nothing'}"))
    assert not (tmp_path / "nothing" / "metrics.json").exists()
    with refused("task.words=stroke", "task.codes", "Leave one out"):
        Query(words="stroke", codes=["MI"])
    with refused("no hazard head", "pretrain_hazards"):
        Query(codes=["MI"]).take_sizes({"num_classes": 2}, tmp_path)
    with refused("one event set", "task.text_pattern=REGEX", "task.words=WORDS"):
        Query()
    shorter = [own for own in given if not own.startswith("run_dir")]
    with refused("vocabulary", "ehr_embed.ask"):  # value bins give other tokens
        other = write_smokers(tmp_path / "other", n=60)
        run(composed(*(f"data.root={other}" if own.startswith("data.root") else own for own in shorter),
                     "data.min_count=70", f"run_dir={tmp_path / 'run'}"))  # fmt: skip


def test_a_run_that_predicts_no_times_says_how_to_get_one(root, tmp_path):
    run(composed("data=meds", f"data.root={root}", f"run_dir={tmp_path / 'classes'}", f"cache_dir={root.parent / 'cache'}",
                 "data.values=none", "embedder=hashing", "model=mean_pool", "trainer=short", "trainer.epochs=1",
                 "trainer.n_bootstrap=0", "task.labels=infarction_30d", "audit=off"))  # fmt: skip
    with pytest.raises(UserError, match="experiment=pretrain_hazards"):
        Asker(tmp_path / "classes")
    from ehr_embed.inference.predictor import Predictor

    with pytest.raises(UserError, match=r"ehr_embed\.ask"):
        Predictor(root.parent / "once") if (root.parent / "once").exists() else Predictor(root.parent / "everywhere")


@pytest.mark.parametrize("excludes_prior", [True, False])
def test_targets_of_whole_records_equal_those_of_single_prediction_times(store, excludes_prior):
    events, V = store.split("train"), len(store.vocabulary)
    windows = window_samples(events, max_length=64, which="last")
    batch = BatchDataset(events, windows)[np.arange(len(windows))]
    code = {text: token for token, text in enumerate(store.vocabulary.strings)}
    sets, stops = [[code["MI"]], [code["SMOKE"], code["VISIT"]], [code["FLU"]]], [code["MEDS_DEATH"], code["END"]]
    member, stops_V = torch.zeros(3, V, dtype=torch.bool), torch.zeros(V, dtype=torch.bool)
    for row, tokens in enumerate(sets):
        member[row, tokens] = True
    stops_V[stops] = True
    found = targets(batch, member, stops_V, excludes_prior=excludes_prior)
    row, place = found.asked_at.nonzero().numpy().T
    at = events.times[windows.start[row] + place]
    frame = pl.DataFrame({"subject_id": windows.subject_ids[row], "prediction_time": at.astype("datetime64[us]")})
    samples = build_samples(events, frame, np.zeros(len(frame), np.int64), max_length=64)
    expected = follow_up(
        events, samples, sets, places=TokenPlaces(events, V), competing=[code["MEDS_DEATH"]], end=[code["END"]],
        excludes_prior=excludes_prior,
    )  # fmt: skip
    assert len(frame) > 500
    np.testing.assert_allclose(found.days.numpy(), expected.days, atol=1e-3)
    assert ((expected.status == EVENT) == found.is_event.numpy()).all()
    assert (np.isnan(found.days.numpy()) == (expected.status == EXCLUDED)).all()


def test_named_outcomes_say_what_to_install_before_work_and_pretraining_needs_nothing(monkeypatch, root):
    monkeypatch.setattr(survival_library, "LIBRARY", "no_such_library")
    with pytest.raises(UserError, match=r"GPL .*pip install 'ehr_embed\[survival\]'"):
        run(composed(*small(root, "never", *INFARCTION)))
    assert not (root.parent / "never").exists()
    TimeToEvent(outcomes="auto").check()


def task(**options) -> TimeToEvent:
    given = {"outcomes": {"infarction": {"codes": ["MI"]}}, "times": "infarction_30d", "horizons_days": [30.0]}
    return TimeToEvent(**(given | options))


def test_no_sample_sees_past_its_prediction_time_and_none_vanishes_in_silence(store, root, caplog):
    own = task(times=None, draws_per_record=3)
    set_up(own, store, root / "labels", 64)
    for split in SPLITS:
        samples, events = own.samples[split], store.split(split)
        assert (np.asarray(events.times)[samples.stop - 1] <= samples.prediction_times).all()
    assert "are left out" in caplog.text  # those drawn after an infarction


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outcomes": {"a": {"codes": ["NONE"]}}}, "NONE"),
        ({"outcomes": {"a": {"text_pattern": "nowhere"}}}, r"task\.outcomes\.a.*Type: task\.outcomes=.*text_pattern"),
        ({"outcomes": {"flu": {"codes": ["FLU"]}}}, r"already happened.*task.prior=recur"),
        ({"end_of_follow_up": ["VISIT"]}, "left out"),
        ({"horizons_days": [4000.0]}, r"task\.horizons_days=\[4000\.0\].*Type: task\.horizons_days=\["),
        ({"times": "infarcton_30d"}, "did you mean 'infarction_30d'"),
    ],
)
def test_what_cannot_be_learned_is_named_before_training(store, root, options, message):
    with pytest.raises(UserError, match=message):
        set_up(task(**options), store, root / "labels", 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizons_days": [0.0]}, "task.horizons_days"),
        ({"outcomes": {}}, "task.outcomes"),
        ({"outcomes": {"a": {"code": ["MI"]}}}, "did you mean 'codes'"),
        ({"outcomes": "nowhere.yaml"}, r"nowhere\.yaml"),
        ({"prior": "ignore"}, "task.prior"),
        ({"monitor": "gain"}, "task.monitor"),
        ({"outcomes": "auto", "auto": {"unions": 0.9, "neighbours": 0.2}}, "at most 1"),
    ],
)
def test_what_has_no_meaning_is_refused_at_once(options, message):
    with pytest.raises(UserError, match=message):
        task(**options)


def test_times_in_another_unit_are_named(store, root, tmp_path):
    frame = pl.DataFrame({"subject_id": [0], "prediction_time": [1_578_614_400]})
    frame.write_parquet(tmp_path / "seconds.parquet")
    with pytest.raises(UserError, match="prediction_time"):
        set_up(task(times=str(tmp_path / "seconds.parquet")), store, root / "labels", 64)


def test_outcomes_of_which_all_are_censored_are_named(store, root, tmp_path):
    parts = []
    for split in SPLITS:
        events = store.split(split)
        is_mi = np.asarray(events.token_ids) == store.vocabulary.strings.index("MI")
        has_mi = np.add.reduceat(is_mi, events.offsets[:-1]) > 0
        parts.append(pl.read_parquet(root / "labels" / "infarction_30d" / "**" / "*.parquet")
                     .filter(pl.col("subject_id").is_in(events.subject_ids[~has_mi])))  # fmt: skip
    pl.concat(parts).select("subject_id", "prediction_time").write_parquet(tmp_path / "spared.parquet")
    with refused("no sample has the outcome after its prediction time", "censored", "leave the outcome out"):
        set_up(task(times=str(tmp_path / "spared.parquet")), store, root / "labels", 64)


@pytest.mark.parametrize(
    ("auto", "message"),
    [
        ({"min_events": 10**6}, "Type: a smaller task.auto.min_events"),
        ({"never": {"text_pattern": "nowhere"}}, "task.auto.never"),
        ({"never": {"code_pattern": "MI|FLU|SMOKE|VISIT"}}, "expected 2 or more"),
    ],
)
def test_pretraining_without_outcomes_is_refused(store, root, auto, message):
    with pytest.raises(UserError, match=message):
        set_up(TimeToEvent(outcomes="auto", auto=auto), store, root / "labels", 64)


def test_a_pretrained_run_is_trained_on_with_other_outcomes_and_bins(everywhere, root, caplog):
    """The body is taken over; the hazard head, whose bins and outcomes are others, is learned anew and the log says so."""
    caplog.set_level("INFO", logger="ehr_embed")
    given = small(root, "other_bins", *INFARCTION, "task.n_bins=2", "task.width=4", "task.end_of_follow_up=[END]",
                  "model=decoder_small", "model.pooling=last", "model.max_length=64", f"init_from={everywhere}")  # fmt: skip
    run(composed(*given, "trainer.epochs=6", "trainer.learning_rate=5e-3"))
    told = next(line for line in caplog.messages if line.startswith("new, to be learned"))
    assert "hazards.shift.weight" in told.split("left out")[0]
    metrics = json.loads((root.parent / "other_bins" / "metrics.json").read_text())
    assert metrics["held_out"]["concordance"]["value"] > 0.65
    found = pl.read_parquet(root.parent / "other_bins" / "predictions" / "held_out.parquet")
    assert {"infarction/risk_10d", "infarction/risk_30d"} <= set(found.columns)


def test_a_head_that_is_not_trained_again_keeps_its_bins_or_is_refused(once, root):
    given = ["model=mean_pool", "trainer.epochs=0", *INFARCTION, "task.end_of_follow_up=[END]", "task.n_bins=2", "task.width=4",
             f"init_from={once}"]  # fmt: skip
    run(composed(*small(root, "again", *given)))
    first, again = (json.loads((root.parent / name / "metrics.json").read_text()) for name in ("once", "again"))
    assert again["held_out"]["concordance"] == first["held_out"]["concordance"]
    # Other prediction times have other percentiles: all shapes agree, and the hazards would be read at times that they do not mean.
    with refused("time bins", "edges", "trainer.epochs=10", f"ehr_embed.ask run={once}"):
        run(composed(*small(root, "others", *(own for own in given if "task.times" not in own))))
    assert not (root.parent / "others" / "metrics.json").exists()


def test_outcomes_are_read_from_a_file_and_from_an_aces_configuration(tmp_path):
    (tmp_path / "o.yaml").write_text("heart: {codes: [MI]}\nflu: {text_pattern: influenza}\n")
    (tmp_path / "aces.yaml").write_text("predicates:\n  mi: {code: MI}\n  lungs: {code: {any: [FLU, SMOKE]}}\n")
    assert task(outcomes=str(tmp_path / "o.yaml"))._way.names == ["heart", "flu"]
    assert task(outcomes=str(tmp_path / "aces.yaml"))._way._sets["lungs"].codes == ("FLU", "SMOKE")
    (tmp_path / "bad.yaml").write_text("predicates: {both: {expr: 'and(mi, lungs)'}}\n")
    with pytest.raises(UserError, match=r"bad\.yaml: predicate both.*codes: \[CODE, CODE\]"):
        task(outcomes=str(tmp_path / "bad.yaml"))


def test_drawn_places_are_some_of_all_places_with_the_same_targets(store):
    events, V = store.split("train"), len(store.vocabulary)
    windows = window_samples(events, max_length=64, which="last")
    batch = BatchDataset(events, windows)[np.arange(20)]
    member, stops = torch.zeros(2, V, dtype=torch.bool), torch.zeros(V, dtype=torch.bool)
    member[0, 2], member[1, 3:] = True, True
    every = targets(batch, member, stops, excludes_prior=False)
    some = targets(batch, member, stops, excludes_prior=False, most_places=7)
    assert some.asked_at.sum() == 7 < every.asked_at.sum()
    chosen = some.asked_at[every.asked_at]
    assert (some.asked_at & ~every.asked_at).sum() == 0
    torch.testing.assert_close(some.days, every.days[chosen], equal_nan=True)
    assert torch.equal(some.is_event, every.is_event[chosen])
    assert targets(batch, member, stops, excludes_prior=False, most_places=10**6).asked_at.equal(every.asked_at)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("questions=[Influenza]", "codes=[FLU]"), "Leave one out"),
        (("questions=[Influenza]", "split=test"), "held_out"),
        (("questions=[Influenza]", "horizon_days=0"), "horizon_days=0"),
        (("questions=[Influenza,Influenza]",), r"questions=.*Influenza .*twice"),
        (("questions=[' ']",), "empty"),
        (("codes=[NONE]",), "NONE"),
        (("output=RUN",), "Type: output=ANOTHER"),
        ((), "no question"),
    ],
)
def test_a_question_that_cannot_be_answered_says_what_to_type(everywhere, root, tmp_path, overrides, message):
    given = dict(
        part.split("=", 1) for part in (f"run={everywhere}", f"data.root={root}", f"output={tmp_path / 'out'}")
    )
    given |= dict(part.replace("RUN", str(everywhere)).split("=", 1) for part in overrides)
    with pytest.raises(UserError, match=message):
        ask(composed(*(f"{key}={value}" for key, value in given.items()), name="ask"))
    assert not (tmp_path / "out").exists()


def test_codes_are_asked_on_the_command_line_without_labels(everywhere, root, tmp_path):
    folder = ask(
        composed(f"run={everywhere}", f"data.root={root}", "codes=[MI,FLU]", f"output={tmp_path / 'out'}", name="ask")
    )
    found = json.loads((folder / "questions.json").read_text())["questions"]["MI+FLU"]
    assert {event["code"] for event in found["events"]} == {"MI", "FLU"}
    assert 0 < found["mean_risk"] < 1
    assert not (folder / "metrics.json").exists()
    # A second call leaves nothing of the first, and what a person laid beside it.
    (folder / "plots" / "mine.png").touch()
    given = (f"run={everywhere}", f"data.root={root}", f"output={tmp_path / 'out'}")
    ask(composed(*given, "codes=[FLU]", name="ask"))
    assert sorted(path.name for path in (folder / "plots").iterdir()) == ["1_FLU.png", "mine.png"]


def test_events_that_the_margin_alone_leaves_out_are_said_with_the_margin_that_lets_them_in(everywhere):
    asker = ehr_embed.load(everywhere)
    narrow = {"n_events": 4, "min_cosine": -1.0}
    (question,) = asker.questions(["Influenza"], **narrow, margin=0.0)
    assert len(question.events) == 1
    assert len(question.left_out) == 3
    (wide,) = asker.questions(["Influenza"], **narrow, margin=question.wider)
    assert [event.code for event in wide.events[1:]] == [event.code for event in question.left_out]
    assert wide.wider is None
    assert f"margin={question.wider:g})" in _shown(question).splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "value"), [("per_batch", 0), ("neighbours", 1.5), ("rarity", "much"), ("min_events", 2.5)]
)
def test_options_of_automatic_outcomes_are_checked(name, value):
    with refused(f"task.auto.{name}={value}", "expected"):
        AutoOutcomes(**{name: value})
    with refused("task.auto.unions=0.6", "at most 1"):
        AutoOutcomes(neighbours=0.6, unions=0.6)
