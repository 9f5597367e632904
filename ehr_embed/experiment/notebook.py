"""Compose and train in Python, as in a notebook; `ehr_embed.compose` and `ehr_embed.train` are these functions."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from hydra import compose as compose_with_hydra
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ehr_embed.core.errors import UserError
from ehr_embed.experiment.cli import CONF, explain, refuse_repeated
from ehr_embed.reports.finished_run import FinishedRun


def compose(*overrides: str, config_dir: str | Path | None = None) -> DictConfig:
    """Return the configuration of a run; see `ehr_embed.compose`."""
    refuse_repeated(list(overrides))
    own = [] if config_dir is None else [f"hydra.searchpath=['file://{Path(config_dir).expanduser().resolve()}']"]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose_with_hydra("train", overrides=[*overrides, *own])
            cfg.run_dir = str(cfg.run_dir)  # now, since `${now:}` would mean another time whenever it is read
            return cfg
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, "train", list(overrides))) from error


def train(*overrides: str | DictConfig, config_dir: str | Path | None = None) -> FinishedRun:
    """Train and evaluate; see `ehr_embed.train`.

    Raises:
        UserError: configurations and overrides are mixed, or as on the command line.
    """
    given = [item for item in overrides if isinstance(item, DictConfig)]
    if given and (len(overrides) > 1 or config_dir is not None):
        raise UserError(
            "train takes either one configuration or overrides, and no config_dir beside a configuration: these belong to "
            'compose. Type: train(compose("seed=1", ...))'
        )
    cfg = given[0] if given else compose(*(str(item) for item in overrides), config_dir=config_dir)
    if (
        not logging.getLogger().handlers
    ):  # as Hydra does for the command line; a notebook's own logging is left as it is
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    from ehr_embed.experiment.run import run  # here, so that a misspelt override is refused before torch is loaded

    run(cfg)
    return FinishedRun(cfg.run_dir)
