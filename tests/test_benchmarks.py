"""Every benchmark in a tiny form: its JSON line, that both sides saw the same events, and that they are one model."""

from __future__ import annotations

import argparse
import doctest
import importlib
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
import torch

from benchmarks import (
    batches,
    code_effects,
    disk,
    embedding,
    event_head,
    folds,
    generation_cache,
    gpu,
    hidden_codes,
    hospital_rows,
    hospital_tables,
    hospitals,
    operations,
    packing,
    prefetch,
    renamed_codes,
    scale,
    selection,
    store_building,
    threads,
    training,
    utilisation,
)
from benchmarks.common import write_cohort
from ehr_embed.core.errors import UserError
from ehr_embed.data.labels import read_labels
from ehr_embed.sources.meds import MedsSource
from tests.helpers.two_hospitals import AWAY, HOME, write_hospital

STATED = {"benchmark", "dataset", "device", "threads", "versions"}
TINY_MODEL = ("--subjects", "40", "--model-dim", "16", "--layers", "1", "--device", "cpu")


def line(main, capsys, *arguments: str) -> dict:
    main(list(arguments))
    (found,) = (json.loads(text) for text in capsys.readouterr().out.splitlines() if text.startswith("{"))
    assert set(found) >= STATED
    assert found["versions"]["torch"]
    return found


@pytest.mark.slow
def test_scale_measures_each_step(capsys, tmp_path):
    size = (
        "--events",
        "3000",
        "--codes",
        "40",
        "--replicates",
        "5",
        "--subjects-a-shard",
        "30",
        "--model",
        "mean_pool",
    )
    scale.main([*size, "--steps", "embed", "train", "predict", "--folder", str(tmp_path)])
    (found,) = (json.loads(text) for text in capsys.readouterr().out.splitlines() if text.startswith("{"))
    (row,) = found["sizes"]
    assert 1000 < row["n_events"] < 9000
    assert row["train"]["events_per_s"] > 0
    assert row["predict"]["n_predictions"] == 10
    assert all(row[step]["peak_memory_mib"] > row[step]["of_it_own_mib"] for step in ("embed", "train", "predict"))
    assert not list(tmp_path.iterdir()), "a size's folder is removed"


def test_training_compares_one_model_on_the_same_events(capsys):
    found = line(training.main, capsys, *TINY_MODEL, "--repeats", "1")
    assert found["n_events_ours"] == found["n_events_original"] > 32
    assert found["loss_ours"] == pytest.approx(found["loss_original"], rel=1e-4)
    assert found["ratio"] == pytest.approx(found["events_per_s_ours"] / found["events_per_s_original"], rel=1e-2)
    assert {"padding_share", "precision", "dropout_percent", "peak_memory_mib"} <= set(found)


def test_batches_hold_every_event_once(capsys):
    found = line(batches.main, capsys, "--subjects", "50", "--repeats", "1")
    assert found["n_samples_ours"] == 40
    assert found["samples_per_s_ours"] / found["tokens_per_s_ours"] == pytest.approx(
        40 / found["n_events_ours"], rel=1e-2
    )


def test_embedding_gives_both_sides_the_same_texts(capsys):
    arguments = (
        "--texts",
        "30",
        "--distinct",
        "6",
        "--calls",
        "8",
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--bfloat16",
        "1",
    )
    found = line(embedding.main, capsys, *arguments)
    assert (found["n_texts"], found["n_distinct"], found["n_calls"]) == (30, 6, 8)
    assert found["smallest_cosine"] > 0.99, "the vectors of bfloat16 are those of float32"
    assert found["ratio_distinct"] == pytest.approx(found["ratio"] * 6 / 30, rel=1e-2)


def test_disk_counts_what_an_event_takes(capsys):
    found = line(disk.main, capsys, "--subjects", "50", "--files", "4")
    assert found["bytes_per_event_original"] > 4 * disk.EMBEDDING_DIM + 8
    assert 12 < found["bytes_per_event_without_table"] < found["bytes_per_event_ours"]
    assert found["ratio"] == pytest.approx(found["bytes_per_event_original"] / found["bytes_per_event_ours"], rel=1e-2)


