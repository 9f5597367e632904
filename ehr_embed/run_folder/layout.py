"""Names of the files in a run's folder, for every module that reads or writes one."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
AUDIT = "audit.json"
ALIGNMENT = "alignment.csv"
"""The match table of a run whose codes are aligned with those of another."""
CALIBRATION = "calibration.json"
"""The calibration that was fitted on tuning, if there is one: whoever predicts applies it."""
FINISHED = "metrics.json"
"""The file that a run writes last: a run with this file is finished."""
HISTORY = "metrics.jsonl"
SUMMARY = "summary.json"
MODEL_CARD = "model_card.md"
REPORT = "report.html"
"""The report for people, of a run and of a search: one file that loads nothing."""
BEST, LATEST = "best_checkpoint.pt", "latest_checkpoint.pt"
CHECKPOINTS = "*checkpoint*.pt"
VOCABULARY, TABLE, LOOKUPS = "vocabulary", "table.safetensors", "lookups.csv"
"""Folder of the vocabulary, and two files in it: the vectors of its tokens, and the texts that lookups gave its codes."""
EXPLAINED, MOVED, MOVED_TEXTS = "explained", "texts.png", "texts.csv"
"""Folder of what `ehr-embed explain` writes, and the summary in it: the texts that move predictions most."""
PREDICTIONS, PLOTS = "predictions", "plots"
DECISION_CURVE = "decision_curve.csv"
"""The numbers that decision_curve.png shows; the file lies in the folder of the plots."""
MEMBERS = "members"
"""Folder of the runs that an ensemble is made of."""
PROFILE = "profile.json"
WANDB_ID = "wandb_id.txt"
LOCK = ".lock"


def epoch_checkpoint(epoch: int) -> str:
    """Return the file name of the checkpoint that trainer.save_every keeps after an epoch.

    >>> epoch_checkpoint(3)
    'checkpoint_epoch_3.pt'
    """
    return f"checkpoint_epoch_{epoch}.pt"


def predictions_file(run_dir: Path, split: str) -> Path:
    """Return the path of a run's predictions on a split.

    >>> predictions_file(Path("run"), "held_out").as_posix()
    'run/predictions/held_out.parquet'
    """
    return run_dir / PREDICTIONS / f"{split}.parquet"
