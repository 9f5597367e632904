"""Build batches of samples of similar length from the events of a split, by vectorised gathers.

Suffixes of tensor names give their axes: B rows, T positions of a row, N events, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ehr_embed.core.transfer import sent
from ehr_embed.data.boundary import check_boundary
from ehr_embed.data.device_events import EventTensors, event_tensors, is_gathered_there
from ehr_embed.data.prefetch import PrefetchedLoader
from ehr_embed.data.samples import Samples, ragged_arange
from ehr_embed.data.store import MICROSECONDS_PER_DAY, STATIC_TIME, SplitEvents

HOST = torch.device("cpu")
LENGTH_MULTIPLE = 8
"""Batches are padded to a multiple of this length, which gives few distinct shapes and fills vector registers."""


@dataclass(frozen=True)
class Batch:
    """B rows of up to T events; a row is one sample or, in a packed batch, several sequences one after the other.

    Attributes:
        token_ids: (B, T) int32, 0 = padding.
        days: (B, T) float32, days from the event to the prediction time; a static event has the value of the first
            timed event.
        gap_days, elapsed_days: (B, T) float32, days since the previous and since the first event of the sequence.
        age_days: (B, T) float32, days since birth; NaN where the record does not say when the subject was born.
        values: (B, T) float32, normalised numeric values, NaN = no value; None when the vocabulary carries no values.
        is_event: (B, T) bool, False = padding.
        is_static: (B, T) bool, True for an event without a time; static events precede the timed ones.
        is_next: (B, T) bool, True for a timed event whose predecessor in the record directly precedes it in the
            sequence.
        segments: (B, T) int32, number of the event's sequence, from 1, 0 = padding; None where a row is one sample.
        event_index: (B, T) int64, number of the event within its sequence; None where a row is one sample.
        places: (N,) int64, index b * T + t of every event that is not padding, ascending.
        sequence_starts: (S + 1,) int32, how many of the N events precede each of the S sequences; the last entry is N.
        labels: (B,) int64 or float64, or (B, L) float32.
        sample: (B,) int64, position in the split's samples; in a packed batch, the number of the row.
        n_events: N, kept on the host so that no code has to wait for the device.
        n_pairs: number of pairs of events of the same sequence, those of an event with itself included.
    """

    token_ids: Tensor
    days: Tensor
    gap_days: Tensor
    elapsed_days: Tensor
    age_days: Tensor
    values: Tensor | None
    is_event: Tensor
    is_static: Tensor
    is_next: Tensor
    segments: Tensor | None
    event_index: Tensor | None
    places: Tensor
    sequence_starts: Tensor
    labels: Tensor
    sample: Tensor
    n_events: int
    n_pairs: int

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`; the copy does not block if the batch is in page-locked memory."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; the DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {name: function(x) if isinstance(x, Tensor) else x for name, x in values.items()}
        return Batch(**mapped)


class EventDataset(Protocol):
    """Protocol of the datasets from which the trainer takes batches."""

    events: SplitEvents

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of events of each row, (n,)."""
        ...

    def on(self, device: torch.device) -> EventDataset:
        """Return the same dataset, with its events held and its batches gathered on `device`."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: npt.NDArray[np.int64]) -> Batch:
        """Return the batch of the rows at `index`, (B,)."""
        ...


class _OnDevice(Dataset[Batch]):
    """Mixin: build batches on the device that holds the events.

    Attributes:
        device: the device that holds the events; the CPU unless `on` chose another one.
    """

    device = HOST
    events: SplitEvents

    def on(self, device: torch.device) -> Self:
        """Return the same dataset, with its events held and its batches gathered on `device`."""
        event_tensors(self.events, device)
        held = copy(self)
        held.device = device
        return held


class BatchDataset(_OnDevice):
    """Dataset whose rows are samples: `dataset[indices]` gathers a `Batch` at once, without a loop over samples."""

    def __init__(self, events: SplitEvents, samples: Samples) -> None:
        check_boundary(events, samples)
        self.events = events
        self.samples = self.checked_samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of events of each row, (n,)."""
        return self.samples.lengths

    def __getitem__(self, index: npt.NDArray[np.int64]) -> Batch:
        chosen = self.samples.take(index)
        events = event_tensors(self.events, self.device)
        return gather(events, chosen, chosen.lengths, labels=chosen.labels, sample=index, is_packed=False)


