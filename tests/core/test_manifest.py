"""Every artefact that is truncated, bit-flipped or another one's is named and not loaded."""

from __future__ import annotations

import random
import shutil
import sqlite3
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

import ehr_embed
from ehr_embed.core import manifest
from ehr_embed.core.errors import UserError
from ehr_embed.core.manifest import check_files, describe
from ehr_embed.data.store import EventStore, build_store
from ehr_embed.data.vocabulary import VocabularySettings
from ehr_embed.embedders.hashing import HashingEmbedder
from ehr_embed.embedding.table import load_table, save_table
from ehr_embed.embedding.vector_cache import embed_texts
from ehr_embed.evaluation.predictions import read_predictions
from ehr_embed.experiment.inputs import prepare_from
from ehr_embed.experiment.run import run
from ehr_embed.run_folder.checkpoints import read_checkpoint
from ehr_embed.run_folder.finish import read_metrics
from ehr_embed.sources.meds import MedsSource
from tests.helpers.configs import composed
from tests.helpers.refusals import refused

SMALL = (
    "embedder=hashing", "embedder.embedding_dim=8", "model.n_layers=1", "model.model_dim=16", "trainer.epochs=1",
    "trainer.n_bootstrap=5", "trainer.precision=32-true", "audit=off",
)  # fmt: skip
DAMAGES = ("truncated", "flipped", "foreign", "missing")


