"""train.py and embed.py from end to end, in processes of their own as users run them."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml

from tests.helpers.entry_points import (
    checked,
    command,
    inside,  # noqa: F401 (fixtures)
    metrics_of,
    write_synonyms,
)
from tests.helpers.small_meds import ROOT, write_meds

N = 600
COHORT = f"data.n_subjects={N}"
"""Overrides of most runs in this module. A slow test runs the demo as a user types it, and shuffled labels need many subjects."""
SMALL = ("trainer.epochs=1", "trainer.n_bootstrap=20", "embedder=hashing", "model.n_layers=1", "model.model_dim=16")


def call(*arguments: str, cwd: Path, code: int = 0) -> str:
    """Run an entry point in a process of its own, in `cwd`; its output, stdout and stderr together."""
    done = subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=500)
    return checked(done.returncode, done.stdout + done.stderr, code)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the demo prepared; its cache serves the runs of this module."""
    folder = tmp_path_factory.mktemp("place")
    output = call("embed.py", COHORT, cwd=folder)
    assert re.search(r"the texts of codes are: descriptions 100.0%", output)
    return folder


@pytest.fixture(scope="module")
def demo(place) -> Path:
    output = call("train.py", "run_dir=demo", COHORT, cwd=place)
    assert "best possible auroc" in output
    assert "building the event store" not in output, "embed.py had prepared it"
    return place / "demo"


@pytest.mark.slow
def test_the_demo_comes_close_to_the_best_possible(tmp_path):
    call("embed.py", cwd=tmp_path)
    call("train.py", "run_dir=demo", cwd=tmp_path)
    metrics = metrics_of(tmp_path / "demo")
    for split in ("held_out", "tuning"):
        assert metrics["bayes_auroc"][split] - 0.03 < metrics[split]["auroc"]["value"]
        assert metrics[split]["auroc"]["value"] < metrics["bayes_auroc"][split] + 0.01, "better than possible: a leak"


def test_shuffled_labels_land_at_chance(place, inside):
    reached = []
    for seed in range(3):
        inside("train.py", f"run_dir=shuffled{seed}", f"task.shuffle_labels={seed}", *SMALL, cwd=place)
        metrics = metrics_of(place / f"shuffled{seed}")
        assert "bayes_auroc" not in metrics, "shuffled labels have another best possible value"
        reached.append(metrics["held_out"]["auroc"]["value"])
    assert abs(sum(reached) / 3 - 0.5) <= 0.05, reached


def test_a_run_leaves_what_the_readme_says(demo):
    files = {str(path.relative_to(demo)) for path in demo.rglob("*") if path.is_file()}
    plots = {f"plots/{name}.png" for name in ("loss", "roc", "precision_recall", "calibration", "decision_curve")}
    assert files - {"checkpoint_epoch_10.pt", ".lock"} == plots | {
        "plots/decision_curve.csv",
        "manifest.json",
        "metrics.json",
        "metrics.jsonl",
        "audit.json",
        "model_card.md",
        "report.html",
        "summary.json",
        "environment.json",
        "config.yaml",
        "best_checkpoint.pt",
        "latest_checkpoint.pt",
        "predictions/held_out.parquet",
        "predictions/tuning.parquet",
        "vocabulary/vocab.csv",
        "vocabulary/vocabulary.json",
        "vocabulary/codes.parquet",
        "vocabulary/table.safetensors",
    }
    metrics = metrics_of(demo)
    names = {"auroc", "auprc", "f1", "accuracy", "precision", "recall", "brier", "ece", "loss"}
    assert names | {"n", "prevalence"} <= set(metrics["held_out"])
    assert all(set(metrics["held_out"][name]) == {"value", "low", "high"} for name in names)
    assert {"events_per_s", "seconds", "n_parameters", "best_epoch"} <= set(metrics["train"])
    predictions = pl.read_parquet(demo / "predictions" / "held_out.parquet")
    assert len(predictions) == metrics["held_out"]["n"] == N * 0.15


