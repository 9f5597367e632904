"""Gradient-boosted trees on summaries of a record per code: the baseline that a transformer has to beat."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.models.code_features import ReadsCodeFeatures
from ehr_embed.models.feature_table import FeatureTable
from ehr_embed.models.heads import check_classifies
from ehr_embed.models.protocol import FeatureSet

STOPS = ("loss", "metric")
BIN_SAMPLES, BIN_SAMPLE_BYTES = 200_000, 1 << 30
"""Samples from which LightGBM takes the bins of a feature, at most, and what they may take in memory, where they lie densely."""


class GBM(ReadsCodeFeatures):
    """LightGBM (Ke et al. 2017) on `CodeFeatures`; reads codes, values and times, not the event vectors.

    The trees are part of the `state_dict`, as LightGBM's own text.

    Args:
        embedding_dim: width of the event vectors, which are not read.
        num_classes: classes C; the task says it.
        vocab_size: refused: trees do not predict events.
        has_values: whether batches carry a number beside each event; the data say it.
        max_length: longest sequence, in events; longer records keep their last events.
        max_codes, times: as in `CodeFeatures`.
        n_trees: at most, for each class; the best number on tuning is kept.
        stop_on: what chooses the number on tuning: `loss` (cross-entropy) or `metric` (the task's monitored one).
        patience: trees without improvement on tuning before fitting stops.
        learning_rate: share of each tree that is added.
        n_leaves: of a tree, at most.
        min_leaf_samples: samples in a leaf, at least.
        feature_share: of the features each tree may use, in (0, 1].
        sample_share: of the samples each tree is fitted to, in (0, 1].
        l2: penalty on the leaves' values.

    Raises:
        UserError: a task that predicts events, or a number out of range.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        max_length: int = 4096,
        max_codes: int = 2000,
        times: bool = True,
        n_trees: int = 1000,
        stop_on: str = "loss",
        patience: int = 50,
        learning_rate: float = 0.02,
        n_leaves: int = 8,
        min_leaf_samples: int = 40,
        feature_share: float = 0.3,
        sample_share: float = 0.7,
        l2: float = 5.0,
    ) -> None:
        super().__init__(has_values=has_values, max_codes=max_codes, times=times)
        self.num_classes = check_classifies("model=gbm", num_classes, vocab_size)
        for name, count, least in (("n_trees", n_trees, 1), ("patience", patience, 1), ("n_leaves", n_leaves, 2)):
            if count < least:
                raise UserError(f"model.{name}={count}: expected {least} or more.")
        for name, share in (("feature_share", feature_share), ("sample_share", sample_share)):
            if not 0 < share <= 1:
                raise UserError(f"model.{name}={share}: expected a share in (0, 1].")
        if stop_on not in STOPS:
            raise unknown_name("model.stop_on", stop_on, STOPS)
        self.n_trees, self.stop_on, self.patience = n_trees, stop_on, patience
        self.parameters_of_trees = {
            "learning_rate": learning_rate,
            "num_leaves": n_leaves,
            "min_data_in_leaf": min_leaf_samples,
            "feature_fraction": feature_share,
            "bagging_fraction": sample_share,
            "bagging_freq": int(sample_share < 1),
            "lambda_l2": l2,
        }
        self.booster: Any = None

    def get_extra_state(self) -> str:
        """The trees, empty before they are fitted."""
        return "" if self.booster is None else self.booster.model_to_string()

    def set_extra_state(self, state: Any) -> None:
        """Take the trees of another run."""
        self.booster = _lightgbm().Booster(model_str=state) if state else None

    def n_fitted(self) -> int:
        """Leaves of all trees."""
        trees = self.booster.dump_model()["tree_info"]
        return sum(int(tree["num_leaves"]) for tree in trees)

    def fit(
        self,
        train: FeatureSet,
        tuning: FeatureSet,
        *,
        score: Callable[[npt.NDArray[np.float64]], float],
        is_higher_better: bool,
        seed: int,
    ) -> None:
        """Fit trees to train until tuning's score or loss has not improved for `patience` of them, and keep the best number."""
        lightgbm, is_binary, by_loss = _lightgbm(), self.num_classes == 2, self.stop_on == "loss"
        parameters = self.settings_of_trees(train, seed)
        parameters["metric"] = ("binary_logloss" if is_binary else "multi_logloss") if by_loss else "None"

        def evaluate(predicted: npt.NDArray[np.float64], _: Any) -> tuple[str, float, bool]:
            p = np.stack([1 - predicted, predicted], axis=1) if is_binary else predicted
            return "score", score(p), is_higher_better

        data = lightgbm.Dataset(_rows(train.features), train.labels, weight=train.weights)
        self.booster = lightgbm.train(
            parameters,
            data,
            num_boost_round=self.n_trees,
            valid_sets=[data.create_valid(_rows(tuning.features), tuning.labels, weight=tuning.weights)],
            feval=None if by_loss else evaluate,
            callbacks=[lightgbm.early_stopping(self.patience, verbose=False)],
        )
        # What a checkpoint gives back, so that both predict alike.
        self.booster = lightgbm.Booster(
            model_str=self.booster.model_to_string(num_iteration=self.booster.best_iteration)
        )

    def cross_fit(self, train: FeatureSet, fold: npt.NDArray[np.int64], *, seed: int) -> npt.NDArray[np.float64]:
        """Return probabilities (n, C) of train's samples by `n_trees` trees that were fitted to the other folds, (n,)."""
        found = np.zeros((len(train.labels), self.num_classes))
        for number in np.unique(fold):
            inside, outside = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
            part = FeatureTable(train.features.cells[outside], train.features.usual)
            labels, weights = train.labels[outside], train.weights[outside]
            data = _lightgbm().Dataset(_rows(part), labels, weight=weights)
            booster = _lightgbm().train(self.settings_of_trees(train, seed), data, num_boost_round=self.n_trees)
            predicted = booster.predict(train.features.dense(inside), num_threads=torch.get_num_threads())
            found[inside] = np.stack([1 - predicted, predicted], axis=1) if self.num_classes == 2 else predicted
        return found

    def settings_of_trees(self, train: FeatureSet, seed: int) -> dict[str, Any]:
        """Return LightGBM's parameters for trees on `train`."""
        is_binary = self.num_classes == 2
        return self.parameters_of_trees | {
            "objective": "binary" if is_binary else "multiclass",
            "num_class": 1 if is_binary else self.num_classes,
            "seed": seed,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": torch.get_num_threads(),
            "verbosity": -1,
            "bin_construct_sample_cnt": max(1, min(BIN_SAMPLES, BIN_SAMPLE_BYTES // (8 * train.features.shape[1]))),
        }

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (B, num_classes) float64 from what `CodeFeatures` reads; their softmax is LightGBM's probability."""
        features = self.features(inputs)
        raw = self.booster.predict(features.cpu().numpy(), raw_score=True, num_threads=torch.get_num_threads())
        logits = torch.from_numpy(raw).to(features.device)
        return torch.stack([torch.zeros_like(logits), logits], dim=1) if self.num_classes == 2 else logits


def _rows(table: FeatureTable) -> Any:
    """Return the table as LightGBM reads it, some dense rows at a time, of which it keeps the bins.

    A sparse matrix would not do: there an absent cell is 0, or with `zero_as_missing` every 0 is missing, and in these features a
    count of 0, a value of 0 and no value are three things.
    """

    class Rows(_lightgbm().Sequence):  # type: ignore[misc]
        batch_size = table.block_rows

        def __len__(self) -> int:
            return len(table)

        def __getitem__(self, rows: int | slice | list[int]) -> npt.NDArray[np.float64]:
            if isinstance(rows, int | np.integer):
                return table.dense([int(rows)])[0].astype(np.float64)
            return table.dense(rows).astype(np.float64)

    return Rows()


def _lightgbm() -> ModuleType:
    """LightGBM, imported when it is used: it brings an OpenMP library of its own.

    Raises:
        UserError: that library is missing.
    """
    try:
        import lightgbm
    except OSError as error:
        raise UserError(
            f"model=gbm needs LightGBM, which could not be loaded: {error}. It needs the OpenMP library. "
            "Type: sudo apt-get install libgomp1"
        ) from error
    return lightgbm
