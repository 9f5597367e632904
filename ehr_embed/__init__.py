"""Text-embedded transformers for electronic-health-record event sequences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ehr_embed.inference.predictor import Predictor

__version__ = "0.1.0"


def load(run_dir: str | Path, *, device: str = "cpu", trusted_packages: Sequence[str] = ()) -> Predictor:
    """A finished run, ready for `predict_proba` on vectors, texts or a MEDS dataset.

    Args:
        run_dir: the run's folder.
        device: cpu, cuda or another of torch's.
        trusted_packages: packages of your own whose code the run needs, as `trusted_packages` of train.py.

    Raises:
        UserError: not a run's folder, or a run that predicts events.
    """
    from ehr_embed.inference.predictor import Predictor  # here, so that the package is imported without torch

    return Predictor(run_dir, device=device, trusted_packages=trusted_packages)
