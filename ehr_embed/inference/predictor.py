"""Predict class probabilities with a finished run, for event vectors, event texts or a MEDS dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from ehr_embed.calibration.calibrator import Calibrator
from ehr_embed.config.instantiate import check_stored, instantiate
from ehr_embed.core.errors import UserError
from ehr_embed.core.rereadable import Rereadable
from ehr_embed.data.batches import BatchDataset
from ehr_embed.data.bucket_sampler import BucketSampler
from ehr_embed.data.vocabulary import Vocabulary
from ehr_embed.embedding.aligning import AlignmentSettings
from ehr_embed.inference.aligned_data import AlignedData
from ehr_embed.inference.records import ROW, Dataset, RecordReader, Vectors
from ehr_embed.inference.trained_run import (
    TrainedRun,
    open_run,
    stored_calibrator,
)
from ehr_embed.models.ensemble import Ensemble
from ehr_embed.models.hazards import hazard_sizes
from ehr_embed.models.label_outputs import NUMBER, label_outputs_of
from ehr_embed.models.protocol import AlignsCodes, ReadsVocabulary, align_codes
from ehr_embed.tasks.next_event import NextEvent
from ehr_embed.tasks.protocol import WeighsSamples, logits_of
from ehr_embed.training.precision import autocast_of_run


class Predicted(NamedTuple):
    """Predictions for the samples of a `Dataset`.

    Attributes:
        probabilities: (n, C) float64.
        members: (M, n, C), the same of each member of an ensemble with a weight above 0; None where they were not asked for, or
            the run is no ensemble.
    """

    probabilities: npt.NDArray[np.float64]
    members: npt.NDArray[np.float64] | None


class Predictor:
    """A finished run that is ready to predict; `ehr_embed.load` returns one.

    Args:
        run_dir: the run's folder.
        device: torch device on which the model runs.
        trusted_packages: further packages from which the run's `_target_`s may come.
        needs_classes: whether a run that predicts events, and so has no probabilities, is refused.
        run: the run, if it is open already.

    Attributes:
        class_names: names of the probability columns.
        run: model, token vectors, vocabulary and configuration of the run.
        records: reads what a caller gives as records of the run's events.
        calibrator: the calibration that the run fitted on tuning, which every probability goes through; None = it has none.

    Raises:
        UserError: the folder is not a run's, or the run predicts events instead of classes.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        device: str = "cpu",
        trusted_packages: Sequence[str] = (),
        needs_classes: bool = True,
        run: TrainedRun | None = None,
    ) -> None:
        self._trusted = tuple(trusted_packages)
        self.run = open_run(run_dir, trusted=self._trusted) if run is None else run
        self.device = torch.device(device)
        self.class_names = self.run.class_names
        self._task = instantiate(check_stored(self.run.config, "task", self._trusted), trusted=self._trusted)
        if needs_classes:
            self._check(run_dir)
        self.run.model.to(self.device)
        self.calibrator: Calibrator | None = None
        if self.class_names:
            self.calibrator = stored_calibrator(
                Path(run_dir).expanduser(),
                self.class_names,
                is_exclusive=self.has_exclusive_classes,
                trusted=self._trusted,
            )
        self.records = RecordReader(self.run, run_dir, trusted_packages=self._trusted)
        self._present: Vocabulary = self.run.vocabulary  # whose token ids the model reads now

    def _check(self, run_dir: str | Path) -> None:
        """Refuse a run that this class cannot use."""
        if not self.class_names and hazard_sizes(self.run.model) is not None:
            raise UserError(
                f"{run_dir} predicts times, so it has no classes. Type: python -m ehr_embed.ask run={run_dir} data.root=DIR "
                "'questions=[WORDS]' output=DIR"
            )
        if not self.class_names and not isinstance(self._task, NextEvent):
            name = str(self.run.config["task"]["_target_"]).rpartition(".")[2]
            raise UserError(
                f"{run_dir}: its task {name} has no class_names, and predictions are made of classes or of the numbers of "
                "task=regression. Its predictions of tuning and held_out are in the run's folder predictions/. To predict "
                f"elsewhere, let {name} name its outputs in class_names and have a static method probabilities (docs/extending.md)"
            )
        if not self.class_names:
            raise UserError(
                f"{run_dir} predicts events, so it has no classes. Type: python -m ehr_embed.generate run={run_dir}, or "
                f"fine-tune it: python train.py task=classification init_from={run_dir}"
            )

    @property
    def has_exclusive_classes(self) -> bool:
        """Return whether each sample belongs to exactly one class, in contrast to several independent labels."""
        return isinstance(self._task, WeighsSamples)

    @property
    def predicts_number(self) -> bool:
        """Return whether the run predicts one number per sample, in contrast to probabilities."""
        outputs = label_outputs_of(self.run.model)
        return outputs is not None and [group.kind for group in outputs.groups] == [NUMBER]

    @property
    def columns(self) -> list[str]:
        """Return the columns of a table of predictions: probability_<class>, or predicted_<label set> of a number."""
        outputs = label_outputs_of(self.run.model)
        if outputs is None:
            return [f"probability_{name}" for name in self.class_names]
        return [name for group in outputs.groups for name in group.columns]

    def _decode(self, logits: Tensor) -> Tensor:
        outputs = label_outputs_of(self.run.model)
        return self._task.probabilities(logits) if outputs is None else outputs.decode(logits)

    @overload
    def predict_proba(
        self,
        records: str | Path,
        *,
        labels: str | None = ...,
        split: str | None = ...,
        lookups: Sequence[str] = ...,
        alignment: AlignmentSettings | None = ...,
    ) -> pl.DataFrame: ...

    @overload
    def predict_proba(self, records: Vectors | Sequence[Any]) -> npt.NDArray[np.float64]: ...

    def predict_proba(
        self,
        records: str | Path | Vectors | Sequence[Any],
        *,
        labels: str | None = None,
        split: str | None = "held_out",
        lookups: Sequence[str] = (),
        alignment: AlignmentSettings | None = None,
    ) -> npt.NDArray[np.float64] | pl.DataFrame:
        """Return the class probabilities of records, calibrated if the run has a calibration, or the numbers of a run that predicts
        numbers. They are computed in the run's own precision if the device supports it well.

        Vectors and texts carry neither times nor numeric values: they are treated as events one day apart without values. Give
        a MEDS dataset if these matter. The model reads the last `model.max_length` events of a longer record.

        Args:
            records: one of
                vectors of the events of one record (N, E) or of several, (n, N, E) or a list of (N, E);
                texts of the events of one record (a list) or of several (a list of lists). A text of the vocabulary gets its
                token's vector, and the run's embedder embeds any other text;
                the root of a MEDS dataset, as str or Path. Codes that the run never saw are embedded by their texts in the
                dataset's metadata, without numeric values; a run that reads no texts treats them as the unknown event.
            labels: for a MEDS dataset: name or path of a label set, at whose prediction times to predict; a parquet file of
                subject_id and prediction_time is enough. None = at each subject's last event.
            split: for a MEDS dataset: split of the subjects; None = all subjects, and the dataset needs no splits.
            lookups: for a MEDS dataset: CSV files with columns code,term; their texts of new codes take precedence over those of
                the dataset's metadata and of the lookups that the run was trained with.
            alignment: for a MEDS dataset: whether and how codes that the run never saw are read as its own; None = where most
                events have such codes.

        Returns:
            (n, C) float64 in the order of the records, with the columns `class_names`; for a MEDS dataset a Polars frame with one
            row per prediction: subject_id, prediction_time and `columns`: probability_<class> for each class, or
            predicted_<label set> for a number.

        Raises:
            UserError: there is no record, or a record is empty; vectors have another width than the run's, or the model reads
                codes or texts instead of vectors; a text cannot be embedded; or the dataset cannot be read.
        """
        if isinstance(records, str | Path):
            return self._predict_dataset(str(records), labels, split, lookups, alignment or AlignmentSettings())
        return self.predict_samples(self.records.of_values(records)).probabilities

    def read(self, root: str, *, labels: str | None, split: str | None, lookups: Sequence[str]) -> Dataset:
        """Read a whole MEDS dataset with the run's vocabulary, codes that the run never saw by their own texts; `opened` reads them
        as the run's. The arguments are those of `predict_proba`."""
        return self.records.read(root, labels=labels, split=split, lookups=lookups)

    @contextmanager
    def opened(
        self, root: str, *, labels: str | None, split: str | None, lookups: Sequence[str], alignment: AlignmentSettings
    ) -> Iterator[Dataset]:
        """Yield a whole MEDS dataset as the model reads it while inside; the arguments are those of `predict_proba`."""
        with self.aligned(root, labels=labels, split=split, lookups=lookups, alignment=alignment) as aligned:
            yield self.records.read(root, labels=labels, split=split, lookups=lookups, aligned=aligned)

    def _predict_dataset(
        self, root: str, labels: str | None, split: str | None, lookups: Sequence[str], alignment: AlignmentSettings
    ) -> pl.DataFrame:
        """Predict for a MEDS dataset in chunks of shards, so that at most `CHUNK_EVENTS` events and a shard are in memory."""
        frames = []
        with self.aligned(root, labels=labels, split=split, lookups=lookups, alignment=alignment) as aligned:
            for data, times in self.records.chunks(root, labels=labels, split=split, lookups=lookups, aligned=aligned):
                found = self.predict_samples(data).probabilities
                columns = {name: found[:, i] for i, name in enumerate(self.columns)}
                keys = times.select("subject_id", "prediction_time", *([] if labels is None else [ROW]))
                frames.append(keys.with_columns(**{name: pl.Series(x) for name, x in columns.items()}))
        result = pl.concat(frames)
        return result if labels is None else result.sort(ROW).drop(ROW)

    @torch.inference_mode()
    def predict_samples(self, data: Dataset, *, with_members: bool = False) -> Predicted:
        """Return the calibrated probabilities of the samples of a dataset.

        Args:
            data: the dataset, whose token ids refer to its vocabulary.
            with_members: whether those of an ensemble's members are wanted too.
        """
        model, shape = self.run.model, (len(data.samples), len(self.class_names))
        ensemble = model if with_members and isinstance(model, Ensemble) else None
        # All batches' results are read at the end: after each, the host would wait for a GPU before it makes the next batch.
        own_rows, decoded, of_each = list[npt.NDArray[np.int64]](), list[Tensor](), list[Tensor]()
        for rows, inputs in self.batches(data):
            if ensemble is None:
                logits = logits_of(model, inputs)
            else:
                log_p = ensemble.of_members(inputs)
                logits = ensemble.pooled(log_p)
                of_each.append(torch.stack([self._decode(own) for own in log_p]))
            own_rows.append(rows)
            decoded.append(self._decode(logits))
        result = np.empty(shape)
        of_members = None if ensemble is None else np.empty((len(ensemble.members), *shape))
        if decoded:
            at = np.concatenate(own_rows)
            result[at] = torch.cat(decoded).cpu().numpy()
            if of_members is not None:
                of_members[:, at] = torch.cat(of_each, dim=1).cpu().numpy()
        if ensemble is not None and of_members is not None:
            of_members = of_members[(ensemble.weights > 0).cpu().numpy()]
        if self.calibrator is None:
            return Predicted(result, of_members)
        calibrated = None if of_members is None else np.stack([self.calibrator(own) for own in of_members])
        return Predicted(self.calibrator(result), calibrated)

    def batches(self, data: Dataset) -> Iterator[tuple[npt.NDArray[np.int64], dict[str, Tensor]]]:
        """Yield batches of samples: their rows (B,), and the model's inputs on the predictor's device.

        Between two batches the run's own precision is in force, and a model that reads codes or texts has the data's vocabulary.
        """
        embedding = data.embedding.to(self.device)
        dataset, trainer = BatchDataset(data.events, data.samples), self.run.config["trainer"]
        batches = BucketSampler(
            dataset.lengths, batch_size=trainer["batch_size"], batch_tokens=trainer["batch_tokens"], shuffle=False
        )
        precision = autocast_of_run(trainer["precision"], self.run.precision, self.device)
        with self.reading(data.vocabulary), precision:
            for rows in batches:
                yield np.asarray(rows), embedding.inputs(dataset[rows].to(self.device))

    @contextmanager
    def aligned(
        self, root: str, *, labels: str | None, split: str | None, lookups: Sequence[str], alignment: AlignmentSettings
    ) -> Iterator[AlignedData | None]:
        """Yield how the codes of a MEDS dataset are read as the run's, and let the model read them so while inside; None where they
        are read as they are. The arguments are those of `predict_proba`; a run that predicts the next events reads codes as they
        are."""
        data = None
        if self.class_names or hazard_sizes(self.run.model) is not None:
            data = self.records.aligned(root, split=split, lookups=lookups, alignment=alignment)
        with self._aligned(data, root, labels=labels, split=split, lookups=lookups):
            yield data

    @contextmanager
    def _aligned(
        self, data: AlignedData | None, root: str, *, labels: str | None, split: str | None, lookups: Sequence[str]
    ) -> Iterator[None]:
        """Let a model that reads codes read those of an aligned dataset while inside, with ranks of its records' own numbers.

        Args:
            data: the dataset; None = nothing is aligned.
            root, labels, split, lookups: as in `predict_proba`.
        """
        model = self.run.model
        if data is None or not isinstance(model, ReadsVocabulary):
            yield
            return
        # A pooled run's own quantiles, which no vocabulary brings back.
        state = model.state_dict() if self.run.is_pooled else None
        model.set_vocabulary(data.vocabulary)
        self._present = data.vocabulary
        try:
            if isinstance(model, AlignsCodes):
                align_codes(model, data.alignment.matches, data.alignment.twins)

                def read() -> Iterator[dict[str, Tensor]]:
                    for chunk, _ in self.records.chunks(
                        root, labels=labels, split=split, lookups=lookups, aligned=data
                    ):
                        for _, inputs in self.batches(chunk):
                            yield inputs

                with torch.inference_mode():
                    model.adapt_to_records(Rereadable(read))
            yield
        finally:
            self._present = self.run.vocabulary
            model.set_vocabulary(self.run.vocabulary)
            if isinstance(model, AlignsCodes):
                align_codes(model, self.run.matches, self.run.twins)
            if state is not None:
                model.load_state_dict(state)
                model.set_vocabulary(self.run.vocabulary)

    @contextmanager
    def reading(self, vocabulary: Vocabulary) -> Iterator[None]:
        """Give a model that reads codes or texts the vocabulary of the token ids, and restore the run's own one at the end."""
        model = self.run.model
        if not isinstance(model, ReadsVocabulary) or vocabulary is self._present:
            yield
            return
        model.set_vocabulary(vocabulary)
        try:
            yield
        finally:
            model.set_vocabulary(self.run.vocabulary)