def test_a_run_repeats_from_its_config(place, inside):
    inside("train.py", "run_dir=once", COHORT, *SMALL, "seed=3", cwd=place)
    first = place / "once"
    told = next(line for line in (first / "config.yaml").read_text().splitlines() if line.startswith("#   python "))
    arguments = told.removeprefix("#   python ").replace("run_dir=DIR", "run_dir=again").split()
    inside(*arguments, cwd=place)
    once, again = metrics_of(first), metrics_of(place / "again")
    assert once["held_out"] == again["held_out"]
    one, other = (yaml.safe_load((place / name / "config.yaml").read_text()) for name in ("once", "again"))
    assert one | {"run_dir": None} == other | {"run_dir": None}
    inside("train.py", "run_dir=other", COHORT, *SMALL, "seed=4", cwd=place)
    assert metrics_of(place / "other")["held_out"] != once["held_out"], "the seed reaches the weights"


def test_multirun_gives_each_job_a_folder(place, inside):
    inside("train.py", "-m", "seed=0,1", COHORT, *SMALL, "hydra.sweep.dir=sweep", cwd=place)
    assert metrics_of(place / "sweep" / "0")["held_out"] != metrics_of(place / "sweep" / "1")["held_out"]


def test_help_lists_groups_and_commands(tmp_path):
    output = call("train.py", "--help", cwd=tmp_path)
    assert "data: demo, demo_times, meds" in output
    assert "ehr-embed train data=meds data.root=DIR task.labels=NAME" in output
    assert "python train.py" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.learning_rat=1"], r"unknown key of trainer 'learning_rat': did you mean 'learning_rate'\?"),
        (["model=encodr"], r"unknown option of model 'encodr': did you mean 'encoder'"),
        (["embedder=minilm"], r"unknown option of embedder 'minilm'.*minilm_l6"),
        (["experment=x"], r"unknown key or group 'experment'"),
        (["data=meds"], r"data\.root is not set"),
        (["data=meds", "data.root=nowhere"], r"data\.root=nowhere: expected a MEDS dataset.*no such folder"),
        (
            ["data=meds", "data.root=TINY", "task.labels=outcom", *SMALL],
            r"unknown task\.labels 'outcom': did you mean 'outcome'",
        ),
        (["data=meds", "data.root=TINY", "model.n_heads=3", "embedder=hashing"], r"model\.n_heads=3 does not divide"),
        (["data=meds", "data.root=TINY", "embedder=e5_large"], r"weights are not on this machine"),
        (["data=meds", "data.root=TINY", "data.values=bin"], r"unknown data\.values 'bin': did you mean 'bins'"),
        (["data=meds", "data.root=TINY", "trainer.epochs=many"], r"trainer\.epochs"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_message_and_no_run(arguments, message, tiny, tmp_path, inside):
    folder = tmp_path / "cwd"
    folder.mkdir()
    output = inside("train.py", *(a.replace("TINY", str(tiny)) for a in arguments), cwd=folder, code=2)
    assert re.search(message, output), output
    assert not (folder / "runs").exists()


def test_a_refused_dataset_leaves_nothing(tmp_path, inside):
    root = write_meds(
        tmp_path / "bad",
        {
            "train": [(1, 0.0, "A", float("inf")), (2, 1.0, "A", 1.0)],
            "tuning": [(3, 0.0, "A", 1.0), (4, 0.0, "A", 1.0)],
            "held_out": [(5, 0.0, "A", 1.0), (6, 0.0, "A", 1.0)],
        },
        labels={"outcome": [(subject, 1.0, subject % 2 == 0) for subject in range(1, 7)]},
    )
    folder = tmp_path / "cwd"
    folder.mkdir()
    output = inside("train.py", "data=meds", f"data.root={root}", *SMALL, cwd=folder, code=2)
    assert re.search(r"0\.parquet.*inf", output), output
    assert [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_ctrl_c_says_so_and_leaves_whole_files(place):
    process = subprocess.Popen(
        command("train.py", "run_dir=stopped", COHORT, *SMALL[2:], "trainer.epochs=2000", "trainer.patience=2000"),
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    checkpoint = place / "stopped" / "latest_checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "stopped by SIGINT" in output
    assert "Traceback" not in output, output
    assert checkpoint.exists()
    assert not list((place / "stopped").rglob("*.tmp"))


@pytest.fixture
def staged(place, inside) -> Path:
    """Pretraining and fine-tuning in one command, once for this module."""
    folder = place / "staged"
    if not (folder / "metrics.json").exists():
        output = inside(
            "train.py", "experiment=pretrain_then_finetune", "model=decoder_small", "run_dir=staged", COHORT, *SMALL,
            "pretrain.trainer.epochs=1", "pretrain.trainer.n_bootstrap=0", "task.label_fraction=0.2", cwd=place,
        )  # fmt: skip
        assert re.search(r"perplexity, bigram", output)
        assert re.search(r"init_from .*pretrain/best_checkpoint\.pt \(epoch 1\): \d+ tensors loaded", output)
    return folder


def test_the_stages_run_as_one_command_with_the_layout_of_any_run(staged):
    for folder in (staged, staged / "pretrain"):
        names = {path.name for path in folder.iterdir()}
        assert {"config.yaml", "metrics.json", "best_checkpoint.pt", "latest_checkpoint.pt", "predictions"} <= names
    assert metrics_of(staged)["train"]["n"] == N * 0.7 / 5, "a fifth of the labelled subjects"
    before = torch.load(staged / "pretrain" / "best_checkpoint.pt", weights_only=True)
    assert before["config"]["task"]["_target_"].endswith("NextEvent")
    metrics = metrics_of(staged / "pretrain")["held_out"]
    assert metrics["perplexity"]["value"] > 1
    assert set(metrics["baselines"]) == {"unigram", "bigram"}


def test_futures_and_their_risks_from_the_command_line(place, staged, inside):
    arguments = ("run=staged/pretrain", "n_samples=2", "horizon_days=90", "max_new_events=8", "output=futures")
    inside("-m", "ehr_embed.generate", *arguments, cwd=place)
    first = [pl.read_parquet(place / "futures" / "held_out" / f"{i}.parquet") for i in range(2)]
    assert first[0].columns == ["subject_id", "time", "code", "numeric_value", "prediction_time"]
    assert not first[0].equals(first[1])
    inside("-m", "ehr_embed.generate", *arguments, cwd=place)
    assert first[0].equals(pl.read_parquet(place / "futures" / "held_out" / "0.parquet")), "the seed repeats them"
    inside(
        "train.py", "task=zero_shot", "task.text_pattern=heart failure", "model=decoder_small", COHORT, *SMALL,
        "init_from=staged/pretrain", "task.n_samples=2", "task.max_new_events=4", "run_dir=zero_shot", cwd=place,
    )  # fmt: skip
    assert 0 <= metrics_of(place / "zero_shot")["held_out"]["auroc"]["value"] <= 1
    assert not (place / "zero_shot" / "best_checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=nowhere"], r"run=nowhere: expected the folder of a finished run"),
        (["run=demo"], r"Encoder sees what comes after an event"),
        (["run=staged"], r"this decoder predicts classes"),
        (["run=staged/pretrain", "horizon_days=0"], r"horizon_days=0"),
        (["run=staged/pretrain", "prompt_length=200"], r"a prompt of 200 events and max_new_events=128 exceed"),
        (["run=staged/pretrain", "split=test"], r"unknown split 'test'"),
        (
            ["run=staged/pretrain", "horizn=3"],
            r"unknown key or group 'horizn'.*horizon_days.*python -m ehr_embed\.generate",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_in_generation_ends_in_one_message(arguments, message, place, demo, staged, inside):
    output = inside("-m", "ehr_embed.generate", *arguments, cwd=place, code=2)
    assert re.search(message, output), output


@pytest.mark.parametrize(
    ("experiment", "labels"), [("gibleed", "osteoarthritis_onset_1y"), ("mimic_iv_demo", "long_stay_7d_at_24h")]
)
def test_real_sets_run_without_a_line_of_code(real_data, tmp_path, inside, experiment, labels):
    arguments = (f"experiment={experiment}", f"data.root={real_data(experiment)}", f"task.labels={labels}")
    inside("train.py", *arguments, *SMALL, "model.max_length=64", "run_dir=run", cwd=tmp_path)
    assert metrics_of(tmp_path / "run")["held_out"]["n"] > 0


FIRST_PAGES = ("README.md", "docs/index.md", "docs/quick-start.md", "docs/hospitals.md", "docs/asking.md")
"""Mistakes that somebody types in the first hour."""
COMPOSED = ("train", "embed", "convert", "generate", "predict", "explain", "represent", "ask")


def first_commands() -> list[str]:
    """Every `ehr-embed ...` and `python ...` line of shell blocks and every command in code spans of the first pages, as words
    of a checkout, without comments and without searches."""
    found: dict[str, None] = {}
    for page in FIRST_PAGES:
        text = (ROOT / page).read_text()
        blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.DOTALL)
        lines = [line for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
        lines += re.findall(r"`(ehr-embed [a-z]+ [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in lines:
            words = re.sub(r"^ehr-embed (train|embed)\b", r"python \1.py", line.split("  #")[0].strip())
            words = re.sub(r"^ehr-embed (\w+)", r"python -m ehr_embed.\1", words)
            starts = tuple(f"python {name}.py" for name in COMPOSED) + tuple(
                f"python -m ehr_embed.{n} " for n in COMPOSED
            )
            if words.startswith(starts) and not re.search(r"sweeps=|hydra/sweeper|\.\.\.$|train.py -m ", words):
                found[words] = None
    return list(found)


@pytest.mark.parametrize("line", first_commands())
def test_the_commands_of_the_first_pages_compose_and_lack_nothing(line, tiny, tmp_path, inside):
    """Every key and option that they name exists, and what has to be given is given; the commands themselves run above and in
    `make demo`."""
    arguments = [
        a.replace("NAME", "outcome").replace("SUBJECT_ID", "20") for a in shlex.split(line.removeprefix("python "))
    ]
    assert "data=meds" not in arguments or any(a.startswith(("data.root=", "data.roots=")) for a in arguments), line
    arguments = [f"data.root={tiny}" if a.startswith("data.root=") else a for a in arguments]
    flags = [] if "--help" in arguments else ["--cfg", "job"]
    shown = inside(*arguments, *flags, cwd=tmp_path)
    assert "???" not in shown, "a key that has to be given is missing"


def test_every_group_and_option_stands_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for path in [*(ROOT / "conf").glob("*/*.yaml"), *(ROOT / "conf" / "trainer").glob("*/*.yaml")]:
        group = path.parent.relative_to(ROOT / "conf").as_posix()
        row = re.search(rf"^\| `{group}` \|(.*)$", text, flags=re.MULTILINE)
        assert row, path
        assert f"`{path.stem}`" in row.group(1), path


def test_the_texts_reach_the_prediction(tmp_path, inside):
    """The right texts carry over to names no label was seen for; the same texts on the wrong codes do not."""
    root = write_synonyms(tmp_path / "synonyms")
    arguments = ("data=meds", f"data.root={root}", "data.min_count=1", "model=encoder_small", "trainer=short")
    scores = {}
    for name, embedder in (("right", "minilm_l6"), ("wrong", "shuffled_text")):
        inside("train.py", *arguments, f"embedder={embedder}", f"run_dir={name}", "trainer.n_bootstrap=0", cwd=tmp_path)
        scores[name] = metrics_of(tmp_path / name)["held_out"]["auroc"]["value"]
    assert scores["right"] > 0.9
    assert scores["wrong"] < 0.75
