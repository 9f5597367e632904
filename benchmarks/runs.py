"""Make the training runs of a benchmark, in this process, unless they are there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from ehr_embed.experiment.run import run
from ehr_embed.run_folder.layout import FINISHED

CONF = Path(__file__).parents[1] / "conf"


def metrics_of(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Make a run in a folder unless it is there, and return its metrics."""
    if not (folder / FINISHED).exists():
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", overrides=[*overrides, f"run_dir={folder}"])
        run(cfg)
    found: dict[str, Any] = json.loads((folder / FINISHED).read_text())
    return found
