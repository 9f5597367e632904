"""Text-embedded transformers for electronic-health-record event sequences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from ehr_embed.inference.predictor import Predictor
    from ehr_embed.reports.finished_run import FinishedRun

__version__ = "0.1.0"


def load(run_dir: str | Path, *, device: str = "cpu", trusted_packages: Sequence[str] = ()) -> Predictor:
    """Open a finished run for `predict_proba` on vectors, texts or a MEDS dataset, or a run of task=time_to_event for `ask`.

    Args:
        run_dir: the run's folder.
        device: a torch device such as cpu or cuda.
        trusted_packages: your own packages whose code the run needs, as in `trusted_packages` of train.py.

    Raises:
        UserError: the folder is not a run's, or the run predicts events instead of classes.
    """
    # Imported here, so that importing the package does not load torch.
    from ehr_embed.inference import asker

    return asker.load(run_dir, device=device, trusted_packages=trusted_packages)


def compose(*overrides: str, config_dir: str | Path | None = None) -> DictConfig:
    """Return the configuration of a run, as the command line composes it: `compose("data=meds", "data.root=DIR", "seed=1")`.

    Args:
        overrides: what would be typed after `ehr-embed train`.
        config_dir: a folder of your own options, as `--config-dir` names it.

    Raises:
        UserError: an option or a key is unknown, or a key is given twice.
    """
    from ehr_embed.experiment import notebook

    return notebook.compose(*overrides, config_dir=config_dir)


def train(*overrides: str | DictConfig, config_dir: str | Path | None = None) -> FinishedRun:
    """Train and evaluate, and return the finished run with its metrics, predictions and figures.

    Args:
        overrides: what would be typed after `ehr-embed train`, or what `compose` returned.
        config_dir: as for `compose`.

    Raises:
        UserError: as on the command line.
    """
    from ehr_embed.experiment import notebook

    return notebook.train(*overrides, config_dir=config_dir)
