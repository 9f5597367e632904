"""Contents of a run's folder: a run removes only files that a run wrote, and writes only into its own or an empty folder."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from ehr_embed.core.errors import UserError
from ehr_embed.core.manifest import MANIFEST
from ehr_embed.core.outcome import OUTCOME
from ehr_embed.run_folder.layout import (
    ALIGNMENT,
    AUDIT,
    BEST,
    CALIBRATION,
    CONFIG,
    DECISION_CURVE,
    ENVIRONMENT,
    EXPLAINED,
    FINISHED,
    HISTORY,
    LATEST,
    LOCK,
    MEMBERS,
    MODEL_CARD,
    PLOTS,
    PREDICTIONS,
    PROFILE,
    REPORT,
    SUMMARY,
    VOCABULARY,
    WANDB_ID,
)
from ehr_embed.sources.protocol import SPLITS

RESULTS = (
    FINISHED,
    HISTORY,
    SUMMARY,
    AUDIT,
    ALIGNMENT,
    CALIBRATION,
    MODEL_CARD,
    REPORT,
    WANDB_ID,
    PROFILE,
    BEST,
    LATEST,
)
EPOCH_CHECKPOINT = re.compile(r"checkpoint_epoch_\d+\.pt")
FIGURES = ("loss", "roc", "precision_recall", "calibration", "decision_curve")
"""The plots of a run, as `reports.run_report.write_plots` names them."""
BESIDE_A_RUN = ("pretrain", MEMBERS, EXPLAINED, "generated", "wandb", "log.txt", "slurm.out")
"""Names that the commands, the trackers and a search write into a run's folder."""


def refuse_other_contents(run_dir: Path) -> None:
    """Refuse a folder that is neither empty nor a run's.

    Raises:
        UserError: the folder is a MEDS dataset, or holds files that no run writes.
    """
    if not run_dir.is_dir():
        return
    names = sorted(path.name for path in run_dir.iterdir() if not path.name.startswith("."))
    is_run = {CONFIG, ENVIRONMENT} <= set(names) or LATEST in names or BEST in names
    others = [name for name in names if not _is_of_a_run(name)]
    if is_run or not others:
        return
    is_dataset = {"data", "metadata"} <= set(names)
    what = "a MEDS dataset" if is_dataset else f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
    raise UserError(
        f"run_dir={run_dir} holds {what} and no run: expected a new folder, an empty one, or that of a run. A run would mix its "
        "files with those, and could replace one of the same name. Type: run_dir=ANOTHER"
    )


def remove_results(run_dir: Path) -> None:
    """Remove the results and checkpoints that a run wrote, by their exact names; whatever else lies there stays."""
    names = [path.name for path in run_dir.iterdir() if EPOCH_CHECKPOINT.fullmatch(path.name)]
    for path in (
        *(run_dir / name for name in (*RESULTS, *names)),
        *(run_dir / PREDICTIONS / f"{split}.parquet" for split in SPLITS),
        *(run_dir / PLOTS / f"{name}.png" for name in FIGURES),
        run_dir / PLOTS / DECISION_CURVE,
    ):
        if path.is_file() or path.is_symlink():
            path.unlink()
    for folder in (PREDICTIONS, PLOTS):
        with contextlib.suppress(OSError):  # absent, or not empty: somebody else's files are in it
            (run_dir / folder).rmdir()


def _is_of_a_run(name: str) -> bool:
    known = (*RESULTS, CONFIG, ENVIRONMENT, MANIFEST, OUTCOME, LOCK, VOCABULARY, PREDICTIONS, PLOTS, *BESIDE_A_RUN)
    return name in known or EPOCH_CHECKPOINT.fullmatch(name) is not None