@pytest.mark.slow
def test_store_building_says_what_each_size_took(capsys):
    found = line(store_building.main, capsys, "--events", "2000", "20000", "--subjects-a-shard", "40")
    small, large = found["sizes"]
    assert 5 < large["n_events"] / small["n_events"] < 20
    assert large["n_shards"] > small["n_shards"]
    assert large["peak_memory_mib"] >= large["of_it_libraries_mib"] > 0
    assert large["shards_of_memory"] > 0


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_shards(capsys):
    found = line(store_building.main, capsys, "--events", "1000000", "6000000", "--subjects-a-shard", "400")
    few, many = found["sizes"]
    assert many["n_shards"] > 5 * few["n_shards"]
    assert many["peak_memory_mib"] < few["peak_memory_mib"] + 6 * few["largest_shard_mib"]


@pytest.mark.slow
def test_utilisation_measures_each_side_alone(capsys):
    found = line(utilisation.main, capsys, *TINY_MODEL)
    assert found["ours"]["n_events"] == found["original"]["n_events"]
    assert found["ours"]["mfu"] > 0
    pretrained = line(utilisation.main, capsys, *TINY_MODEL, "--original", "0", "--pretrain", "1", "--codes", "40")
    assert pretrained["ours"]["events_per_s"] > 0
    assert found["original"]["peak_memory_mib"] >= found["original"]["of_it_before_mib"]


def test_generation_with_and_without_the_cache_draws_the_same_events(capsys):
    sizes = ("--prompt", "8", "--new", "3", "--batch", "2", "--vocabulary", "20", "--repeats", "1", "--device", "cpu")
    generation_cache.main(list(sizes))
    assert json.loads(capsys.readouterr().out)["same_events"]
    generation_cache.main([*sizes, "--samples", "3", "--full", "0", "--bfloat16", "1"])
    found = json.loads(capsys.readouterr().out)
    assert "ratio" not in found
    assert found["seconds_per_patient"] > 0


def test_the_ways_to_score_a_vocabulary_have_one_loss_and_gradient(capsys):
    sizes = ("--events", "50", "--vocabulary", "40", "--model-dim", "8", "--repeats", "1", "--device", "cpu")
    found = line(event_head.main, capsys, *sizes)
    assert "ours" in found["relative_error"]
    assert max(found["relative_error"].values()) < 1e-5
    assert all(x >= 0 for x in found["peak_mib"].values())
    assert found["seconds"].keys() == found["peak_mib"].keys() == found["times_as_fast_as_ours"].keys()


def test_operations_of_a_step_grow_with_the_layers_and_not_with_the_batch(capsys):
    sizes = ("--subjects", "40", "--model-dim", "16", "--context", "32", "--median-events", "12", "--codes", "50")
    found = [
        line(operations.main, capsys, *sizes, "--layers", n, *more)["operations"]
        for n, more in (("1", ()), ("2", ()), ("1", ("--subjects", "80")))
    ]
    one, two, larger = found
    assert one == larger
    assert one["step"] == sum(n for name, n in one.items() if name != "step")
    assert one["forward"] < two["forward"] < 2 * one["forward"]


def test_prefetch_compares_epochs_with_and_without(capsys):
    sizes = ("--subjects", "40", "--repeats", "1", "--batch-tokens", "512", "--cold", "1", "--device", "cpu")
    found = line(prefetch.main, capsys, *sizes)
    assert found["ratio"] == pytest.approx(found["events_per_s_with"] / found["events_per_s_without"], rel=1e-2)


def test_packing_compares_batches_with_the_padding_asked_for(capsys):
    sizes = ("--batch", "9", "--longest", "16", "--steps", "1", "--repeats", "1", "--padding-percent", "25")
    found = line(packing.main, capsys, *sizes, "--model-dim", "16", "--layers", "1", "--device", "cpu")
    assert found["padding_share"] == pytest.approx(0.25, abs=0.02)
    assert found["ratio"] == pytest.approx(found["events_per_s_packed"] / found["events_per_s_padded"], rel=1e-2)


