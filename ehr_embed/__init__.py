"""Text-embedded transformers for electronic-health-record event sequences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ehr_embed.inference.predictor import Predictor

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
