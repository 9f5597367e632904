"""The end of a run: the manifest of its folder, then `metrics.json`, by which it is known to be finished."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ehr_embed import __version__
from ehr_embed.core.files import json_text, read_json, write_json
from ehr_embed.core.manifest import checked, describe, write_manifest

FINISHED = "metrics.json"
"""Written last: a run that has it is finished."""
LISTED = (
    "config.yaml",
    "environment.json",
    "audit.json",
    "model_card.md",
    "metrics.jsonl",
    "*checkpoint*.pt",
    "vocabulary/*",
    "predictions/*.parquet",
)
"""What the manifest lists, beside the metrics: all that is read again, by this package or by a reader."""


def finish(run_dir: Path, metrics: dict[str, Any], made_from: dict[str, Any]) -> None:
    """Write the manifest and the metrics.

    Args:
        run_dir: the run's folder.
        metrics: what metrics.json holds.
        made_from: digests of what the run read.
    """
    files = describe(run_dir, [path for pattern in LISTED for path in run_dir.glob(pattern)])
    text = json_text(metrics).encode()
    files[FINISHED] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    write_manifest(run_dir, {"ehr_embed": __version__, "made_from": made_from}, files)
    write_json(run_dir / FINISHED, metrics)


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """`metrics.json` of a finished run.

    Raises:
        UserError: it is damaged, or not the one that the run's manifest lists.
    """
    metrics: dict[str, Any] = read_json(checked(run_dir / FINISHED))
    return metrics