def test_threads_trains_idle_and_beside_a_busy_process(capsys, monkeypatch):
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    n = torch.get_num_threads()
    found = line(threads.main, capsys, *TINY_MODEL, "--repeats", "1")
    for state in ("idle", "busy"):
        assert all(1 <= chosen <= n for chosen in found[f"threads_{state}_auto"])
        assert found[f"events_per_s_{state}_auto"] > 0
    assert found["busy_to_idle_1"] == pytest.approx(
        found["events_per_s_busy_1"] / found["events_per_s_idle_1"], rel=1e-2
    )
    assert torch.get_num_threads() == n


def test_threads_asks_for_an_environment_that_leaves_the_choice_open(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit):
        threads.main([])
    assert "env -u OMP_NUM_THREADS" in capsys.readouterr().err


def test_the_cohort_is_what_the_benchmarks_say(tmp_path):
    source = MedsSource(root=str(write_cohort(tmp_path / "meds", n_subjects=1000, subjects_a_shard=300)))
    lengths = np.concatenate([source.read(shard)["subject_id"].value_counts()["count"] for shard in source.shards])
    assert len(lengths) == 1000
    assert len(source.shards) == 5
    assert 140 < np.median(lengths) < 160
    assert lengths.max() == 512


@pytest.mark.parametrize("run", gpu.RUNS, ids=" ".join)
def test_what_a_gpu_will_run_can_be_read(run, monkeypatch):
    """It cannot be run here: its arguments are those that the benchmark takes."""
    read = argparse.ArgumentParser.parse_args

    class ReadError(Exception):
        pass

    def then_stop(self, arguments):
        raise ReadError(read(self, arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", then_stop)
    name, *arguments = run
    with pytest.raises(ReadError, match="device='cuda'"):
        importlib.import_module(f"benchmarks.{name}").main([*arguments, "--device", "cuda"])


@pytest.mark.slow
def test_a_machine_with_a_gpu_needs_neither_hydra_nor_optuna():
    """Each benchmark that the command runs is imported there, and pytest finds the tests."""
    names = sorted({name for name, *_ in gpu.RUNS} - {"embedding"})
    code = f"""
import importlib, sys
sys.modules |= dict.fromkeys(("hydra", "omegaconf", "optuna", "wandb", "lightgbm"))
for name in {names}:
    importlib.import_module(f"benchmarks.{{name}}")
import pytest
sys.exit(pytest.main([*{list(gpu.TESTS[1:])}, "--setup-only", "-k", "packed_is_the_encoder"]))
"""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # Hydra has a plugin, which is not there either
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "_searched_application" in found.stdout


def test_without_a_gpu_the_gpu_benchmarks_say_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "no GPU here" in capsys.readouterr().out


def test_the_lines_for_a_gpu_end_in_time(capsys, monkeypatch):
    """Each line may take its own time at most, and all lines together theirs."""
    clock = iter(range(0, 10_000, 100))
    limits = []

    def run(command, limit):
        limits.append(limit)
        return "", None

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    n_lines = len(gpu.RUNS) + 1
    assert gpu.main(["--device", "cuda", "--seconds", "350"]) == n_lines
    assert limits == [100, 100, 50]
    assert capsys.readouterr().out.count("no time left: python -m") == n_lines - 3


def test_a_line_for_a_gpu_that_is_ended_leaves_no_process_and_loses_no_text():
    """The output ends when no process holds it any more, so that reading it shows that the child of the child was ended too."""
    code = "import subprocess, sys; print('began', flush=True); subprocess.run(['sleep', '60'])"
    began = time.monotonic()
    assert gpu.run([sys.executable, "-c", code], 3) == ("began\n", None)
    assert time.monotonic() - began < 30
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 60) == ("", 3)


@pytest.mark.slow
def test_every_line_for_a_gpu_runs_on_a_cpu_in_a_tiny_form(capfd):
    failed = gpu.main(["--device", "cpu", "--tiny", "1", "--line-seconds", "300", "--seconds", "2000"])
    assert failed == 0, capfd.readouterr().out


def test_f1_picks_the_better_model_less_often_than_auroc(capsys):
    found = selection.shares((0.76, 0.78), n=2000, prevalence=0.05, correlation=0.8, n_draws=300)
    assert found["auroc"] > found["f1"] + 0.03
    assert 0.8 < found["auroc"] < 0.97
    selection.main(["--n-draws", "3", "--n", "100"])
    assert "| auroc | auprc | f1 | loss | brier |" in capsys.readouterr().out


@pytest.mark.slow
def test_hospitals_prints_its_tables_and_goes_on_where_it_was(capsys, tmp_path):
    home = write_hospital(tmp_path / "home", HOME, heart_unit=1.0, noise=0, seed=0, first=0)
    away = write_hospital(tmp_path / "away", AWAY, heart_unit=1 / 60, noise=6, seed=1, first=0)
    arguments = [
        "--home", str(home), "--away", str(away), "--home-labels", "case", "--away-labels", "case", "--home-hours",
        "--folder", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache"), "--seeds", "1", "--draws", "1", "--sizes", "80",
        "--ways", "gbm", "tuned", "pool", "--also", "trainer.min_steps=30",
    ]  # fmt: skip
    found = line(hospitals.main, capsys, *arguments)
    rows = hospital_tables.read(tmp_path / "runs" / "runs.csv")
    there = {
        (row["model"], row["control"]): row for row in rows if row["split"] == "all" and row["trained_on"] == "home"
    }
    assert float(there["code_tab", "texts"]["auroc"]) > 0.7, "30 steps"
    assert float(there["code_tab", "shuffled"]["auroc"]) < float(there["code_tab", "texts"]["auroc"]) - 0.1, (
        "wrong texts"
    )
    assert {model for model, _ in there} == {*hospital_rows.MODELS.values(), hospital_rows.BOTH} - {
        hospital_rows.MODELS["gbm5"]
    }
    for row in rows:
        where = row["run"].split("+")[0]
        metrics = json.loads((tmp_path / "runs" / where / "metrics.json").read_text())
        here = metrics.get("datasets", {}).get(row["applied_to"], metrics)
        if row["split"] == "held_out":
            assert float(row["auroc"]) == pytest.approx(here["held_out"]["auroc"]["value"], abs=1e-5), where
        assert row["date"]
        assert row["hardware"]
    unchanged, few, pooled = (found["tables"][part].splitlines() for part in ("unchanged", "few", "pooled"))
    assert len(unchanged) == 2 + 2 * 5 + 2, (
        "two models, their mean logit and two controls that read no texts in both directions, and two models of sequences"
    )
    assert [text.split(" | ")[0] for text in few[2:]] == ["| 80", "| 90 (all)"]
    assert "270 labels" in unchanged[2]
    assert len(pooled) == 2 + 4
    assert {text.count("|") for text in pooled} == {8}, "and the difference on the same subjects"
    metrics = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("runs/*/metrics.json"))]
    assert line(hospitals.main, capsys, *arguments)["tables"] == found["tables"]
    assert metrics == [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("runs/*/metrics.json"))]


