"""Grid search: the sampler that tries every point of a finite search space."""

from __future__ import annotations

import optuna


class GridSampler(optuna.samplers.RandomSampler):
    """Marker for a search that runs every point of a finite space once, in the order in which the space lists them.

    Optuna's own grid and brute-force samplers end a study from within `Study.optimize`, which a search over many
    processes never calls. Here `ehr_embed.search.study.SharedStudy.ask` hands out the points, and this class only tells
    it to do so.
    """
