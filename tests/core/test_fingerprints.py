"""Changed data are noticed wherever they changed; a copy is no change; what earlier versions kept still counts."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ehr_embed.core import fingerprints
from ehr_embed.core.errors import UserError
from ehr_embed.core.files import read_json
from ehr_embed.core.fingerprints import KNOWN, fingerprint, fingerprint_of_many, known_fingerprints, without_content
from ehr_embed.core.manifest import read_manifest, write_manifest
from ehr_embed.data.store import build_store, check_fingerprint
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.embedders.hashing import HashingEmbedder
from ehr_embed.embedding.prepare import Prepared, prepare
from ehr_embed.sources.imported import import_once
from ehr_embed.sources.meds import MedsSource

N = 30_000


def write_values(path: Path, values: np.ndarray) -> None:
    """A parquet column without a dictionary, compression or statistics: its footer says nothing of the order of its values."""
    table = pa.table({"numeric_value": pa.array(values, pa.float32())})
    pq.write_table(table, path, use_dictionary=False, compression="none", write_statistics=False)


@pytest.fixture
def values(tmp_path) -> Path:
    path = tmp_path / "values.parquet"
    write_values(path, np.arange(N))
    return path


def age(*paths: Path) -> None:
    """Let files seem to be written an hour ago, as far as a process may."""
    then = time.time() - 3600
    for path in paths:
        os.utime(path, (then, then))


@pytest.fixture
def settled(monkeypatch) -> None:
    """The change of a file's status cannot be dated back, so here a file is settled at once."""
    monkeypatch.setattr(fingerprints, "SETTLED_NS", -1)


def test_permuted_values_are_another_fingerprint(values):
    before, size = fingerprint(values), values.stat().st_size
    shuffled = np.arange(N)
    shuffled[: N // 3] = shuffled[: N // 3][::-1]  # the last 64 KiB, with the footer, stay as they are
    write_values(values, shuffled)
    assert values.stat().st_size == size
    after = fingerprint(values)
    assert without_content(after) == without_content(before), "an earlier version saw no difference"
    assert after != before


@pytest.mark.parametrize("place", [0, 0.3, 0.7, 0.999])
def test_one_byte_anywhere_counts_even_under_the_same_times(values, tmp_path, settled, place):
    with known_fingerprints(tmp_path):
        before, stat = fingerprint(values), values.stat()
    content = bytearray(values.read_bytes())
    content[int(place * len(content))] ^= 1
    values.write_bytes(content)
    os.utime(values, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with known_fingerprints(tmp_path):
        assert fingerprint(values) != before


def test_a_copy_or_a_rewrite_of_the_same_content_is_no_change(values, tmp_path):
    before = fingerprint(values)
    copy = Path(shutil.copy(values, tmp_path / "copy.parquet"))
    age(copy)
    assert fingerprint(copy) == before
    write_values(values, np.arange(N))
    assert fingerprint(values) == before


def test_an_unchanged_file_is_read_once_and_a_fresh_one_again(values, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(fingerprints, "file_sha256", lambda path: read.append(path) or "0" * 64)
    for _ in range(2):
        with known_fingerprints(tmp_path / "cache"):
            fingerprint(values)
    assert len(read) == 2, "another write may still leave it the same times"
    monkeypatch.setattr(fingerprints, "SETTLED_NS", -1)
    for _ in range(3):
        with known_fingerprints(tmp_path / "cache"):
            fingerprint(values)
            fingerprint_of_many([values], sampled=2)
    assert len(read) == 4
    assert len(read_json(tmp_path / "cache" / KNOWN)) == 2
    (tmp_path / "cache" / KNOWN).write_text('{"x": 1')
    with known_fingerprints(tmp_path / "cache"):
        fingerprint(values)
    assert len(read) == 5, "a damaged note costs another reading"


def test_one_of_many_files_counts_whichever_it_is(tmp_path):
    paths = [tmp_path / f"patient_{number}.pt" for number in range(100)]
    for path in paths:
        path.write_bytes(bytes(100_000))
    before = fingerprint_of_many(paths, sampled=16)
    content = bytearray(100_000)
    content[7] = 1
    paths[1].write_bytes(content)
    after = fingerprint_of_many(paths, sampled=16)
    assert without_content(after) == without_content(before), "an earlier version saw no difference"
    assert after != before


def made_earlier(path: Path, key: str) -> None:
    """Let a manifest be as earlier versions wrote it."""
    manifest = read_manifest(path, "")
    manifest[key] = {name: without_content(value) for name, value in manifest[key].items()}
    files = manifest.pop("files")
    write_manifest(path.parent, manifest, files, name=path.name)


def prepared(root: Path, cache_dir: Path) -> Prepared:
    settings = VocabularySettings(min_count=1)
    return prepare(MedsSource(root=str(root)), settings, HashingEmbedder(embedding_dim=8), cache_dir=cache_dir)


def test_a_store_of_an_earlier_version_is_taken_and_one_line_says_so(tiny, tmp_path, caplog):
    folder = prepared(tiny, tmp_path / "cache").store.folder
    made_earlier(folder / "manifest.json", "source")
    before = (folder / "manifest.json").stat().st_mtime_ns
    caplog.clear()
    assert prepared(tiny, tmp_path / "cache").store.folder == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [text.count("embed.py overwrite=true") for text in said if "earlier version" in text] == [1]
    shard = next((tiny / "data" / "train").glob("*.parquet"))
    pl.read_parquet(shard).with_columns(pl.col("numeric_value") + 1).write_parquet(shard)
    with pytest.raises(
        UserError, match=r"data/train/0\.parquet was \w+:\w+, now .*Type: python embed\.py overwrite=true"
    ):
        prepared(tiny, tmp_path / "cache")


def test_a_copied_dataset_fits_the_store_of_the_original(tiny, tmp_path):
    store = build_store(tmp_path / "store", MedsSource(root=str(tiny)), VocabularySettings(min_count=1))
    copy = shutil.copytree(tiny, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    check_fingerprint(store, MedsSource(root=str(copy)))


def test_an_import_of_an_earlier_version_is_taken(values, tmp_path, caplog):
    made_from = {"values": fingerprint(values), "cutoff_months": None}
    import_once(tmp_path / "import", made_from, lambda folder: (folder / "x").touch(), overwrite=False)
    made_earlier_one = made_from | {"values": without_content(made_from["values"])}
    manifest = read_manifest(tmp_path / "import" / "import.json", "")
    files = manifest.pop("files")
    write_manifest(tmp_path / "import", manifest | {"made_from": made_earlier_one}, files, name="import.json")
    import_once(tmp_path / "import", made_from, lambda folder: pytest.fail("made again"), overwrite=False)
    assert caplog.text.count("earlier version") == 1
    write_values(values, np.arange(N)[::-1])
    with pytest.raises(UserError, match=r"values was \w+:\w+, now .*Type: python embed\.py overwrite=true"):
        import_once(tmp_path / "import", made_from | {"values": fingerprint(values)}, lambda _: None, overwrite=False)
