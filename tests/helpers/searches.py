"""Run train.py as a search in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.overrides import last_of_each
from tests.helpers.small_meds import ROOT


def train(*arguments: str, cwd: Path, code: int = 0) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "OPTUNA_"))}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *last_of_each(arguments)],
        cwd=cwd,
        env=environment | {"HOME": str(cwd), "WANDB_DIR": str(cwd), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    return output
