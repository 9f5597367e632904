"""Build and open the event store: memory-mapped ragged arrays per split, written shard by shard, with a manifest."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from meds import birth_code

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_directory, digest, file_sha256
from ehr_embed.core.fingerprints import EARLIER_VERSION, is_of_earlier_version, is_same
from ehr_embed.core.manifest import REBUILD, check_files, describe, read_manifest, remember, write_manifest
from ehr_embed.core.progress import ProgressBar
from ehr_embed.data.vocabulary import UNKNOWN, Vocabulary, VocabularySettings, fit_vocabulary, vocabulary_sha256
from ehr_embed.sources.protocol import SPLITS, Source
from ehr_embed.sources.split_names import check_split_names, refuse_near_misses

log = logging.getLogger(__name__)
FORMAT = 3
STATIC_TIME = np.iinfo(np.int64).min
"""Time of a static event: it is below every real time, so a static event sorts first and is always visible."""
MICROSECONDS_PER_DAY = 86_400_000_000
DAYS_PER_YEAR = 365.25
HOURS_PER_DAY = 24.0
DTYPES = {"token_ids": np.int32, "times": np.int64, "values": np.float32}
SUBJECT_ARRAYS = ("subject_ids", "offsets", "birth_times")


@dataclass(frozen=True, eq=False)
class SplitEvents:
    """Events of one split, subject after subject. Two instances are equal only if they are the same object.

    Attributes:
        token_ids: (N,) int32.
        times: (N,) int64, microseconds since 1970-01-01, `STATIC_TIME` for static events.
        values: (N,) float32 or None when the vocabulary carries no values.
        subject_ids: (S,) int64.
        offsets: (S + 1,) int64; subject s owns events offsets[s]:offsets[s + 1].
        birth_times: (S,) int64, microseconds since 1970-01-01, `STATIC_TIME` where the record has no time of birth.
    """

    token_ids: npt.NDArray[np.int32]
    times: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32] | None
    subject_ids: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    birth_times: npt.NDArray[np.int64]


class EventStore:
    """Open a store that `build_store` wrote.

    Args:
        folder: the store's folder.
        integrity: how the files are compared with the manifest, see `ehr_embed.core.manifest`.

    Raises:
        UserError: there is no store in `folder`, it has another format, or its files differ from the manifest.
    """

    def __init__(self, folder: Path, *, integrity: str = "auto") -> None:
        self.folder = folder
        if not (folder / "manifest.json").exists():
            raise UserError(
                f"{folder}: no event store here (no manifest.json). Type: python embed.py with the same overrides"
            )
        self.manifest: dict[str, Any] = read_manifest(folder / "manifest.json", REBUILD)
        if (found := self.manifest.get("format")) != FORMAT:
            raise UserError(f"{folder}: store format {found}, this version reads {FORMAT}. {REBUILD}")
        check_files(folder, self.manifest["files"], REBUILD, integrity=integrity)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self.folder)

    def split(self, name: str) -> SplitEvents:
        """Map a split's events from disk without reading them into memory.

        Raises:
            UserError: the dataset has no such split, or a file has another size than the manifest says.
        """
        sizes = self.manifest["splits"][name]
        if not sizes["n_events"]:
            raise UserError(
                f"{self.manifest['name']}: the split {name} has no events. Training needs {', '.join(SPLITS)}; "
                "add the split in metadata/subject_splits.parquet and run python embed.py overwrite=true"
            )
        folder = self.folder / name
        arrays = {key: self._map(folder / f"{key}.bin", dtype, sizes["n_events"]) for key, dtype in DTYPES.items()
                  if key != "values" or self.manifest["has_values"]}  # fmt: skip
        subjects = [np.load(folder / f"{name}.npy", allow_pickle=False) for name in SUBJECT_ARRAYS]
        return SplitEvents(arrays["token_ids"], arrays["times"], arrays.get("values"), *subjects)

    def _map(self, path: Path, dtype: Any, length: int) -> npt.NDArray[Any]:
        expected = length * np.dtype(dtype).itemsize
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise UserError(
                f"{path}: {found} bytes, expected {expected}; the file was changed since the store was opened. {REBUILD}"
            )
        return np.memmap(path, dtype=dtype, mode="r", shape=(length,))


def build_store(folder: Path, source: Source, settings: VocabularySettings) -> EventStore:
    """Fit the vocabulary on train, and write every split's events to `folder`, which appears whole or not at all."""
    vocabulary = fit_vocabulary(source, settings, scratch=folder.parent)
    counts = np.zeros(len(vocabulary), np.int64)
    with atomic_directory(folder) as temporary, ExitStack() as opened:
        writers = {split: _SplitWriter(temporary / split, settings.has_values, opened) for split in SPLITS}
        n_by_split: Counter[str] = Counter()
        for shard in ProgressBar(source.shards, desc="event store", unit="shard"):
            events = source.read(shard)
            n_by_split.update(dict(events["split"].value_counts().iter_rows()))
            refuse_near_misses(n_by_split, where=source.name)
            for split, part in by_split(events):
                token_ids = writers[split].append(part, vocabulary)
                if split == "train":
                    counts += np.bincount(token_ids, minlength=len(counts))
                # Without the deletion this shard would still be in memory while the next one is read.
                del part, token_ids
            del events
        check_split_names(n_by_split, where=source.name, of="events")
        vocabulary = vocabulary.with_counts(counts)
        vocabulary.save(temporary)
        manifest = {
            "format": FORMAT,
            "name": source.name,
            "source": source.fingerprint(),
            "settings": settings_key(settings),
            "vocab_sha256": vocabulary_sha256(temporary),
            "has_values": settings.has_values,
            "splits": {split: writer.finish() for split, writer in writers.items()},
        }
        write_manifest(temporary, manifest, files := describe(temporary))
    remember(folder, files)
    return EventStore(folder, integrity="size")


