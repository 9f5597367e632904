"""The end of a run: the manifest of its folder, then `metrics.json`, by which it is known to be finished; and their readers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from yaml import YAMLError

from ehr_embed import __version__
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import json_text, read_json, write_json
from ehr_embed.core.manifest import checked, describe, write_manifest
from ehr_embed.core.moved import renamed
from ehr_embed.core.plain_yaml import read_yaml
from ehr_embed.run_folder.layout import (
    ALIGNMENT,
    AUDIT,
    CALIBRATION,
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    FINISHED,
    HISTORY,
    MODEL_CARD,
    PREDICTIONS,
    VOCABULARY,
)

LISTED = (
    CONFIG,
    ENVIRONMENT,
    AUDIT,
    ALIGNMENT,
    CALIBRATION,
    MODEL_CARD,
    HISTORY,
    CHECKPOINTS,
    f"{VOCABULARY}/*",
    f"{PREDICTIONS}/*.parquet",
)
"""Files that the manifest lists in addition to metrics.json: all files that this package or a person reads later."""


def finish(run_dir: Path, metrics: dict[str, Any], made_from: dict[str, Any]) -> None:
    """Write the manifest, and then metrics.json, which marks the run as finished.

    Args:
        run_dir: the run's folder.
        metrics: content of metrics.json.
        made_from: digests of the inputs of the run.
    """
    files = describe(run_dir, [path for pattern in LISTED for path in run_dir.glob(pattern)])
    text = json_text(metrics).encode()
    files[FINISHED] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    write_manifest(run_dir, {"ehr_embed": __version__, "made_from": made_from}, files)
    write_json(run_dir / FINISHED, metrics)


def read_config(run_dir: Path) -> dict[str, Any] | None:
    """Return the resolved configuration of a run from its config.yaml; None if the folder holds no such file.

    Raises:
        UserError: the file is damaged, or differs from the run's manifest.
    """
    path = run_dir / CONFIG
    if not path.exists():
        return None
    try:
        config = read_yaml(checked(path))
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML ({error}). Restore the run's folder, or train again.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected the keys of a configuration. Restore the run's folder, or train again.")
    return {str(key): renamed(value) for key, value in config.items()}


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """Return the content of metrics.json of a finished run.

    Raises:
        UserError: the file is damaged, or differs from the run's manifest.
    """
    metrics: dict[str, Any] = read_json(checked(run_dir / FINISHED))
    return metrics
