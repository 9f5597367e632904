"""Tell of the runs of a table's row by which command, with which code, on which hardware and when they were made."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ehr_embed.core.files import read_json
from ehr_embed.core.outcome import read_outcome
from ehr_embed.core.secrets import without_folders
from ehr_embed.run_folder.layout import ENVIRONMENT

COLUMNS = ("command", "commit", "hardware", "date")


def provenance_of(runs: Sequence[Path]) -> dict[str, str]:
    """Return command, commit, hardware and date of runs that repeat each other; what their folders do not say is empty.

    The command lists the overrides of the runs, those that differ joined by commas. Folders are named by their last part.
    """
    environments = [read_json(run / ENVIRONMENT) for run in runs if (run / ENVIRONMENT).is_file()]
    lines = [outcome.overrides for run in runs if (outcome := read_outcome(run))]
    dates = sorted(str(found["date"])[:10] for found in environments if found.get("date"))
    return {
        "command": command_of(lines) if len(lines) == len(runs) else "",
        "commit": ", ".join(dict.fromkeys(str(found["commit"]) for found in environments if found.get("commit"))),
        "hardware": ", ".join(dict.fromkeys(hardware for found in environments if (hardware := hardware_of(found)))),
        "date": dates[0] if dates and dates[0] == dates[-1] else " to ".join(dates[:1] + dates[-1:]),
    }


def hardware_of(environment: dict[str, object]) -> str:
    """Return the hardware in an environment.json: GPUs, or the processor with the threads of the run.

    >>> hardware_of({"gpus": [], "cpu": "Xeon", "threads": 1}), hardware_of({"gpus": ["H100", "H100"]}), hardware_of({})
    ('Xeon, 1 thread', '2 x H100', '')
    """
    gpus = environment.get("gpus")
    if isinstance(gpus, list) and gpus:
        return f"{len(gpus)} x {gpus[0]}"
    cpu, threads = environment.get("cpu"), environment.get("threads")
    return f"{cpu}, {threads} thread{'' if threads == 1 else 's'}" if cpu else ""


def command_of(lines: Sequence[Sequence[str]]) -> str:
    """Return the command of runs from their overrides.

    >>> command_of([["model=gbm", "seed=0", "data.root=/data/ann/p12"], ["model=gbm", "seed=1", "data.root=/data/ann/p12"]])
    'ehr-embed train -m model=gbm seed=0,1 data.root=p12'
    """
    values: dict[str, dict[str, None]] = {}
    for line in lines:
        for override in line:
            key, _, value = without_folders(override).partition("=")
            values.setdefault(key, {})[value] = None
    words = [shlex.quote(f"{key}={','.join(found)}") for key, found in values.items()]
    # A YAML of sweeps/ says by itself that there are many runs.
    flag = ["-m"] if "sweeps" not in values and any(len(found) > 1 for found in values.values()) else []
    return " ".join(["ehr-embed", "train", *flag, *words])
