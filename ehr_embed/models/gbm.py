"""Gradient-boosted trees on features per code: the baseline that a transformer has to beat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import Count, OneOf, ShareAbove0, checked
from ehr_embed.models.code_features import ReadsCodeFeatures
from ehr_embed.models.feature_table import FeatureTable
from ehr_embed.models.heads import check_classifies
from ehr_embed.models.protocol import FeatureSet

log = logging.getLogger(__name__)
STOPS = ("loss", "metric")
BIN_SAMPLES, BIN_SAMPLE_BYTES = 200_000, 1 << 30
"""Most samples, and most bytes of their dense features, from which LightGBM chooses the bins of the features."""


class GBM(ReadsCodeFeatures):
    """LightGBM (Ke et al. 2017) on `CodeFeatures`; it reads codes, values and times, not the event vectors.

    The trees are part of the `state_dict`, in LightGBM's text format.

    Args:
        embedding_dim: width of the event vectors, which are not read.
        num_classes: number C of classes, set by the task; 1 = the task predicts a number.
        vocab_size: must be None, because this model predicts classes only.
        has_values: whether batches carry a numeric value with each event, set by the data.
        max_length: longest sequence, in events; a longer record keeps its static events and its last timed ones.
        max_codes, times, windows_hours: as in `CodeFeatures`.
        n_trees: largest number of trees per class; the number that is best on tuning is kept.
        stop_on: measure on tuning that chooses the number of trees: `loss` (cross-entropy) or `metric`
            (`task.monitor`).
        patience: number of trees without improvement on tuning after which fitting stops.
        learning_rate: factor by which each tree's values are multiplied when it is added.
        n_leaves: largest number of leaves per tree.
        min_leaf_samples: least number of samples per leaf.
        feature_share: share of the features that each tree may use, in (0, 1].
        sample_share: share of the samples that each tree is fitted to, in (0, 1].
        l2: penalty on the squared values of the leaves.

    Raises:
        UserError: the task predicts events, or a number is out of range.
    """

    @checked("model")
    def __init__(
        self,
        *,
        embedding_dim: int,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        has_values: bool = False,
        max_length: int = 4096,
        max_codes: Count = 2000,
        times: bool = True,
        windows_hours: Sequence[float] | None = None,
        n_trees: Count = 1000,
        stop_on: Annotated[str, OneOf(*STOPS)] = "loss",
        patience: Count = 50,
        learning_rate: float = 0.02,
        n_leaves: Annotated[int, Field(ge=2)] = 8,
        min_leaf_samples: int = 40,
        feature_share: ShareAbove0 = 0.3,
        sample_share: ShareAbove0 = 0.7,
        l2: float = 5.0,
    ) -> None:
        super().__init__(
            has_values=has_values,
            max_codes=max_codes,
            times=times,
            windows_hours=windows_hours,
            # Fewer records have the code than a leaf needs, so that no tree can split by it.
            min_records=min_leaf_samples,
        )
        self.num_classes = check_classifies("model=gbm", num_classes, vocab_size)
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
        """Return the trees as text; empty before they are fitted."""
        return "" if self.booster is None else self.booster.model_to_string()

    def set_extra_state(self, state: Any) -> None:
        """Set the trees to those of another run."""
        self.booster = lightgbm_module().Booster(model_str=state) if state else None

    def n_fitted(self) -> int:
        """Return the number of leaves of all trees."""
        return n_leaves(self.booster)

    def fit(
        self,
        train: FeatureSet,
        tuning: FeatureSet,
        *,
        score: Callable[[npt.NDArray[np.float64]], float],
        is_higher_better: bool,
        seed: int,
    ) -> None:
        """Fit trees to train until tuning has not improved for `patience` trees, and keep the best number of trees."""
        lightgbm, is_binary, by_loss = lightgbm_module(), self.num_classes == 2, self.stop_on == "loss"
        parameters = self.settings_of_trees(train, seed)
        parameters["metric"] = self._objective[1] if by_loss else "None"

        def evaluate(predicted: npt.NDArray[np.float64], _: Any) -> tuple[str, float, bool]:
            p = np.stack([1 - predicted, predicted], axis=1) if is_binary else predicted.reshape(len(predicted), -1)
            return "score", score(p), is_higher_better

        self.features.remember(train.features)
        too_rare = self._too_rare(train.features)
        data = lightgbm.Dataset(rows_of(train.features, too_rare), train.labels, weight=train.weights)
        booster = lightgbm.train(
            parameters,
            data,
            num_boost_round=self.n_trees,
            valid_sets=[data.create_valid(rows_of(tuning.features, too_rare), tuning.labels, weight=tuning.weights)],
            feval=None if by_loss else evaluate,
            callbacks=[lightgbm.early_stopping(self.patience, verbose=False)],
        )
        self.booster = best_trees(booster)

    def cross_fit(
        self, train: FeatureSet, fold: npt.NDArray[np.int64], *, seed: int, chooses_trees: bool = True
    ) -> npt.NDArray[np.float64]:
        """Return probabilities (n, C) of train's samples by trees that were fitted to the other folds.

        Args:
            train: the samples.
            fold: of each sample, (n,).
            seed: of the trees.
            chooses_trees: whether all folds have the number of trees, at most `n_trees`, with which the samples have the least loss
                by the trees that did not see them; otherwise `n_trees`. Few samples need few trees, and trees beyond that number
                give probabilities that are too sure.
        """
        boosters, losses = [], np.zeros(self.n_trees)
        measure = self._objective[1]
        for number in np.unique(fold):
            inside, outside = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
            part = train.features.rows(outside)
            too_rare = self._too_rare(part)
            data = lightgbm_module().Dataset(
                rows_of(part, too_rare), train.labels[outside], weight=train.weights[outside]
            )
            settings, judged, told = self.settings_of_trees(train, seed), {}, dict[str, dict[str, list[float]]]()
            if chooses_trees:
                unseen = rows_of(train.features.rows(inside), too_rare)
                settings |= {"metric": measure}
                judged = {
                    "valid_sets": [data.create_valid(unseen, train.labels[inside], weight=train.weights[inside])],
                    "callbacks": [lightgbm_module().record_evaluation(told)],
                }
            booster = lightgbm_module().train(settings, data, num_boost_round=self.n_trees, **judged)
            if chooses_trees:
                losses += np.asarray(told["valid_0"][measure]) * train.weights[inside].sum()
            boosters.append((inside, booster))
        n_trees = int(losses.argmin()) + 1 if chooses_trees else self.n_trees
        log.info("cross-fitted trees: %d of at most %d", n_trees, self.n_trees)
        found = np.zeros((len(train.labels), self.num_classes))
        for inside, booster in boosters:
            predicted = booster.predict(
                train.features.dense(inside), num_iteration=n_trees, num_threads=torch.get_num_threads()
            )
            found[inside] = np.stack([1 - predicted, predicted], axis=1) if self.num_classes == 2 else predicted
        return found

    @property
    def _objective(self) -> tuple[str, str]:
        """Return LightGBM's names of the objective and of its measure."""
        if self.num_classes == 1:
            return "regression", "l2"
        return ("binary", "binary_logloss") if self.num_classes == 2 else ("multiclass", "multi_logloss")

    def _too_rare(self, table: FeatureTable) -> npt.NDArray[np.bool_]:
        """Return which features (F,) no leaf can be split by."""
        return table.n_unusual < self.parameters_of_trees["min_data_in_leaf"]

    def settings_of_trees(self, train: FeatureSet, seed: int) -> dict[str, Any]:
        """Return LightGBM's parameters for trees on `train`."""
        return self.parameters_of_trees | {
            "objective": self._objective[0],
            "num_class": 1 if self.num_classes == 2 else self.num_classes,
            "seed": seed,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": torch.get_num_threads(),
            "verbosity": -1,
            "bin_construct_sample_cnt": max(1, min(BIN_SAMPLES, BIN_SAMPLE_BYTES // (8 * train.features.shape[1]))),
        }

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits (B, num_classes) float64 with LightGBM's probability as softmax, or its number (B, 1), from `CodeFeatures`
        inputs."""
        features = self.features(inputs)
        raw = self.booster.predict(features.cpu().numpy(), raw_score=True, num_threads=torch.get_num_threads())
        logits = torch.from_numpy(raw).to(features.device)
        return (
            torch.stack([torch.zeros_like(logits), logits], dim=1)
            if self.num_classes == 2
            else logits.view(len(raw), -1)
        )


def rows_of(table: FeatureTable, too_rare: npt.NDArray[np.bool_]) -> Any:
    """Return the table as a LightGBM sequence, which gives a few dense rows at a time; LightGBM keeps only their bins.

    Features that no leaf can be split by (`too_rare`, (F,)) are made constant, so that LightGBM leaves them out when it draws
    features for a tree. From a dense matrix it does so by itself (`feature_pre_filter`), from a sequence of rows it does not.

    A sparse matrix would not do. In these features a count of 0, a value of 0 and a missing value differ, and in a
    sparse matrix an absent cell is always 0, or with `zero_as_missing` every 0 is missing.
    """

    class Rows(lightgbm_module().Sequence):  # type: ignore[misc]
        batch_size = table.block_rows

        def __len__(self) -> int:
            return len(table)

        def __getitem__(self, rows: int | slice | list[int]) -> npt.NDArray[np.float64]:
            if isinstance(rows, int | np.integer):
                return self[[int(rows)]][0]
            found = table.dense(rows).astype(np.float64)
            found[:, too_rare] = 0.0
            return found

    return Rows()


def n_leaves(booster: Any) -> int:
    """Return the number of leaves of all trees."""
    return sum(int(tree["num_leaves"]) for tree in booster.dump_model()["tree_info"])


def best_trees(booster: Any) -> Any:
    """Return the trees up to the best number. They are read back from their text, so that a model which was just fitted predicts
    exactly as one that is loaded from a checkpoint."""
    return lightgbm_module().Booster(model_str=booster.model_to_string(num_iteration=booster.best_iteration))


def lightgbm_module() -> ModuleType:
    """Import LightGBM when it is first used, because it loads an OpenMP library of its own.

    Raises:
        UserError: the OpenMP library is missing.
    """
    try:
        import lightgbm
    except OSError as error:
        raise UserError(
            f"model=gbm needs LightGBM, which could not be loaded: {error}. It needs the OpenMP library. "
            "Type: sudo apt-get install libgomp1"
        ) from error
    return lightgbm
