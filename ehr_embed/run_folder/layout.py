"""The files of a run's folder, by name: whoever writes or reads one takes its name from here."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
AUDIT = "audit.json"
FINISHED = "metrics.json"
"""Written last: a run that has it is finished."""
HISTORY = "metrics.jsonl"
SUMMARY = "summary.json"
OUTCOME = "outcome.json"
"""How a job of a multirun ended."""
MODEL_CARD = "model_card.md"
BEST, LATEST = "best_checkpoint.pt", "latest_checkpoint.pt"
CHECKPOINTS = "*checkpoint*.pt"
VOCABULARY, TABLE, LOOKUPS = "vocabulary", "table.safetensors", "lookups.csv"
"""A folder, and in it, beside the vocabulary's own files, the vectors of its tokens and the terms of its codes."""
PREDICTIONS, PLOTS = "predictions", "plots"
PROFILE = "profile.json"
WANDB_ID = "wandb_id.txt"
LOCK = ".lock"


def epoch_checkpoint(epoch: int) -> str:
    """Return the name of the checkpoint that is kept of an epoch.

    >>> epoch_checkpoint(3)
    'checkpoint_epoch_3.pt'
    """
    return f"checkpoint_epoch_{epoch}.pt"


def predictions_file(run_dir: Path, split: str) -> Path:
    """Return where a run leaves its predictions of a split.

    >>> predictions_file(Path("run"), "held_out").as_posix()
    'run/predictions/held_out.parquet'
    """
    return run_dir / PREDICTIONS / f"{split}.parquet"
