"""Take the vectors that a finished run makes of records or of their events, for probes, clustering and retrieval."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.core.files import atomic_path
from ehr_embed.data.samples import ragged_arange
from ehr_embed.data.store import STATIC_TIME
from ehr_embed.embedding.aligning import AlignmentSettings
from ehr_embed.inference.predictor import Predictor
from ehr_embed.inference.records import ROW, Dataset
from ehr_embed.models.heads import LogitLinear, Pooling
from ehr_embed.models.protocol import declarations

PER = ("prediction_time", "event", "subject")
POOLINGS = ("auto", "mean", "max", "last")


class _ReachedError(Exception):
    """Stops a forward pass where the head begins, since what the head makes of the vectors is not needed."""


class Representer:
    """Gives the vectors that the head of a run's model reads: per record, or per event where the model keeps one per event.

    Args:
        predictor: the run, opened with `needs_classes=False`.
        per: one of `PER`: one row per prediction time, per event that is visible at one, or per subject at the last one.
        pooling: how the vectors of a record's events become one: `mean`, `max`, `last`, or `auto`, which is the model's own
            pooling, and for a run that predicts events `last` if it is causal, else `mean`.

    Raises:
        UserError: `per` or `pooling` is unknown, or the model has no such vectors, as boosted trees have none.
    """

    def __init__(self, predictor: Predictor, *, per: str = "prediction_time", pooling: str = "auto") -> None:
        for key, value, valid in (("per", per, PER), ("pooling", pooling, POOLINGS)):
            if value not in valid:
                raise unknown_name(key, value, valid)
        self.predictor, self.per, self.pooling = predictor, per, pooling
        self._model = predictor.run.model
        self._head = _head_of(self._model)

    def write(
        self,
        path: Path,
        root: str,
        *,
        labels: str | None = None,
        split: str | None = None,
        lookups: tuple[str, ...] = (),
        alignment: AlignmentSettings | None = None,
    ) -> int:
        """Write the vectors of a MEDS dataset to a parquet file, chunk by chunk, in the order of the dataset's shards.

        The columns are subject_id, prediction_time, the column of a label set's values where there are any, with `per=event` also
        time (null of a static event) and code (null of an unknown event), and vector, a list of fixed size of float32.

        Args:
            path: the file; written whole or not at all.
            root, labels, split, lookups, alignment: as for `Predictor.predict_proba`.

        Returns:
            The number of rows.

        Raises:
            UserError: the dataset cannot be read, or the model keeps no vector per event and `per` is `event`.
        """
        n_rows = 0
        with atomic_path(path) as temporary:
            writer = None
            try:
                for frame in self.frames(root, labels=labels, split=split, lookups=lookups, alignment=alignment):
                    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
                    if writer is None:
                        writer = pq.ParquetWriter(temporary, table.schema)
                    writer.write_table(table)
                    n_rows += len(frame)
            finally:
                if writer is not None:
                    writer.close()
        return n_rows

    def frames(
        self,
        root: str,
        *,
        labels: str | None = None,
        split: str | None = None,
        lookups: tuple[str, ...] = (),
        alignment: AlignmentSettings | None = None,
    ) -> Iterator[pl.DataFrame]:
        """Yield the rows of `write`, one frame per chunk of shards."""
        asked = AlignmentSettings() if alignment is None else alignment
        with self.predictor.aligned(root, labels=labels, split=split, lookups=lookups, alignment=asked) as aligned:
            chunks = self.predictor.records.chunks(
                root, labels=labels, split=split, lookups=lookups, is_per_subject=self.per == "subject", aligned=aligned
            )
            for data, times in chunks:
                keys = times.drop(ROW, strict=False)
                if self.per == "event":
                    keys = keys[np.repeat(np.arange(len(keys)), data.samples.lengths)].with_columns(self._events(data))
                yield keys.with_columns(as_vectors(self._vectors(data)))

    @torch.inference_mode()
    def _vectors(self, data: Dataset) -> npt.NDArray[np.float32]:
        """Return the vectors of the samples (n, D), or of their events one sample after the other (N, D)."""
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(data.samples.lengths)])
        n_rows = int(starts[-1]) if self.per == "event" else len(data.samples)
        found: npt.NDArray[np.float32] | None = None
        for rows, inputs in self.predictor.batches(data):
            if self.per == "event":
                vectors, mask = self._of_events(inputs), inputs["padding_mask"]
                places = ragged_arange(starts[rows], data.samples.lengths[rows])
                values = vectors[mask]
            else:
                places, values = rows, self._of_records(inputs)
            if found is None:
                found = np.empty((n_rows, values.shape[-1]), np.float32)
            found[places] = values.float().cpu().numpy()
        assert found is not None, "a chunk has samples"
        return found

    def _of_records(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return one vector per record, (B, D)."""
        x, mask = self._reach(inputs)
        if x.ndim == 2 or mask is None:
            if self.pooling != "auto":
                raise UserError(
                    f"pooling={self.pooling}: {type(self._model).__name__} makes one vector of a record itself, so there is "
                    "nothing to pool. Type: pooling=auto"
                )
            return x.flatten(1)  # of several members, one after the other
        own = getattr(self._head, "pooling", None)
        if self.pooling == "auto" and isinstance(own, Pooling):
            pooled: Tensor = own(x, mask)
            return pooled
        kind = ("last" if declarations(self._model).is_causal else "mean") if self.pooling == "auto" else self.pooling
        return Pooling(kind, model_dim=x.shape[-1])(x, mask)

    def _of_events(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return one vector per event, (B, T, D).

        Raises:
            UserError: the model reads something else than one vector per event at its head, such as one per code.
        """
        x, mask = self._reach(inputs)
        own = inputs["padding_mask"]
        if mask is own and x.ndim == 3:
            return x
        if getattr(self._model, "cls", None) is not None and x.shape[1] == own.shape[1] + 1:
            return x[:, 1:]
        raise UserError(
            f"per=event: {type(self._model).__name__} keeps no vector per event: its head reads vectors of whole records or of "
            "codes. Type: per=prediction_time, or choose a run of model=encoder, model=decoder or model=gru"
        )

    def _reach(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return what the head would read, and the mask of its elements where they are several: (B, T, D) and (B, T), or (B, D)."""
        reached: list[Any] = []

        def stop(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            reached.extend(arguments)
            raise _ReachedError

        hook = self._head.register_forward_pre_hook(stop)
        try:
            self._model(inputs)
        except _ReachedError:
            pass
        finally:
            hook.remove()
        x, mask = reached[0], reached[1]["padding_mask"] if len(reached) > 1 else None
        return x, mask

    def _events(self, data: Dataset) -> list[pl.Series]:
        """Return time and code of every event of every sample."""
        samples, events = data.samples, data.events
        n_static = samples.static_stop - samples.static_start
        starts = np.stack([samples.static_start, samples.start], axis=1).ravel()
        counts = np.stack([n_static, samples.stop - samples.start], axis=1).ravel()
        index = ragged_arange(starts, counts)
        times = pl.Series("time", events.times[index])
        codes = pl.Series(data.vocabulary.token_codes, dtype=pl.String)
        return [
            times.set(times == STATIC_TIME, None).cast(pl.Datetime("us")),
            codes[events.token_ids[index]].alias("code"),
        ]


def _head_of(model: nn.Module) -> nn.Module:
    """Return the part of a model that turns vectors into predictions: `model.head`, or its only `LogitLinear`.

    Raises:
        UserError: the model has neither.
    """
    head = getattr(model, "head", None)
    if isinstance(head, nn.Module):
        return head
    linear = [module for module in model.modules() if isinstance(module, LogitLinear)]
    if len(linear) == 1:
        return linear[0]
    raise UserError(
        f"{type(model).__name__} makes no vector of a record before it predicts, as trees and sums over codes do not. Choose a run "
        "of another model; in a model of your own, name the last part `head`."
    )


def as_vectors(vectors: npt.NDArray[np.float32]) -> pl.Series:
    """Return vectors (n, D) as a column of lists of fixed size.

    >>> as_vectors(np.zeros((2, 3), np.float32)).dtype
    Array(Float32, shape=(3,))
    """
    return pl.Series("vector", vectors, dtype=pl.Array(pl.Float32, vectors.shape[1]))