@pytest.mark.slow
def test_hidden_codes_cost_something_and_the_table_is_made_once(capsys, tmp_path):
    home = write_hospital(tmp_path / "home", HOME, heart_unit=1.0, noise=0, seed=0, first=0)
    arguments = [
        "--data", str(home), "--labels", "case", "--folder", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache"),
        "--draws", "1", "--epochs", "2", "--share", "0.6", "--model", "mean_pool",
    ]  # fmt: skip
    found = line(hidden_codes.main, capsys, *arguments)["table"]
    head, _, *lines = (text.strip("| ").split(" | ") for text in found.splitlines())
    assert head[:4] == ["labels", "vectors", "all codes", "60% hidden"]
    assert [row[:2] for row in lines] == [["`case`", "`minilm_l6`"], ["`case`", "`learned`"]]
    rows = hospital_tables.read(tmp_path / "runs" / "hidden_codes.csv")
    assert len(rows) == 4
    for row in rows:
        metrics = json.loads((tmp_path / "runs" / "case" / row["run"] / "metrics.json").read_text())
        assert float(row["auroc"]) == pytest.approx(metrics["held_out"]["auroc"]["value"], abs=1e-6)
    for row in lines:
        assert float(row[2]) - float(row[3]) == pytest.approx(float(row[-1]), abs=2e-3)
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("runs/case/*/metrics.json"))]
    assert len(times) == 4
    assert line(hidden_codes.main, capsys, *arguments)["table"] == found
    assert times == [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("runs/case/*/metrics.json"))]