def settings(folder: Path, *overrides: str, seed: int = 0) -> DictConfig:
    where = (f"cache_dir={folder / 'cache'}", f"run_dir={folder / 'run'}", f"data.cohort_seed={seed}")
    return composed(*SMALL, "data.n_subjects=200", *where, f"seed={seed}", *overrides)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> list[Path]:
    """Two folders, each with the cache and the run of another cohort."""
    folders = [tmp_path_factory.mktemp(f"cohort-{seed}") for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        run(settings(folder, seed=seed))
        for path in folder.glob("cache/*-200-1"):  # under the names of the first, so that files can be exchanged
            shutil.copytree(path, path.with_name(path.name.replace("-200-1", "-200-0")))
    return folders


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def damage(path: Path, how: str, other: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif how == "foreign":
        assert other.read_bytes() != data, f"{other} is no other file"
        path.write_bytes(other.read_bytes())
    else:
        flip(path, rng.randrange(len(data)), rng.randrange(8))


def named(path: Path, opening: Callable[[], Any]) -> None:
    with pytest.raises(UserError) as caught:
        opening()
    assert str(path) in str(caught.value), f"{path} is not named: {caught.value}"


def open_prepared(folder: Path) -> None:
    _, prepared = prepare_from(settings(folder))
    _ = prepared.store.vocabulary
    for split in ("train", "tuning", "held_out"):
        prepared.store.split(split)


PREPARED = (
    ("cache/stores/*/manifest.json", 4), ("cache/stores/*/vocab.csv", 2), ("cache/stores/*/codes.parquet", 2),
    ("cache/stores/*/vocabulary.json", 2), ("cache/stores/*/train/*.bin", 2), ("cache/stores/*/held_out/*.npy", 2),
    ("cache/stores/*/*.safetensors", 4), ("cache/demo-200-0/data/train/0.parquet", 2),
    ("cache/demo-200-0/labels/*/train/0.parquet", 2), ("cache/demo-200-0/metadata/*.parquet", 2),
    ("cache/demo-200-0/import.json", 4),
)  # fmt: skip


@pytest.mark.parametrize(("pattern", "n_flips"), PREPARED, ids=[pattern for pattern, _ in PREPARED])
def test_damaged_stores_tables_and_imports_are_named(two_runs, pattern, n_flips):
    folder, rng = two_runs[0], random.Random(pattern)
    open_prepared(folder)
    for path in sorted(folder.glob(pattern)):
        kept, (other,) = path.read_bytes(), two_runs[1].glob(elsewhere(path, folder))
        for how in [*DAMAGES[:1], *["flipped"] * n_flips, *DAMAGES[2:]]:
            # A table that is missing is embedded again, and a folder without its manifest is no store.
            if how == "missing" and (path.suffix == ".safetensors" or path.name in ("manifest.json", "import.json")):
                continue
            if how == "foreign" and other.read_bytes() == kept:  # of both cohorts the same, such as the codes
                continue
            damage(path, how, other, rng)
            # The manifest of another store is whole: what it lists is not.
            is_other = how == "foreign" and path.suffix == ".json"
            try:
                named(path.parent if is_other else path, lambda: open_prepared(folder))
                assert how == "missing" or path.read_bytes() != kept, "it was made again, unasked"
            finally:
                path.write_bytes(kept)
    open_prepared(folder)


def elsewhere(path: Path, folder: Path) -> str:
    """The same file of the other cohort, whose store has another digest in its name."""
    parts = path.relative_to(folder).parts
    return str(Path(*(("demo-*" if part.startswith("demo-") and parts[1] == "stores" else part) for part in parts)))


def continued(folder: Path) -> float:
    """Do in the folder of a finished run what train.py does there."""
    return run(settings(folder))


RUN = (
    ("best_checkpoint.pt", lambda folder: ehr_embed.load(folder / "run")),
    ("latest_checkpoint.pt", lambda folder: read_checkpoint(folder / "run" / "latest_checkpoint.pt")),
    ("vocabulary/vocab.csv", lambda folder: ehr_embed.load(folder / "run")),
    ("vocabulary/codes.parquet", lambda folder: ehr_embed.load(folder / "run")),
    ("vocabulary/vocabulary.json", lambda folder: ehr_embed.load(folder / "run")),
    ("vocabulary/table.safetensors", lambda folder: ehr_embed.load(folder / "run")),
    ("metrics.json", lambda folder: read_metrics(folder / "run")),
    ("metrics.json", continued),
    ("config.yaml", continued),
    ("predictions/held_out.parquet", lambda folder: read_predictions(folder / "run/predictions/held_out.parquet")),
    ("manifest.json", lambda folder: ehr_embed.load(folder / "run")),
)


@pytest.mark.parametrize(("name", "opening"), RUN, ids=[f"{i} {name}" for i, (name, _) in enumerate(RUN)])
def test_damaged_files_of_a_run_are_named(two_runs, name, opening):
    path, rng = two_runs[0] / "run" / name, random.Random(name)
    kept = path.read_bytes()
    opening(two_runs[0])
    try:
        for how in ("truncated", "flipped", "flipped", "flipped", "foreign"):
            damage(path, how, two_runs[1] / "run" / name, rng)
            # The manifest of another run is whole: what it lists is not.
            is_other = name == "manifest.json" and how == "foreign"
            named(path.parent if is_other else path, lambda: opening(two_runs[0]))
            path.write_bytes(kept)
    finally:
        path.write_bytes(kept)


def test_what_a_run_was_made_from_stands_in_its_manifest(two_runs):
    said = manifest.read_manifest(two_runs[0] / "run" / "manifest.json", "")
    _, checkpoint = read_checkpoint(two_runs[0] / "run")
    assert {key: said["made_from"][key] for key in checkpoint["identity"]} == checkpoint["identity"]
    assert said["made_from"]["samples_digest"] == checkpoint["samples_digest"]
    assert any(file.startswith("data/") for file in said["made_from"]["source"])
    assert {"config.yaml", "metrics.json", "best_checkpoint.pt", "vocabulary/table.safetensors"} <= set(said["files"])


def attempt(opening: Callable[[], Any], path: Path) -> Any:
    """Return the opened object, or None where an error that names the file refuses it."""
    try:
        return opening()
    except UserError as error:
        if str(path) not in str(error):
            raise
        return None


def flips(data: bytes, n: int, seed: int) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    return [(rng.randrange(len(data)), rng.randrange(8)) for _ in range(n)]


def test_no_flipped_bit_changes_a_checkpoint_unnoticed(tmp_path, two_runs):
    """Without a manifest, as in the middle of a run; torch itself notices hardly any."""
    source = two_runs[0] / "run" / "latest_checkpoint.pt"
    path = tmp_path / "latest_checkpoint.pt"
    shutil.copy(source, path)
    expected, kept = read_checkpoint(path)[1], source.read_bytes()
    n_named = n_unnoticed_by_torch = 0
    for at, bit in flips(kept, 150, 0):
        flip(path, at, bit)
        try:
            found = torch.load(path, weights_only=True)
            n_unnoticed_by_torch += not same(found, expected)
        except Exception:
            pass
        found = attempt(lambda: read_checkpoint(path)[1], path)
        n_named += found is None
        assert found is None or same(found, expected), f"byte {at}, bit {bit}"
        path.write_bytes(kept)
    print(f"\ncheckpoint: 150 flips, {n_named} named, {n_unnoticed_by_torch} that torch.load does not notice")
    assert n_named >= n_unnoticed_by_torch > 0


def test_every_bit_of_a_checkpoint_s_list_of_records(tmp_path, two_runs):
    """The central directory, which no checksum covers. Two tensors will do: each of the 736 flips has the file read whole."""
    path = tmp_path / "latest_checkpoint.pt"
    checkpoint = read_checkpoint(two_runs[0] / "run" / "latest_checkpoint.pt")[1]
    weights = dict(list(checkpoint["model_state_dict"].items())[:2])
    torch.save(
        {key: checkpoint[key] for key in ("config", "identity", "sizes", "class_names")}
        | {"model_state_dict": weights},
        path,
    )
    expected, kept = read_checkpoint(path)[1], path.read_bytes()
    first = kept.index(b"PK\x01\x02", zipfile.ZipFile(path).start_dir)
    # Every field of two entries, one of them a tensor's.
    entries = [first, kept.index(b"PK\x01\x02", kept.index(b"/data/0", first))]
    for start in entries:
        for at in range(start, start + 46):
            for bit in range(8):
                flip(path, at, bit)
                found = attempt(lambda: read_checkpoint(path)[1], path)
                assert found is None or same(found, expected), f"byte {at - start} of an entry, bit {bit}"
                path.write_bytes(kept)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and one.numpy().tobytes() == other.numpy().tobytes()
        )
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_no_flipped_bit_changes_a_table_unnoticed(tmp_path):
    path, about = tmp_path / "table.safetensors", {"embedder": "e", "vocab_sha256": "v"}
    table = torch.randn(9, 8).half().float()
    save_table(path, table, about)
    kept = path.read_bytes()
    for at in range(len(kept)):
        flip(path, at, at % 8)
        found = attempt(lambda: load_table(path, expected=about)[0], path)
        assert found is None or torch.equal(found, table), f"byte {at}"
        path.write_bytes(kept)


class Counting(HashingEmbedder):
    n_texts = 0

    def embed(self, texts):
        type(self).n_texts += len(texts)
        return super().embed(texts)


TEXTS = [f"finding number {number}" for number in range(40)]


def cache_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "embeddings").glob("*.sqlite")
    return path


