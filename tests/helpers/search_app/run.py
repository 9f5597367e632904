"""Runs the toy application in a process of its own, as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from ehr_embed.search.storage import JOURNAL_NAME, open_storage
from ehr_embed.search.study import DISCARDED
from tests.helpers.overrides import last_of_each
from tests.helpers.small_meds import ROOT

APP = ROOT / "tests" / "helpers" / "search_app" / "app.py"
STUDY = ("-m", "hydra/sweeper=study", "hydra.sweeper.direction=minimize", "hydra.sweeper.has_plots=false")


def environment(**extra: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("OPTUNA_STORAGE", "HYDRA_FULL_ERROR")}
    return kept | {"EHR_EMBED_CONF": str(ROOT / "conf"), "PYTHONPATH": str(ROOT)} | extra


def start(*arguments: str, cwd: Path, **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(APP), *last_of_each([*STUDY, *arguments])],
        cwd=cwd,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def search(*arguments: str, cwd: Path, code: int = 0, **extra: str) -> str:
    process = start(*arguments, cwd=cwd, **extra)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    assert code == 0 or "Traceback" not in output, output
    return output


def trials_of(cwd: Path, name: str = "app", storage: str | None = None) -> list[FrozenTrial]:
    url = storage or str(cwd / "multirun" / name / JOURNAL_NAME)
    return optuna.load_study(study_name=name, storage=open_storage(url).storage).trials


def counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if DISCARDED not in trial.user_attrs]


def states(trials: Sequence[FrozenTrial]) -> list[str]:
    return [trial.state.name for trial in trials]


def distinct(trials: Sequence[FrozenTrial]) -> int:
    return len({json.dumps(trial.params, sort_keys=True) for trial in trials})


def finished(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def started(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