def by_split(events: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """Yield the name and the events of each split that has events."""
    found = events["split"].unique()
    for split in SPLITS:
        if split in found:
            yield split, events if len(found) == 1 else events.filter(split=split)


def encode_split(source: Source, vocabulary: Vocabulary, split: str | None) -> SplitEvents:
    """Return the events of one split of any source, encoded with a vocabulary that was fitted elsewhere, in memory.

    Args:
        source: the source of the events.
        vocabulary: the vocabulary that encodes them.
        split: the split; None = all subjects.

    Raises:
        UserError: the source has no such split.
    """
    return joined(list(encode_shards(source, lambda _: vocabulary, split)))


def encode_shards(
    source: Source, vocabulary_for: Callable[[pl.Series], Vocabulary], split: str | None
) -> Iterator[SplitEvents]:
    """Yield the encoded events of each shard that has events of the split; each shard is read once.

    Args:
        source: the source of the events.
        vocabulary_for: function that returns the vocabulary for a shard, given the codes of its events.
        split: the split; None = all subjects.

    Raises:
        UserError: the source has no such split.
    """
    n_shards = 0
    for shard in source.shards:
        part = source.read(shard)
        part = part if split is None else part.filter(split=split)
        if not len(part):
            continue
        n_shards += 1
        vocabulary = vocabulary_for(part["code"])
        token_ids, normal = vocabulary.encode(part["code"], part["numeric_value"])
        values = normal if vocabulary.settings.has_values else None
        yield SplitEvents(token_ids, event_times(part), values, *subject_arrays([subject_rows(part)]))
    if not n_shards:
        what = "the dataset" if split is None else f"the split {split!r}"
        raise UserError(f"{source.name}: {what} has no events. Splits are {', '.join(SPLITS)}.")


def joined(parts: list[SplitEvents]) -> SplitEvents:
    """Return the subjects of all parts in order, and empty the list, so that memory holds no part twice."""
    if len(parts) == 1:
        return parts.pop()
    names = ("token_ids", "times", "values", "subject_ids", "birth_times")
    arrays = {
        name: None if getattr(parts[0], name) is None else np.concatenate([getattr(part, name) for part in parts])
        for name in names
    }
    sizes = np.concatenate([np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)])
    parts.clear()
    return SplitEvents(**arrays, offsets=np.cumsum(sizes))  # type: ignore[arg-type]


def n_doubled(events: pl.DataFrame) -> int:
    """Count the events that are exact copies of another event: same subject, time, code and number.

    Rows are compared by 64-bit hashes; with 10^8 rows the count is off by one with a probability of about 1 in 4,000.

    >>> events = {"subject_id": [1, 1, 1], "time": [None] * 3, "code": ["A", "A", "A"], "numeric_value": [1.0, 1.0, None]}
    >>> n_doubled(pl.DataFrame(events))
    1
    """
    return len(events) - events.select("subject_id", "time", "code", "numeric_value").hash_rows().n_unique()


