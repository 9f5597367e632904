"""A teacher within train: probabilities of models that did not see a sample, as targets beside its label."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path
from ehr_embed.core.transfer import kept_on
from ehr_embed.data.batches import Batch
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.embedding.event_embedding import EventEmbedding
from ehr_embed.models.gbm import GBM
from ehr_embed.models.protocol import FeatureSet
from ehr_embed.tasks.protocol import WeighsSamples
from ehr_embed.tasks.set_up import records_of
from ehr_embed.training.fit_table import feature_set, inputs_of
from ehr_embed.training.set_up import inputs_of_all
from ehr_embed.training.trainer import Trainer

log = logging.getLogger(__name__)
N_FOLDS = 5
OPTIONS: dict[str, Any] = {
    "n_trees": 330,
    "learning_rate": 0.06,
    "n_leaves": 5,
    "min_leaf_samples": 40,
    "feature_share": 0.2,
}
"""Settings of the teacher's trees: `n_trees` is their largest number where train's own folds choose it; other settings are those of
conf/model/gbm.yaml."""


@dataclass(frozen=True)
class Teacher:
    """Targets of train's samples.

    Attributes:
        targets: (n, C) float32, the share (1 - s) of the label and s of the teacher's probability, in sample order.
    """

    targets: Tensor

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with targets (B, C) in place of labels."""
        return replace(batch, labels=kept_on(batch.labels.device, self.targets)[batch.sample])


def teacher_model(
    name: str | None,
    vocabulary: Vocabulary,
    sizes: dict[str, Any],
    *,
    windows_hours: Sequence[float] | None = None,
    n_trees: int | None = None,
) -> GBM | None:
    """Return the unfitted model behind `trainer.teacher`, for events of `vocabulary`; `sizes` are those of a model.

    `n_trees` is `trainer.teacher_trees`. Where the model that it teaches reads windows of hours before the prediction, the teacher
    reads the same windows.
    """
    if name is None:
        return None
    options = OPTIONS if n_trees is None else OPTIONS | {"n_trees": n_trees}
    model = GBM(**sizes, **options, windows_hours=windows_hours)
    model.set_vocabulary(vocabulary)
    return model


def cross_fitted(trainer: Trainer, model: GBM, embedding: EventEmbedding, *, share: float) -> Teacher:
    """Fit `model` to all folds of train's subjects but one, for each of `N_FOLDS` folds, and blend its probabilities of that
    fold with the labels.

    Without `trainer.teacher_trees` the number of trees is chosen by train's folds. Neither tuning nor held_out is read.
    Probabilities are kept in the cache, by what they were made of.

    Raises:
        UserError: a task without one class per sample, or several processes.
    """
    task = trainer.task
    if not isinstance(task, WeighsSamples):
        raise UserError(
            f"trainer.teacher=gbm: a teacher gives probabilities of one class per sample, and {type(task).__name__} "
            "predicts something else. "
            "Type: trainer.teacher=null, or task=classification"
        )
    trainer.processes.refuse_several("trainer.teacher=gbm is fitted")
    embedding.to(trainer.fabric.device)
    model.to(trainer.fabric.device)
    model.choose_features(inputs_of(trainer, embedding, "train"))
    # This ranks the numbers of pooled datasets among their own; without a pool, no record is read here.
    model.adapt_to_records(inputs_of_all(records_of(task), embedding, settings=trainer.settings))
    train = feature_set(trainer, model, embedding, "train")
    fold = folds(task.samples["train"].subject_ids, trainer.seed)
    config: Any = trainer.about["config"]
    cache_dir = config.get("cache_dir")
    n_trees = trainer.settings.teacher_trees
    key = _key(train, fold, trainer.seed, n_trees)
    path = None if cache_dir is None else Path(cache_dir) / "teachers" / f"{key}.npy"
    if path is not None and path.is_file():
        log.info("trainer.teacher: probabilities of an earlier run, %s", path)
        probabilities = np.load(path, allow_pickle=False)
    else:
        probabilities = model.cross_fit(train, fold, seed=trainer.seed, chooses_trees=n_trees is None)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                np.save(file, probabilities)
    n_classes = probabilities.shape[1]
    labels = F.one_hot(torch.from_numpy(np.asarray(train.labels)), n_classes)
    return Teacher(((1 - share) * labels + share * torch.from_numpy(probabilities)).float())


def folds(subject_ids: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """Return the fold of each sample, (n,); a subject's samples share one.

    >>> found = folds(np.array([7, 8, 7, 9]), 0)
    >>> bool(found[0] == found[2]), len(found)
    (True, 4)
    """
    subjects, of_sample = np.unique(subject_ids, return_inverse=True)
    fold: npt.NDArray[np.int64] = np.random.default_rng(seed).permutation(len(subjects)) % N_FOLDS
    return fold[of_sample]


def _key(train: FeatureSet, fold: npt.NDArray[np.int64], seed: int, n_trees: int | None) -> str:
    """Return a digest of all that the probabilities depend on."""
    cells = train.features.cells
    options = OPTIONS | ({"chosen": "by unseen samples"} if n_trees is None else {"n_trees": n_trees})
    digest = hashlib.sha256(json.dumps([options, N_FOLDS, seed, list(train.features.shape)]).encode())
    for array in (cells.data, cells.indices, cells.indptr, train.features.usual, train.labels, train.weights, fold):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:24]
