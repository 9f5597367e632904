"""Boosted proportional hazards on features per code: the baseline of time-to-event tasks beside Cox regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from ehr_embed.core.settings import Count, ShareAbove0, checked
from ehr_embed.models.cox import baseline_of, times_of
from ehr_embed.models.feature_table import FeatureTable
from ehr_embed.models.gbm import GBM, best_trees, lightgbm_module, n_leaves, rows_of
from ehr_embed.models.hazards import FittedToOutcomes, exposure
from ehr_embed.models.heads import check_classifies
from ehr_embed.models.protocol import FeatureSet

N_ROUNDS = 3
"""Fits of the trees, each under the baseline hazard that the trees before it leave: where risks differ, those with a high one have
the outcome first, so that the rate of all subjects falls with time though no subject's hazard does."""


class Asked(NamedTuple):
    """The samples of a split that are asked for one outcome.

    Attributes:
        table: their features.
        days, is_event: (m,) to the outcome or to censoring.
    """

    table: FeatureTable
    days: npt.NDArray[np.float64]
    is_event: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, split: FeatureSet, k: int, n_outcomes: int) -> Asked:
        """Take the samples of a split that are asked for outcome k."""
        days, is_event = times_of(split, k, n_outcomes)
        rows = np.flatnonzero(~np.isnan(days))
        return cls(split.features.rows(rows), days[rows], is_event[rows])

    @property
    def dense(self) -> npt.NDArray[np.float32]:
        """Return the features as a dense table."""
        return self.table.dense(slice(None))


class BoostedHazards(FittedToOutcomes, GBM):
    """LightGBM trees f(x) on `CodeFeatures`, one sum of trees per outcome, with the hazard baseline_j * exp(f(x)) in time bin j.

    Given the baseline, the likelihood of right-censored times is that of a Poisson count (0 or 1) whose mean is exp(f(x)) times
    the baseline's cumulative hazard until the sample's time (Whitehead 1980, Applied Statistics 29:268-275), so that LightGBM's
    Poisson objective fits it. Trees and baseline are fitted in turn. The likelihood on tuning chooses the number of trees.

    Args:
        embedding_dim: width of the event vectors, which are not read.
        num_classes: number of outputs, set by the task; this model gives hazards instead.
        vocab_size: must be None, because this model predicts no events.
        has_values, max_length, max_codes, times, n_trees, patience, learning_rate, n_leaves, min_leaf_samples, feature_share,
        sample_share, l2: as in `GBM`.

    Raises:
        UserError: the task predicts events, or a number is out of range.
    """

    option, of_classes = "boosted_hazards", "gbm"

    @checked("model")
    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        max_length: int = 4096,
        max_codes: Count = 500,
        times: bool = True,
        n_trees: Count = 1000,
        patience: Count = 50,
        learning_rate: float = 0.02,
        n_leaves: Annotated[int, Field(ge=2)] = 8,
        min_leaf_samples: int = 40,
        feature_share: ShareAbove0 = 0.3,
        sample_share: ShareAbove0 = 0.7,
        l2: float = 5.0,
    ) -> None:
        check_classifies("model=boosted_hazards", num_classes, vocab_size)
        super().__init__(
            embedding_dim=embedding_dim,
            num_classes=1,
            has_values=has_values,
            max_length=max_length,
            max_codes=max_codes,
            times=times,
            n_trees=n_trees,
            patience=patience,
            learning_rate=learning_rate,
            n_leaves=n_leaves,
            min_leaf_samples=min_leaf_samples,
            feature_share=feature_share,
            sample_share=sample_share,
            l2=l2,
        )
        self.boosters: list[Any] = []
        self.baseline = torch.empty(0)

    @property
    def _objective(self) -> tuple[str, str]:
        return "poisson", "poisson"

    def get_extra_state(self) -> Any:
        """Return the trees of each outcome as text, and the log baseline hazard (K, J) float64."""
        return {"trees": [booster.model_to_string() for booster in self.boosters], "baseline": self.baseline}

    def set_extra_state(self, state: Any) -> None:
        """Set trees and baseline to those of another run."""
        self.boosters = [lightgbm_module().Booster(model_str=text) for text in state["trees"]]
        self.baseline = state["baseline"]

    def n_fitted(self) -> int:
        """Return the number of leaves of all trees, and of baseline hazards."""
        return sum(n_leaves(booster) for booster in self.boosters) + self.baseline.numel()

    def fit(
        self,
        train: FeatureSet,
        tuning: FeatureSet,
        *,
        score: Callable[[npt.NDArray[np.float64]], float],
        is_higher_better: bool,
        seed: int,
    ) -> None:
        """Fit trees per outcome to train until the likelihood on tuning has not improved for `patience` trees.

        Raises:
            UserError: the task has no times, since it is no time-to-event task.
        """
        K, edges = self.outcomes_and_edges()
        self.features.remember(train.features)
        self.boosters, baselines = [], []
        for k in range(K):
            own, of_tuning = Asked.of(train, k, K), Asked.of(tuning, k, K)
            risk = np.zeros(len(own.days))
            for _ in range(N_ROUNDS):
                baseline = baseline_of(risk, own.days, own.is_event, edges)
                booster = self._boosted(own, of_tuning, baseline, edges, seed)
                risk = booster.predict(own.dense, raw_score=True, num_threads=torch.get_num_threads())
            self.boosters.append(booster)
            baselines.append(baseline)
        self.baseline = torch.stack(baselines)

    def _boosted(self, train: Asked, tuning: Asked, baseline: Tensor, edges: Tensor, seed: int) -> Any:
        """Return the trees of one outcome, fitted under a log baseline hazard (J,)."""
        lightgbm, too_rare = lightgbm_module(), self._too_rare(train.table)

        def given(split: Asked) -> dict[str, Any]:
            cumulative = exposure(torch.from_numpy(split.days), edges).numpy() @ baseline.exp().numpy()
            return {"label": split.is_event.astype(np.float64), "init_score": np.log(cumulative)}

        data = lightgbm.Dataset(rows_of(train.table, too_rare), **given(train))
        booster = lightgbm.train(
            self.settings_of_trees(FeatureSet(train.table, train.is_event, np.ones(len(train.days))), seed)
            | {"metric": self._objective[1]},
            data,
            num_boost_round=self.n_trees,
            valid_sets=[data.create_valid(rows_of(tuning.table, too_rare), **given(tuning))],
            callbacks=[lightgbm.early_stopping(self.patience, verbose=False)],
        )
        return best_trees(booster)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return log hazards per day, (B, K, J) float32; inputs as in `CodeFeatures`."""
        features = self.features(inputs)
        rows, threads = features.cpu().numpy(), torch.get_num_threads()
        risk = np.stack([own.predict(rows, raw_score=True, num_threads=threads) for own in self.boosters], axis=1)
        return (torch.from_numpy(risk).unsqueeze(-1) + self.baseline).float().to(features.device)