@pytest.mark.slow
def test_renamed_codes_have_a_row_per_reading_that_its_run_wrote(capsys, tmp_path):
    home = write_hospital(tmp_path / "home", HOME, heart_unit=1.0, noise=0, seed=0, first=0)
    words = ("Pulse (beats per minute)", "Sodium (serum)", "Sugar in blood", "High temperature", "Ward of surgeons")
    table = tmp_path / "words.csv"
    table.write_text("code,term\n" + "".join(f"{code},{word}\n" for code, word in zip(HOME, words, strict=True)))
    arguments = [
        "--data", str(home), "--labels", "case", "--renamed", str(table), "--folder", str(tmp_path / "runs"),
        "--cache", str(tmp_path / "cache"), "--models", "code_encoder", "--also", "data.values=continuous",
    ]  # fmt: skip
    found = line(renamed_codes.main, capsys, *arguments)["table"]
    rows = {row["codes"]: row for row in hospital_tables.read(tmp_path / "runs" / "renamed.csv")}
    assert list(rows) == [renamed_codes.AS_TRAINED, *renamed_codes.WITHOUT_RULES]
    assert len(found.splitlines()) == 2 + len(rows)
    for codes, row in rows.items():
        metrics = json.loads((tmp_path / "runs" / row["run"] / "metrics.json").read_text())
        assert float(row["auroc"]) == pytest.approx(metrics["held_out"]["auroc"]["value"], abs=1e-6)
        assert bool(row["auroc/kept"]) == (codes != renamed_codes.AS_TRAINED)
    shuffled = [float(rows[codes]["auroc/kept"]) for codes in ("one to one", "one to one, texts shuffled")]
    assert shuffled[0] > shuffled[1], "wrong texts"


def test_functions_of_the_tables_do_what_their_examples_say():
    assert [doctest.testmod(module).failed for module in (hospital_tables, code_effects)] == [0, 0]


def test_effects_of_codes_are_those_of_records_up_to_the_prediction_time(capsys, tmp_path):
    """A code that stands for cases has the greatest effect; it is no code of these records if all its events are
    later than the prediction."""
    for name, later in (("before", 0.0), ("after", 99.0)):
        home = write_hospital(tmp_path / name, HOME, heart_unit=1.0, noise=0, seed=0, first=0)
        for path in (home / "data").rglob("*.parquet"):
            events = pl.read_parquet(path)
            cases = events.filter((pl.col("code") == "HR") & (pl.col("numeric_value") > 100)).unique("subject_id")
            at = pl.col("time") + pl.duration(days=later)
            added = cases.with_columns(pl.lit("GLU//high").alias("code"), at)
            pl.concat([events, added]).sort("subject_id", "time").write_parquet(path)
        texts, effect_C, n_records = code_effects.of_labels(home, "case", least_records=5)
        assert n_records == 90
        if later:
            assert "GLU//high" not in texts, "its events are later than the prediction"
        else:
            assert effect_C[texts.index("GLU//high")] == effect_C.max() > 2