class PackedDataset(_OnDevice):
    """Dataset whose rows hold several sequences one after the other, so that hardly any position is padding.

    Args:
        events: the split's events.
        samples: the n sequences, row after row.
        row: (n,) int64, ascending, the row of each sequence.
    """

    def __init__(self, events: SplitEvents, samples: Samples, row: npt.NDArray[np.int64]) -> None:
        check_boundary(events, samples)
        self.events, self.samples, self.checked_samples = events, samples, samples
        n_rows = int(row[-1]) + 1
        self.first = np.searchsorted(row, np.arange(n_rows + 1))
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(samples.lengths)])
        self.lengths = np.diff(ends[self.first])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: npt.NDArray[np.int64]) -> Batch:
        counts = np.diff(self.first)[index]
        chosen = self.samples.take(ragged_arange(self.first[index], counts))
        events, labels = event_tensors(self.events, self.device), np.zeros(len(index), np.int64)
        return gather(events, chosen, self.lengths[index], labels=labels, sample=index, is_packed=True)


def gather(
    events: EventTensors,
    sequences: Samples,
    row_lengths: npt.NDArray[np.int64],
    *,
    labels: npt.NDArray[Any],
    sample: npt.NDArray[np.int64],
    is_packed: bool,
) -> Batch:
    """Gather a batch on the device that holds the events.

    Only arrays with one number per sequence or per row are copied to the device. Tensors of shape (B, T) or (N,) are
    computed there, and no size is read back, so the host never waits for the device.

    Args:
        events: the split's events, on the device that holds them.
        sequences: the S sequences, row after row.
        row_lengths: (B,) number of events of each row.
        labels: (B,) or (B, L) labels of the rows.
        sample: (B,) position of each row in the dataset.
        is_packed: whether a row may hold several sequences; if False, each row is one sequence.
    """
    device, lengths, n_static = events.times.device, sequences.lengths, sequences.static_stop - sequences.static_start
    n_rows, n_places, n_events = len(row_lengths), int(padded_length(row_lengths.max())), int(row_lengths.sum())
    sequence_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    row_starts = np.cumsum(row_lengths) - row_lengths
    first_timed = np.where(sequences.start < sequences.stop, sequences.start, -1)
    # Position of the first timed event, where the record has other events between it and the static event before it,
    # which the sequence leaves out; else -1.
    jump = np.where((n_static > 0) & (sequences.static_stop != sequences.start), n_static, -1)
    has_jump = bool((jump > 0).any())
    births = np.where(sequences.birth_times == STATIC_TIME, np.iinfo(np.int64).max, sequences.birth_times)
    of_row = np.array([row_lengths, row_starts, np.arange(n_rows) * n_places - row_starts])
    of_sequence = np.array([
        lengths, sequence_starts[:-1], n_static, sequences.static_start, sequences.start - n_static, jump, first_timed,
        sequences.prediction_times, births,
    ])  # fmt: skip

    lengths_B, starts_B, shift_B = sent(of_row, device)
    lengths_S, starts_S, n_static_S, static_start_S, origin_S, jump_S, first_timed_S, predicted_S, birth_S = sent(
        of_sequence, device
    )
    first_times_S = events.times.index_select(0, first_timed_S.clamp(min=0))
    first_times_S = torch.where(first_timed_S >= 0, first_times_S, predicted_S)
    places_N = torch.arange(n_events, device=device)
    places_N = places_N + torch.repeat_interleave(shift_B, lengths_B, output_size=n_events)

    # For each position of a row: the number of its event within the sequence, and the sequence to which it belongs.
    position_BT = torch.arange(n_places, device=device)[None]
    is_event_BT = position_BT < lengths_B[:, None]
    sequence_BT = None
    if is_packed:
        number_BT = (starts_B[:, None] + position_BT).clamp_(max=n_events - 1)
        sequence_N = torch.repeat_interleave(lengths_S, output_size=n_events)
        sequence_BT = _taken(sequence_N, number_BT)
        position_BT = number_BT - _taken(starts_S, sequence_BT)

    def spread(x_S: Tensor) -> Tensor:
        return x_S[:, None] if sequence_BT is None else _taken(x_S, sequence_BT)

    event_BT = spread(origin_S) + position_BT
    if has_jump:
        event_BT = torch.where(position_BT < spread(n_static_S), spread(static_start_S) + position_BT, event_BT)
    event_BT.mul_(is_event_BT)
    times_BT = _taken(events.times, event_BT)
    is_timed_BT = is_event_BT & (times_BT != STATIC_TIME)
    first_times_BT = spread(first_times_S)
    times_BT = torch.where(is_timed_BT, times_BT, first_times_BT)
    continues_BT = is_event_BT & (position_BT > 0)
    is_next_BT = continues_BT & is_timed_BT
    if has_jump:
        is_next_BT &= position_BT != spread(jump_S)
    # Gaps are differences of whole microseconds: the difference of two float32 numbers of days could be minutes off.
    gap_BT = (times_BT - times_BT.roll(1)).mul_(continues_BT)
    birth_BT = spread(birth_S)
    # An event before the birth has no age: a negative age would reveal a birth that lies after the prediction time.
    is_aged_BT = is_event_BT & (times_BT >= birth_BT)
    return Batch(
        token_ids=_taken(events.token_ids, event_BT).mul_(is_event_BT),
        days=_days((spread(predicted_S) - times_BT).mul_(is_event_BT)),
        gap_days=_days(gap_BT),
        elapsed_days=_days(times_BT - first_times_BT),
        age_days=torch.where(is_aged_BT, _days(times_BT - birth_BT), torch.nan),
        values=None if events.values is None else torch.where(is_event_BT, _taken(events.values, event_BT), torch.nan),
        is_event=is_event_BT,
        is_static=is_event_BT ^ is_timed_BT,
        is_next=is_next_BT,
        segments=None if sequence_BT is None else (sequence_BT + 1).mul_(is_event_BT).int(),
        event_index=None if sequence_BT is None else position_BT * is_event_BT,
        places=places_N,
        sequence_starts=sent(sequence_starts.astype(np.int32), device),
        labels=sent(labels, device),
        sample=sent(np.asarray(sample, np.int64), device),
        n_events=n_events,
        n_pairs=int(np.square(lengths).sum()),
    )


