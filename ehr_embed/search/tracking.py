"""A search in Weights & Biases: one run per job in the study's group, and a last run with the table of all trials."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from omegaconf import DictConfig

from ehr_embed.core.files import read_json
from ehr_embed.search.application import application
from ehr_embed.search.space import choice_text

if TYPE_CHECKING:
    import pandas as pd


def tracker_overrides(example: DictConfig, study_name: str, number: int, seed: int | None) -> list[str]:
    """Return the overrides that place a job's tracker run into the study's group; none for a tracker without run ids.

    A name, group or job type that the user has set stays. The run id is always set, since it must be unique.
    """
    tracker = example.get("tracker")
    if tracker is None or "run_id" not in tracker:
        return []
    name = f"{study_name}-{number}" if seed is None else f"{study_name}-{number}-seed{seed}"
    wanted = {"run_id": run_id(name), "name": name, "group": study_name, "job_type": "trial"}
    is_free: Mapping[str, bool] = {
        "run_id": True,
        "name": tracker.get("name") is None,
        "group": tracker.get("group") is None,
        "job_type": tracker.get("job_type") == "train",
    }
    return [f"tracker.{key}={choice_text(value)}" for key, value in wanted.items() if is_free[key]]


PRIVATE = ("command", "fixed", "storage")
"""Facts of a study that quote the command line and may therefore contain paths and secrets; they are not sent."""


def run_id(name: str) -> str:
    r"""Return a name as a W&B run id, in which / \ # ? % : and spaces are not allowed.

    >>> run_id("my study/2-7")
    'my-study-2-7'
    """
    return re.sub(r"[^\w-]", "-", name)


def log_search(example: DictConfig, study: optuna.Study, folder: Path, table: pd.DataFrame) -> None:
    """Record the search as a run of its own: its facts as config, its trials as a table, its best trial as summary."""
    tracker_config: Any = example.get("tracker")
    if tracker_config is None or "run_id" not in tracker_config:
        return
    name = f"{study.study_name}-search"
    chosen = {"run_id": run_id(name), "name": name, "job_type": "search"}
    config = tracker_config.copy()
    config.update(
        chosen | {"group": tracker_config.get("group") or study.study_name, "log_table": False, "log_examples": False}
    )
    facts = read_json(folder / "study.json")
    told = {key: value for key, value in facts.items() if key not in PRIVATE}
    tracker = application().build(
        config, run_dir=folder, config=told, tags=["search"], table_digest=None, table_path=None
    )
    with tracker:
        # An error message may quote a path or a record, and a host name is private, so neither column is sent.
        tracker.add_table("trials", table.drop(columns=["error", "host"], errors="ignore"))
        pages = sorted(folder.glob("*.html"))  # the report is the only page beside the table
        if pages and hasattr(tracker, "add_report"):
            tracker.add_report(lambda *, has_codes=True: pages[0].read_text(encoding="utf-8"))
        tracker.summarise({f"n_{state}": count for state, count in facts["n_by_state"].items()})
        if facts["best"]:
            best = facts["best"][0]
            tracker.summarise({"best/trial": best["run"]} | {f"best/{k}": v for k, v in best["values"].items()})
