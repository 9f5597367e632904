"""The documentation builds as a site, its tables are those of conf/, and what it tells to write and to type runs."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
import torch

import ehr_embed
from docs.hooks import outside
from docs.options import AXES, expanded
from ehr_embed.inference.trained_run import open_run
from tests.helpers.built_site import build, site  # noqa: F401  (a fixture)
from tests.helpers.corpora import record, write_corpus
from tests.helpers.entry_points import checked, inside, metrics_of  # noqa: F401  (a fixture)
from tests.helpers.overrides import last_of_each
from tests.helpers.refusals import refused
from tests.helpers.small_meds import ROOT

DOCS = ROOT / "docs"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', flags=re.MULTILINE | re.DOTALL)
SHOWN = ("conf", "sweeps", "ehr_embed", "tests", "README.md")
"""Targets of the links of pages."""
DEMO_SIZE = 400


def test_every_page_is_on_the_site_and_loads_nothing_from_elsewhere(site):
    pages = {path.stem for path in DOCS.glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}
    for path in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe)[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)", path.read_text()
        )
        assert loaded == [], path


def test_no_markdown_is_left_unrendered(site):
    """Python-Markdown wants blank lines and indents where GitHub does not."""
    for path in site.glob("*.html"):
        article = re.search(r"<article.*?</article>", path.read_text(), flags=re.DOTALL)
        if article is None:  # 404.html
            continue
        prose = re.sub(r"<pre.*?</pre>|<code>.*?</code>", "", article[0], flags=re.DOTALL)
        text = html.unescape(re.sub(r"<[^>]+>", "", prose))
        assert re.findall(r"^.*(?:```|\|---|\]\().*$|^(?:- |\d+\. |#+ ).*$", text, flags=re.MULTILINE) == [], path


def test_links_to_files_of_the_repository_show_them(site):
    assert (outside("../conf/train.yaml", "axes.md"), outside("search.md", "axes.md")) == ("conf/train.yaml", None)
    assert 'href="repository/conf/train.yaml.html"' in (site / "axes.html").read_text()
    shown = (site / "repository" / "conf" / "train.yaml.html").read_text()
    assert "Seed of the weights, dropout and batch order" in html.unescape(re.sub(r"<[^>]+>", "", shown))


def test_broken_links_and_an_unlisted_page_end_the_build(tmp_path):
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for name in SHOWN:
        (tmp_path / name).symlink_to(ROOT / name)
    faults = (
        ("axes.md", "[x](../conf/absent.yaml)", r"axes\.md.*\.\./conf/absent\.yaml"),
        ("axes.md", "[x](search.md#absent)", r"axes\.md.*search\.md#absent"),
        ("unlisted.md", "# A page that nobody finds", r"not included in the \"nav\".*\n.*unlisted\.md"),
    )
    for page, line, _ in faults:
        with open(tmp_path / "docs" / page, "a") as file:
            file.write(f"\n{line}\n")
    done = build(tmp_path, tmp_path / "site", api=False)
    assert done.returncode != 0
    for *_, message in faults:
        assert re.search(message, done.stderr), done.stderr


def test_the_tables_of_the_axes_are_the_heads_of_the_yaml():
    page = AXES.read_text()
    assert expanded(page) == page, "a YAML was added or its head changed. Type: python docs/options.py"
    for folder in ("conf", "sweeps"):
        for path in (ROOT / folder).rglob("*.yaml"):
            assert f"(../{path.relative_to(ROOT)})" in page, "its folder has no marker in docs/axes.md"


def blocks(page: str, section: str | None = None) -> Iterator[tuple[str, str, str]]:
    """(language, title, text) of the fenced blocks of a page of docs/, or of one of its sections."""
    text = (DOCS / page).read_text()
    if section is not None:
        found = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
        assert found, f"{page} has no section {section}"
        text = found[1]
    yield from FENCE.findall(text)


@pytest.fixture
def follow(tmp_path, monkeypatch, inside) -> Callable[..., Path]:
    """Write the titled blocks of a page where their titles say, and run its `bash` lines, in a folder that looks like a
    checkout. `words` stand for the capitals of the commands; the demo is small and training short."""
    for name in ("train.py", "embed.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("conf", "sweeps", "ehr_embed"):
        (tmp_path / name).symlink_to(ROOT / name)

    def run(
        page: str,
        section: str | None = None,
        *,
        words: dict[str, str] | None = None,
        searches: bool = True,
        texts: bool = False,
    ) -> Path:
        commands = 0
        for language, title, text in blocks(page, section):
            if title:
                (tmp_path / title).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / title).write_text(text)
            elif language == "bash":
                for line in text.splitlines():
                    if searches or not is_search(line):
                        type_line(line, words or {}, texts)
                        commands += 1
        assert commands, "nothing was run"
        return tmp_path

    def type_line(line: str, words: dict[str, str], texts: bool) -> None:
        line = line.replace("demo-5000-0", f"demo-{DEMO_SIZE}-0")
        for word, meant in words.items():
            line = re.sub(rf"\b{word}\b", meant, line)
        program, *arguments = shlex.split(line)
        assert program in ("python", "ehr-embed"), line
        if program == "ehr-embed":
            name, *rest = arguments
            arguments = [f"{name}.py", *rest] if name in ("train", "embed") else ["-m", f"ehr_embed.{name}", *rest]
        arguments = last_of_each([*arguments, *shortened(arguments, texts=texts)])
        # A search starts processes; they, and scripts, find the checkout as a user's do.
        if is_search(line) or arguments[0].startswith("write_"):
            done = subprocess.run(
                [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
            )
            checked(done.returncode, done.stdout + done.stderr, 0)
        else:
            inside(*arguments, cwd=tmp_path)

    monkeypatch.syspath_prepend(str(tmp_path))  # as Python does with the folder of train.py
    yield run
    for name in [name for name in sys.modules if name == "my" or name.startswith("my.")]:
        del sys.modules[name]


def is_search(line: str) -> bool:
    return "sweeps=" in line or "hydra/sweeper=" in line


def shortened(arguments: list[str], *, texts: bool = True) -> list[str]:
    """Overrides that make a documented command quick; small models on the toy sets are quick as they stand.

    Without `texts`, vectors come from no network: those of the default embedder take longer than the training.
    """
    entry = arguments[0]
    if not texts and entry in ("train.py", "embed.py") and not any(a.startswith("embedder=") for a in arguments):
        return ["embedder=hashing", "embedder.embedding_dim=384", *shortened(arguments)]
    if entry == "-m":
        return ["max_samples=20"] if arguments[1] == "ehr_embed.explain" else []
    if entry not in ("train.py", "embed.py") or "model=encoder_small" in arguments:
        return []
    short = ["trainer.epochs=2", "trainer.n_bootstrap=20"]
    if not any(argument.startswith("data=") for argument in arguments):
        short.append(f"data.n_subjects={DEMO_SIZE}")
    elif not any(argument.startswith("model=") for argument in arguments):
        short += ["model.n_layers=1", "model.model_dim=16"]  # of the default encoder, which is sized for a GPU
    if "sweeps=encoder_tpe" in arguments:
        short.append("hydra.sweeper.n_trials=2")
    if is_search(" ".join(arguments)):
        short.append("hydra.sweeper.has_plots=false")
    return short


def test_nothing_to_type_asks_a_registry_for_the_package():
    """It is not there yet; an extra of an installed package needs no registry for the package itself."""
    pages = {path: path.read_text() for path in (ROOT / "README.md", *DOCS.glob("*.md"))}
    for path, text in pages.items():
        for _, _, block in FENCE.findall(text):
            assert not re.findall(r"pip install (?:-\S+ )*ehr_embed\b", block), path
    for path in (ROOT / "README.md", DOCS / "index.md", DOCS / "install.md"):
        first = next(block for language, _, block in FENCE.findall(pages[path]) if language in ("sh", "bash"))
        assert first.splitlines()[0].split("  #")[0].strip() == "pip install .", path


@pytest.mark.slow
def test_the_quick_start_runs(follow):
    folder = follow(
        "quick-start.md", words={"DIR": f"cache/demo-{DEMO_SIZE}-0", "NAME": "hospitalisation_1y"}, texts=True
    )
    for run in ("first", "boosting", "mine", "second"):
        assert 0 < metrics_of(folder / "runs" / run)["held_out"]["auroc"]["value"] <= 1
    assert len(pl.read_csv(folder / "comparison" / "comparisons.csv")) == 3, "AUROC, AUPRC and Brier score of one pair"
    assert (
        len(pl.read_parquet(folder / "predictions.parquet")) == metrics_of(folder / "runs" / "first")["held_out"]["n"]
    )
    assert (folder / "runs" / "first" / "explained" / "texts.csv").is_file()
    assert len(pl.read_csv(folder / "multirun" / "encoder_tpe" / "summary.csv")) == 2


@pytest.mark.slow
def test_bringing_data_runs(follow):
    folder = follow("data.md", words={"DIR": "toy", "NAME": "admitted"}, texts=True)
    toy, fold = (metrics_of(folder / "runs" / name)["held_out"] for name in ("toy", "fold_0"))
    assert toy["auroc"]["value"] > 0.75, "the signs of illness are learned"
    assert (toy["n"], fold["n"]) == (50, 45)


@pytest.mark.slow
def test_the_files_of_the_original_pipeline_are_read(follow, tmp_path):
    timed = [("MEDICAL//asthma", 0.0), ("LAB//CRP", 10.0), ("5.5", 10.0)]
    splits = {
        split: [[record(first + i, timed) for i in range(4)]]
        for first, split in ((1, "train"), (5, "tuning"), (9, "held_out"))
    }
    write_corpus(tmp_path / "DATA", splits, [(subject, subject % 2, "", "") for subject in range(1, 13)])
    folder = follow("migration.md", "Its files, read")
    assert metrics_of(folder / "runs" / "tokenized")["held_out"]["n"] == 4
    assert (folder / "converted" / "metadata" / "codes.parquet").is_file()
    assert metrics_of(folder / "runs" / "files")["held_out"]["n"] == DEMO_SIZE * 0.15


def test_a_model_in_one_file_and_one_yaml(follow):
    folder = follow("extending.md", "A model")
    checkpoint = torch.load(folder / "runs" / "conv" / "best_checkpoint.pt", weights_only=True)
    assert checkpoint["config"]["model"]["_target_"] == "my.conv.Conv"
    assert checkpoint["model_state_dict"]["filters.weight"].shape == (64, 64, 5)
    assert 0 < metrics_of(folder / "runs" / "conv")["held_out"]["auroc"]["value"] <= 1
    assert len(pl.read_parquet(folder / "runs" / "conv" / "all.parquet")) == DEMO_SIZE
    assert ehr_embed.load(folder / "runs" / "conv", trusted_packages=["my"]).class_names == ["false", "true"]
    with refused("_target_=my.conv.Conv", "trusted_packages=[my]"):
        ehr_embed.load(folder / "runs" / "conv")

    model = open_run(folder / "runs" / "conv1", trusted=("my",)).model  # by the experiment
    x, mask = torch.randn(1, 6, 384), torch.ones(1, 6, dtype=torch.bool)
    padded = torch.cat([x, torch.randn(1, 9, 384)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(1, 9, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(
        model({"embeddings": padded, "padding_mask": padded_mask}), model({"embeddings": x, "padding_mask": mask})
    )  # padding reaches nothing


def test_an_embedder_in_one_file_and_one_yaml(follow):
    folder = follow("extending.md", "An embedder")
    run = open_run(folder / "runs" / "letters")
    assert run.config["embedder"]["_target_"] == "my.letters.LetterEmbedder"
    table, texts = run.embedding.table, run.vocabulary.texts
    assert table.shape == (len(texts), 702)
    text = texts[5].lower()
    assert {letter for letter, value in zip("abcdefghijklmnopqrstuvwxyz", table[5], strict=False) if value > 0} == {
        letter for letter in text if letter in "abcdefghijklmnopqrstuvwxyz"
    }
    assert 0 < metrics_of(folder / "runs" / "letters")["held_out"]["auroc"]["value"] <= 1


def test_a_task_in_one_file_and_one_yaml(follow):
    folder = follow("extending.md", "A task", searches=False)
    for run in ("workload", "workload_gru"):
        held_out = metrics_of(folder / "runs" / run)["held_out"]
        assert set(held_out) == {"squared_error", "explained", "n", "n_subjects"}
        assert (
            held_out["squared_error"]["low"] <= held_out["squared_error"]["value"] <= held_out["squared_error"]["high"]
        )
    events = pl.read_parquet(folder / "cache" / f"demo-{DEMO_SIZE}-0" / "data" / "**" / "*.parquet")
    rows = pl.read_parquet(folder / "runs" / "workload" / "predictions" / "held_out.parquet")
    later = rows.join(events, on="subject_id").filter(
        pl.col("time") > pl.col("prediction_time"), pl.col("time") <= pl.col("prediction_time") + timedelta(days=180)
    )
    known = rows.join(later.group_by("subject_id").len(), on="subject_id", how="left").fill_null(0)
    assert (known["log_count"] - (known["len"] + 1).log()).abs().max() < 1e-5


def test_a_loss_in_one_file_and_one_yaml(follow):
    folder = follow("extending.md", "A loss of your own")
    last = pl.read_ndjson(folder / "runs" / "focal" / "metrics.jsonl").to_dicts()[-1]
    assert last["tuning/trained_loss"] < last["tuning/loss"], "samples that are right already count less"
    assert ehr_embed.load(folder / "runs" / "focal", trusted_packages=["my"]).class_names == ["false", "true"]


def test_classes_from_the_records_in_one_file_and_one_yaml(follow):
    folder = follow("extending.md", "Classes computed from the records")
    metrics = metrics_of(folder / "runs" / "soon")
    assert 0.5 < metrics["held_out"]["auroc"]["value"] <= 1
    assert "bayes_auroc" not in metrics, "the demo's best possible AUROC is that of another question"
    root = folder / "cache" / f"demo-{DEMO_SIZE}-0"
    events = pl.read_parquet(root / "data" / "**" / "*.parquet")
    rows = pl.read_parquet(folder / "runs" / "soon" / "predictions" / "held_out.parquet")
    admissions = events.filter(pl.col("code").is_in(["ADMISSION//emergency", "ADMISSION//icu"])).join(
        rows, on="subject_id"
    )
    after = pl.col("time") - pl.col("prediction_time")
    soon = admissions.filter(after > timedelta(0), after <= timedelta(days=365))["subject_id"].unique()
    assert rows.filter("boolean_value")["subject_id"].sort().to_list() == soon.sort().to_list()
    assert len(pl.read_parquet(folder / "runs" / "soon" / "all.parquet")) == DEMO_SIZE


def test_a_schedule_and_an_optimizer_in_one_file_and_one_yaml_each(follow):
    folder = follow("extending.md", "A schedule, an optimizer")
    checkpoint = torch.load(folder / "runs" / "lion" / "latest_checkpoint.pt", weights_only=True)
    chosen = checkpoint["config"]["trainer"]
    assert (chosen["optimizer"]["_target_"], chosen["schedule"]["flat_steps"]) == ("my.lion.Lion", 5)
    assert {name for state in checkpoint["optimizer_state_dict"]["state"].values() for name in state} == {"average"}
    steps = checkpoint["progress"]["step"]
    after = steps - round(0.2 * steps)
    (rate,) = {group["lr"] for group in checkpoint["optimizer_state_dict"]["param_groups"]}
    assert rate == pytest.approx(1e-3 * (5 / after) ** 0.5)
    assert 0 < metrics_of(folder / "runs" / "lion")["held_out"]["auroc"]["value"] <= 1
    ehr_embed.load(folder / "runs" / "lion")  # which builds neither, so that it need not trust `my`


@pytest.mark.slow
def test_a_task_of_ones_own_is_searched(follow):
    folder = follow("extending.md", "A task")
    study = json.loads((folder / "multirun" / "workload" / "study.json").read_text())
    assert study["directions"] == ["minimize"]
    assert len(pl.read_csv(folder / "multirun" / "workload" / "summary.csv")) == 2


def test_a_source_in_one_file_and_one_yaml(follow, inside):
    folder = follow("extending.md", "A source")
    metrics = metrics_of(folder / "runs" / "clinic")
    assert metrics["held_out"]["auroc"]["value"] > 0.7, "the signs of illness are learned"
    assert metrics["held_out"]["n"] + metrics["tuning"]["n"] + metrics["train"]["n"] == 300
    imported = folder / "cache" / "clinic"
    events = pl.read_parquet(imported / "data" / "**" / "*.parquet")
    assert len(events) == len((folder / "clinic" / "events.csv").read_text().splitlines()) - 1
    assert (folder / "runs" / "clinic" / "explained" / "texts.csv").is_file()
    own = ("--config-dir", "my", "data=clinic", "data.folder=clinic", "data.root=cache/clinic", "trusted_packages=[my]")
    inside(
        "train.py", *own, "task=next_event", "model=decoder_small", "trainer.epochs=1", "trainer.n_bootstrap=0",
        "embedder=hashing", "run_dir=runs/pretrained", cwd=folder,
    )  # fmt: skip
    generate = ("-m", "ehr_embed.generate", "run=runs/pretrained", "max_new_events=4", "horizon_days=7")
    assert "trusted_packages=[my]" in inside(*generate, cwd=folder, code=2)
    inside(*generate, "trusted_packages=[my]", cwd=folder)
    assert (folder / "runs" / "pretrained" / "generated" / "held_out" / "0.parquet").is_file()