def _taken(x: Tensor, index_BT: Tensor) -> Tensor:
    """Return x[index_BT], (B, T), of x (n,) by `index_select`, which is faster on a CPU."""
    return x.index_select(0, index_BT.view(-1)).view(index_BT.shape)


def _days(microseconds: Tensor) -> Tensor:
    """Return float32 days; the division in float64 means that a number is rounded once only."""
    return microseconds.double().div_(MICROSECONDS_PER_DAY).float()


def padded_length(lengths: Any) -> Any:
    """Return lengths rounded up to a multiple of `LENGTH_MULTIPLE`.

    >>> padded_length(np.array([1, 8, 9])).tolist()
    [8, 8, 16]
    """
    return -(-lengths // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def batch_loader(
    dataset: EventDataset,
    sampler: Sampler[npt.NDArray[np.int64]],
    *,
    num_workers: int = 0,
    device: torch.device = HOST,
    data_device: str = "auto",
    prefetch: bool | str = False,
) -> DataLoader[Any] | PrefetchedLoader:
    """Return a loader that yields whole batches for `device`, with the attributes `dataset` and `sampler`.

    Args:
        dataset: the dataset.
        sampler: yields the indices of each batch.
        num_workers: processes that build batches; 0 = this process builds them.
        device: the device that will use the batches.
        data_device: whether the events are held on the device too, see `is_gathered_there`. If so, this process alone
            builds the batches there; if not, batches are built in memory, page-locked for a GPU.
        prefetch: whether a thread builds the next batch while the caller computes: true, false, or `auto` (for a GPU). Batches
            that are built on the device or by workers need no thread.
    """
    is_held = is_gathered_there(dataset.events, device, data_device)
    loader: DataLoader[Any] = DataLoader(
        cast("Dataset[Batch]", dataset.on(device) if is_held else dataset),
        batch_size=None,
        sampler=sampler,
        num_workers=0 if is_held else num_workers,
        pin_memory=device.type == "cuda" and not is_held,
    )
    is_wanted = device.type == "cuda" if prefetch == "auto" else prefetch
    return PrefetchedLoader(loader, device) if is_wanted and not is_held and not num_workers else loader