def subject_rows(events: pl.DataFrame) -> pl.DataFrame:
    """Return one row per subject, in order of appearance: subject_id, n_events, birth_time.

    The time of birth is in microseconds since 1970-01-01, `STATIC_TIME` if the record has none.

    >>> from datetime import datetime
    >>> events = {"subject_id": [7, 7, 3], "time": [None, datetime(1970, 1, 1), datetime(2020, 1, 1)],
    ...     "code": ["SEX//F", "MEDS_BIRTH", "FEVER"]}
    >>> subject_rows(pl.DataFrame(events)).select("subject_id", "n_events", pl.col("birth_time") == STATIC_TIME).rows()
    [(7, 2, False), (3, 1, True)]
    """
    is_birth = (pl.col("code") == birth_code) | pl.col("code").str.starts_with(f"{birth_code}//")
    birth = pl.col("time").filter(is_birth).cast(pl.Int64).min()
    return events.group_by("subject_id", maintain_order=True).agg(
        pl.len().cast(pl.Int64).alias("n_events"), birth.fill_null(STATIC_TIME).alias("birth_time")
    )


def subject_arrays(parts: list[pl.DataFrame]) -> list[npt.NDArray[np.int64]]:
    """Return the arrays of `SUBJECT_ARRAYS`, given the rows of `subject_rows`."""
    rows = pl.concat(parts)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows["n_events"].to_numpy())])
    return [rows["subject_id"].to_numpy(), offsets, rows["birth_time"].to_numpy()]


def event_times(events: pl.DataFrame) -> npt.NDArray[np.int64]:
    """Return the microseconds since 1970-01-01 of every event, `STATIC_TIME` for static events."""
    return events["time"].cast(pl.Int64).fill_null(STATIC_TIME).to_numpy()


def settings_key(settings: VocabularySettings) -> dict[str, Any]:
    """Return the settings that determine the store's content; lookup files are identified by content, not by name."""
    return {**settings.__dict__, "lookups": [file_sha256(path) for path in settings.lookups if Path(path).is_file()]}


def store_folder(cache_dir: Path, source: Source, settings: VocabularySettings) -> Path:
    """Return the folder of the store for a source and settings.

    The folder's name does not depend on the fingerprint of the data. So if the data have changed, the old store is
    found and refused, rather than a new one built without the user's knowledge.
    """
    where = str(source.labels_dir.parent)
    return cache_dir / "stores" / f"{source.name}-{digest({'root': where, **settings_key(settings)}, 10)}"


def check_fingerprint(store: EventStore, source: Source) -> None:
    """Refuse a store that was built from other data than `source` now has.

    Raises:
        UserError: the data differ; the message names the first file that differs, with both fingerprints.
    """
    found, expected = source.fingerprint(), store.manifest["source"]
    for file in sorted({*found, *expected}):
        if not is_same(found.get(file), expected.get(file)):
            raise UserError(
                f"{store.folder} was built from other data: {file} was {expected.get(file, 'absent')}, now "
                f"{found.get(file, 'absent')}. Its vocabulary and events would not fit. "
                f"{REBUILD}"
            )
    if any(is_of_earlier_version(found[file], expected[file]) for file in found):
        log.warning(EARLIER_VERSION, store.folder)


class _SplitWriter:
    """Append a split's events to the files of the store, which `opened` closes where the store is not finished."""

    def __init__(self, folder: Path, has_values: bool, opened: ExitStack) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        keys = [key for key in DTYPES if key != "values" or has_values]
        self.files = {key: opened.enter_context((folder / f"{key}.bin").open("wb")) for key in keys}
        self.subjects = [pl.DataFrame(schema=dict.fromkeys(("subject_id", "n_events", "birth_time"), pl.Int64))]
        self.n_unknown = self.n_doubled = 0

    def append(self, events: pl.DataFrame, vocabulary: Vocabulary) -> npt.NDArray[np.int32]:
        """Write events and return their token ids, (N,)."""
        token_ids, values = vocabulary.encode(events["code"], events["numeric_value"])
        for key, array in {"token_ids": token_ids, "times": event_times(events), "values": values}.items():
            if key in self.files:
                self.files[key].write(np.ascontiguousarray(array, DTYPES[key]).data)
        self.subjects.append(subject_rows(events))
        self.n_unknown += int((token_ids == UNKNOWN).sum())
        self.n_doubled += n_doubled(events)
        return token_ids

    def finish(self) -> dict[str, int]:
        for file in self.files.values():
            file.close()
        arrays = dict(zip(SUBJECT_ARRAYS, subject_arrays(self.subjects), strict=True))
        for name, array in arrays.items():
            np.save(self.folder / f"{name}.npy", array)
        n_subjects = len(arrays["subject_ids"])
        n_events = int(arrays["offsets"][-1])
        counts = {"n_subjects": n_subjects, "n_events": n_events, "n_unknown": self.n_unknown}
        return counts | {"n_doubled": self.n_doubled}