def test_folds_hold_every_subject_out_once_and_compare_recipes_over_them(capsys, tmp_path):
    root = write_hospital(tmp_path / "home", HOME, heart_unit=1.0, noise=0, seed=0, first=0)
    drawn = line(folds.main, capsys, "draw", str(root), "--labels", "case", "--output", str(tmp_path / "folds.parquet"))
    found = pl.read_parquet(tmp_path / "folds.parquet")
    splits = found.drop("subject_id").to_numpy()
    assert len(found) == drawn["subjects"] == len(MedsSource(root=str(root)).split_of_subjects(max_events=10**9))
    assert ((splits == "held_out").sum(1) == 1).all()
    cases = read_labels("case", root / "labels").frame.group_by("subject_id").agg(pl.col("value").max())
    of_fold = found.join(cases, on="subject_id").filter(pl.col("value") == "true")
    sizes = [(of_fold[f"fold{fold + 1}"] == "held_out").sum() for fold in range(5)]
    assert max(sizes) - min(sizes) <= 1, "the cases are spread evenly"

    draws = tmp_path / "draws.parquet"
    line(folds.main, capsys, "draw", str(root), "--labels", "case", "--output", str(draws), "--shares", "0.6,0.1,0.3")
    splits = pl.read_parquet(draws).drop("subject_id").to_numpy()
    assert [round(float((splits == split).mean()), 1) for split in ("train", "tuning", "held_out")] == [0.6, 0.1, 0.3]
    assert len({tuple(column) for column in splits.T}) == 5, "the draws differ"
    with pytest.raises(
        UserError, match=r"case: \d+ subjects have the label \w+, and draw \d has none in tuning.*--shares"
    ):
        folds.main(["draw", str(root), "--labels", "case", "--output", str(draws), "--shares", "0.699,0.001,0.3"])
    with pytest.raises(UserError, match=r"--shares 0.6,0.1,0.3"):
        folds.main(["draw", str(root), "--labels", "case", "--output", str(draws), "--shares", "0.6,0.1"])

    for fold, (better, worse) in enumerate([(0.9, 0.8), (0.7, 0.5)]):
        for folder, value in {
            "": better,
            "members/tab-0": better,
            "members/tab-1": worse,
            "members/gbm-0": worse,
        }.items():
            place = tmp_path / "sweep" / str(fold) / folder
            place.mkdir(parents=True, exist_ok=True)
            metrics = {name: {"value": value} for name in folds.METRICS}
            (place / "metrics.json").write_text(json.dumps({"tuning": metrics, "held_out": metrics}))
    rows = line(folds.main, capsys, "table", str(tmp_path / "sweep"), "--output", str(tmp_path / "t" / "folds.csv"))[
        "rows"
    ]
    assert pl.read_csv(tmp_path / "t" / "folds.csv")["recipe"].unique().sort().to_list() == ["ensemble", "gbm", "tab"]
    assert {row["reference"] for row in rows} == {"gbm"}, "docs/results.py reads it"
    told = {row["recipe"]: row for row in rows if row["split"] == "held_out" and row["metric"] == "auroc"}
    assert (told["tab"]["mean"], told["tab"]["folds"]) == (0.725, 2)
    assert (told["tab"]["difference"], told["tab"]["standard_error"]) == (0.075, 0.025)
    assert told["ensemble"]["difference"] == 0.15
    low, high = told["ensemble"]["low"], told["ensemble"]["high"]
    assert low < 0.15 < high
    assert high - low == pytest.approx(2 * 12.706 * 0.05, abs=1e-4), "Student's t over two folds"
    assert told["tab"]["seeds_sd"] == pytest.approx(np.mean([0.1, 0.2]) / 2**0.5, abs=1e-4)

    for fold in ("0", "1"):  # with several seeds, each has an ensemble of its own
        (tmp_path / "seeds" / fold).mkdir(parents=True)
        shutil.copytree(tmp_path / "sweep" / "0", tmp_path / "seeds" / fold / "seed_0")
        shutil.copytree(tmp_path / "sweep" / "1", tmp_path / "seeds" / fold / "seed_1")
    rows = line(folds.main, capsys, "table", str(tmp_path / "seeds"))["rows"]
    (found,) = (
        row for row in rows if (row["recipe"], row["split"], row["metric"]) == ("ensemble", "held_out", "auroc")
    )
    assert (found["mean"], found["folds"], found["seeds"]) == (0.8, 2, 2)
    assert found["seeds_sd"] == pytest.approx(0.2 / 2**0.5, abs=1e-4)
    with pytest.raises(UserError, match=r"--against other.*gbm"):
        folds.main(["table", str(tmp_path / "sweep"), "--against", "other"])
