"""The sampler that leaves nothing out."""

from __future__ import annotations

import optuna


class GridSampler(optuna.samplers.RandomSampler):
    """Every point of a finite space once, in the order in which the space lists them.

    Optuna's own grid and brute-force samplers end a study from within `Study.optimize`, which a search over many
    processes never calls; here the sweeper deals out the points (`ehr_embed.search.study.SharedStudy.ask`) and this
    class only says so.
    """