def test_no_flipped_bit_changes_a_cached_vector_unnoticed(tmp_path):
    embedder = HashingEmbedder(embedding_dim=8)
    expected = embed_texts(embedder, TEXTS, cache_dir=tmp_path)
    path = cache_file(tmp_path)
    kept, n_named = path.read_bytes(), 0
    for at, bit in flips(kept, 300, 1):
        flip(path, at, bit)
        found = attempt(lambda: embed_texts(embedder, TEXTS, cache_dir=tmp_path), path)
        n_named += found is None
        assert found is None or np.array_equal(found, expected), f"byte {at}, bit {bit}"
        for leftover in path.parent.glob(f"{path.name}-*"):
            leftover.unlink()
        path.write_bytes(kept)
    print(f"\ncache: 300 flips, {n_named} named, none changed a vector")
    with closing(sqlite3.connect(path)) as database:
        vector = database.execute("SELECT vector FROM vectors").fetchone()[0]
    flip(path, kept.index(vector), 3)
    with refused("sqlite", "'finding ", "checksum", "Delete this file"):
        embed_texts(embedder, TEXTS, cache_dir=tmp_path)


def test_the_cache_of_another_embedder_is_refused(tmp_path):
    embed_texts(HashingEmbedder(embedding_dim=9), TEXTS, cache_dir=tmp_path)
    path = cache_file(tmp_path)
    other = HashingEmbedder(embedding_dim=8)
    embed_texts(other, TEXTS[:3], cache_dir=tmp_path / "other")
    path.replace(cache_file(tmp_path / "other"))
    with pytest.raises(
        UserError, match=r"expected .*\"embedding_dim\": 8.*, found .*\"embedding_dim\": 9.*Delete this file"
    ):
        embed_texts(other, TEXTS, cache_dir=tmp_path / "other")


