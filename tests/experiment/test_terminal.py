"""A user sees whole bars on a terminal and whole lines elsewhere, and no side remarks of Hydra, torch or Optuna."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.terminal import PAGE, on_a_terminal
from tests.helpers.entry_points import inside  # noqa: F401 (a fixture)
from tests.helpers.small_meds import ROOT

SMALL = ("data.n_subjects=200", "trainer.epochs=2", "trainer.n_bootstrap=20", "trainer.threads=1", "cache_dir=cache")
STRANGE = ("Warning", "Traceback", "requires_grad", "Loading weights", "Loading SentenceTransformer", "A new study", "NumExpr",
           "Error executing job")  # fmt: skip


def typed(*arguments: str, cwd: Path) -> tuple[int, str]:
    """Run train.py in a pseudo-terminal, and return its exit code and what it wrote there."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return on_a_terminal(str(ROOT / "train.py"), *arguments, cwd=cwd, environment=environment, silent_s=120)


@pytest.mark.slow
def test_no_bar_is_torn(tmp_path):
    code, output = typed(*SMALL, "run_dir=run", cwd=tmp_path)
    assert code == 0, output
    assert [word for word in STRANGE if word in output] == []
    assert "embedding texts: " in output
    assert "epoch 1: " in output, "there are bars"
    # A bar is written over itself (\r); a line that follows it begins on a line of its own.
    for line in re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output).replace("\r\n", "\n").split("\n"):
        shown = line.split("\r")[-1]
        assert not re.search(r"\d+%\|.*\|.*(?:train loss|metrics|Warning)", shown), shown


def test_a_mistake_is_one_line_typed(tmp_path):
    code, output = typed(*SMALL, "task.labels=absent", "run_dir=run", cwd=tmp_path)
    assert code == 2
    lines = [line for line in output.splitlines() if line.strip()]
    assert lines[-1].startswith("error: unknown task.labels 'absent'")
    assert not any(word in output for word in STRANGE)


def test_a_log_has_whole_sentences_and_nothing_twice(tmp_path, inside):
    where = (f"run_dir={tmp_path / 'a_folder_with_a_rather_long_name_as_logs_of_a_cluster_have_them' / ('run' * 20)}",)
    output = inside("train.py", *SMALL, *where, "embedder=hashing", cwd=tmp_path)
    assert re.search(r"^held-out and tuning metrics with 95 % intervals, \S+.*runrun$", output, re.MULTILINE)
    assert re.search(r"^[\d,]+ parameters, best epoch .* s in all$", output, re.MULTILINE)
    assert re.search(
        r"^Report: \S+runrun/report.html$\n^Next: python -m ehr_embed.explain run=\S+runrun$", output, re.MULTILINE
    )
    assert [word for word in STRANGE if word in output] == []
    embedded = inside("embed.py", "data.n_subjects=201", "embedder=hashing", "cache_dir=cache", cwd=tmp_path)
    told = [line for line in embedded.splitlines() if line.startswith("the texts of ")]
    assert told
    assert len(told) == len(set(told)), "the coverage stands there once"
    again = inside("embed.py", "data.n_subjects=201", "embedder=hashing", "cache_dir=cache", cwd=tmp_path)
    assert [line for line in again.splitlines() if line.startswith("the texts of ")] == told


@pytest.mark.slow
def test_many_runs_say_nothing_of_a_study_in_memory(tmp_path, inside):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *SMALL, "embedder=hashing", "seed=0,1"],
        cwd=tmp_path, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "A new study" not in done.stdout + done.stderr


def test_the_recorded_terminal_has_no_line_to_wonder_at():
    """docs/terminal.md, which `python docs/terminal.py` records."""
    text = PAGE.read_text(encoding="utf-8")
    assert [word for word in STRANGE if word in text] == []
    terminal, log = re.findall(r"^```text\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    for recorded in (terminal, log):
        assert [line.split()[2] for line in recorded.splitlines() if line.startswith("$ python ")] == [
            "embed.py",
            "train.py",
        ]
        assert re.search(r"^│ auroc +│ 0\.\d+ \[", recorded, flags=re.MULTILINE), "the metrics table"
        assert re.search(r"^[\d,]+ parameters, best epoch .* s in all$", recorded, flags=re.MULTILINE)
        assert "\x1b" not in recorded
        assert "\r" not in recorded
    assert "%|" not in log, "a bar in a log file"
