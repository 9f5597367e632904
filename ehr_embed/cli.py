"""What the entry points share: users' mistakes end in one message and exit code 2, not in a traceback."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ehr_embed.errors import UserError
from ehr_embed.experiment import run_directory


def reports_errors(main: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Print a `UserError` without traceback and exit with 2; remove the run directory if it is still empty."""

    @functools.wraps(main)
    def wrapper(cfg: DictConfig) -> Any:
        try:
            return main(cfg)
        except (UserError, OmegaConfBaseException) as error:
            if "run_dir" in cfg:
                _remove_empty(run_directory(cfg))
            print(f"error: {error}", file=sys.stderr)
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            sys.exit(2)

    return wrapper


def _remove_empty(folder: Path) -> None:
    """Remove `folder` and its parents as far as they are empty."""
    for path in (folder, *folder.parents[:2]):
        try:
            path.rmdir()
        except OSError:
            return