def test_a_truncated_cache_is_named(tmp_path):
    embedder = HashingEmbedder(embedding_dim=64)
    embed_texts(embedder, TEXTS, cache_dir=tmp_path)
    path = cache_file(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=rf"{path}: .* Delete this file"):
        embed_texts(embedder, TEXTS, cache_dir=tmp_path)


def test_a_cache_without_checksums_is_kept(tmp_path):
    """A cache of an earlier version is taken over, since embedding its texts again may take hours."""
    Counting.n_texts = 0
    embedder = Counting(embedding_dim=8)
    expected = embed_texts(embedder, TEXTS, cache_dir=tmp_path)
    with closing(sqlite3.connect(cache_file(tmp_path))) as database, database:
        database.execute("ALTER TABLE vectors DROP COLUMN checksum")
        database.execute("PRAGMA user_version = 0")
    assert np.array_equal(embed_texts(embedder, TEXTS, cache_dir=tmp_path), expected)
    assert Counting.n_texts == len(TEXTS)


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """Files that were read through for their checksums."""
    found: list[Path] = []
    real = manifest.file_sha256
    monkeypatch.setattr(manifest, "file_sha256", lambda path: found.append(path) or real(path))
    return found


def test_a_large_store_is_read_through_only_where_it_changed(tiny, tmp_path, monkeypatch, reads):
    monkeypatch.setattr(manifest, "FULL_BYTES", 100)
    store = build_store(tmp_path / "store", MedsSource(root=str(tiny)), VocabularySettings(min_count=1))
    reads.clear()
    EventStore(store.folder)
    assert reads == []
    copy = tmp_path / "copy"
    shutil.copytree(store.folder, copy)
    EventStore(copy)
    assert len(reads) == len(store.manifest["files"]), "a copy may have gone wrong"
    reads.clear()
    EventStore(copy)
    assert reads == []
    file = copy / "train" / "token_ids.bin"
    flip(file, 9)
    for _ in range(2):
        with refused("token_ids.bin", "changed", "sha256", "Type: python"):
            EventStore(copy)
    assert set(reads) == {file}
    EventStore(copy, integrity="size")
    reads.clear()
    EventStore(store.folder, integrity="full")
    assert len(reads) == len(store.manifest["files"])
    with pytest.raises(UserError, match=r"unknown integrity 'ful': did you mean 'full'"):
        EventStore(store.folder, integrity="ful")


def test_a_small_folder_is_read_through_each_time(tmp_path, reads):
    (tmp_path / "a.bin").write_bytes(b"abc")
    files = describe(tmp_path)
    reads.clear()
    for _ in range(2):
        check_files(tmp_path, files, "")
    assert len(reads) == 2


def test_an_older_store_is_refused_with_the_command(tiny, tmp_path):
    store = build_store(tmp_path / "store", MedsSource(root=str(tiny)), VocabularySettings(min_count=1))
    (store.folder / "manifest.json").write_text('{"format": 2, "splits": {}}')
    with refused("earlier version", "Type: python embed.py overwrite=true"):
        EventStore(store.folder)
