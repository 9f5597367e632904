"""The calibration of a run in its folder: plain JSON, which is checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import read_json, write_json
from ehr_embed.core.manifest import MANIFEST, check_files, read_manifest
from ehr_embed.run_folder.layout import CALIBRATION

FORMAT = 1
REMEDY = "Restore the run's folder, or fit the calibration again: python train.py ... run_dir=RUN_DIR resume=force"
KEYS = {"format", "calibration", "class_names", "parameters"}


def write_calibration(
    run_dir: Path, node: dict[str, Any], class_names: Sequence[str], parameters: dict[str, Any]
) -> None:
    """Write what a calibration has fitted.

    Args:
        run_dir: the run's folder.
        node: the group `calibration` of the run's configuration.
        class_names: the classes that it was fitted for.
        parameters: plain values.
    """
    content = {"format": FORMAT, "calibration": node, "class_names": list(class_names), "parameters": parameters}
    write_json(run_dir / CALIBRATION, content)


def read_calibration(run_dir: Path, class_names: Sequence[str]) -> dict[str, Any] | None:
    """Return the group `calibration` and the `parameters` of a run; None where it has none.

    Args:
        run_dir: the run's folder, which may come from elsewhere: neither value is to be trusted before it is checked.
        class_names: the classes that the run predicts.

    Raises:
        UserError: the manifest lists a calibration that is missing or was changed, or the file is another one: probabilities that
            were not calibrated would be taken for such as were.
    """
    path = run_dir / CALIBRATION
    if (run_dir / MANIFEST).is_file():
        listed = read_manifest(run_dir / MANIFEST, REMEDY)["files"]
        check_files(
            run_dir, {name: listed[name] for name in (CALIBRATION,) if name in listed}, REMEDY, integrity="full"
        )
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or set(content) != KEYS:
        raise UserError(
            f"{path}: expected a calibration of format {FORMAT} with {', '.join(sorted(KEYS))}, which train.py writes. {REMEDY}"
        )
    if content["class_names"] != list(class_names) or not isinstance(content["parameters"], dict):
        raise UserError(
            f"{path} was fitted for the classes {str(content['class_names'])[:80]}, and the run predicts "
            f"{', '.join(class_names)}: it belongs to another run. {REMEDY}"
        )
    return {name: content[name] for name in ("calibration", "parameters")}
