"""A full disk and a read-only folder: one clear line, and no half-written file."""

from __future__ import annotations

import json
import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib import pyplot as plt
from safetensors.torch import save_file

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_directory, atomic_path, cannot_write, locked, write_failure
from ehr_embed.embedders.hashing import HashingEmbedder
from ehr_embed.embedding.vector_cache import embed_texts
from ehr_embed.run_folder.resume import claimed
from ehr_embed.trackers.jsonl import JsonlTracker
from tests.helpers.small_meds import ROOT

SMALL = (
    "embedder=hashing", "data.n_subjects=300", "model.n_layers=1", "model.model_dim=16", "trainer.epochs=1",
    "trainer.n_bootstrap=5", "audit=off",
)  # fmt: skip
NUMBERS = np.random.default_rng(0).random(40_000)
FRAME = pl.DataFrame({"a": NUMBERS})


def savefig(path: Path) -> None:
    figure, axes = plt.subplots()
    axes.imshow(NUMBERS.reshape(200, 200))
    figure.savefig(path, format="png")
    plt.close(figure)


def sqlite(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE a (b BLOB)")
        database.execute("INSERT INTO a VALUES (?)", (NUMBERS.tobytes(),))


def save_array(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, NUMBERS)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: path.write_text("x" * 100_000),
    "torch": lambda path: torch.save({"a": torch.from_numpy(NUMBERS)}, path),
    "safetensors": lambda path: save_file({"a": torch.from_numpy(NUMBERS)}, path),
    "polars parquet": lambda path: FRAME.write_parquet(path),
    "polars csv": lambda path: FRAME.write_csv(path),
    "pyarrow": lambda path: pq.write_table(pa.table({"a": NUMBERS}), path),
    "numpy": save_array,
    "matplotlib": savefig,
    "sqlite": sqlite,
}


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own; skips where the user may not mount one."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def full(tmp_path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    with mounted(tmp_path / "full", "size=64k") as folder:
        yield folder


@pytest.fixture
def read_only(tmp_path) -> Iterator[Path]:
    with mounted(tmp_path / "read_only", "ro") as folder:
        yield folder


def write_both(folder: Path, writer: Callable[[Path], Any]) -> None:
    """One file, then a folder with it."""
    with (
        pytest.raises(UserError, match=rf"{folder}/a: .*Free space or choose another folder"),
        atomic_path(folder / "a") as path,
    ):
        writer(path)
    with (
        pytest.raises(UserError, match=rf"{folder}/b: .*choose another folder"),
        atomic_directory(folder / "b") as path,
    ):
        writer(path / "a")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", WRITERS)
def test_every_librarys_refusal_is_one_line_and_leaves_nothing(tmp_path, name):
    WRITERS[name](tmp_path / "whole")  # what it prepares once, such as fonts, it may
    (tmp_path / "limited").mkdir()
    with file_size_limit(4096):
        write_both(tmp_path / "limited", WRITERS[name])


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(full, name):
    write_both(full, WRITERS[name])


def test_an_error_of_another_kind_stays_what_it_is(tmp_path):
    assert write_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a"):
        _ = 1 / 0
    error = OSError(28, os.strerror(28))
    assert str(cannot_write("x", error)) == (
        "cannot write x: No space left on device. No part of it was left there, and what was finished before stays. "
        "Free space or choose another folder."
    )
    assert "A part of it may have been left there: delete it." in str(cannot_write("x", error, is_whole=False))


def test_a_read_only_folder(read_only):
    def lock() -> None:
        with locked(read_only / "a.lock", "building"):
            pass

    def claim() -> None:
        with claimed(read_only / "run", is_new=False):
            pass

    texts = ["fever", "cough"]
    for action in (lock, claim, lambda: embed_texts(HashingEmbedder(), texts, cache_dir=read_only)):
        with pytest.raises(UserError, match=rf"{read_only}/\S+: Read-only.*choose another folder"):
            action()


def test_a_vector_cache_on_a_full_disk_keeps_what_it_had(full):
    embedder = HashingEmbedder(batch_size=20)
    expected = embed_texts(embedder, ["fever", "cough"], cache_dir=full)
    many = [f"finding number {number}" for number in range(400)]
    with pytest.raises(UserError, match=rf"{full}/embeddings/\w+\.sqlite: .*full.*choose another folder"):
        embed_texts(embedder, many, cache_dir=full)
    assert np.array_equal(embed_texts(embedder, ["fever", "cough"], cache_dir=full), expected)


def test_a_row_of_history_is_written_whole_or_not_at_all(tmp_path):
    with JsonlTracker(run_dir=tmp_path) as tracker:
        tracker.log({"loss": 1.0}, step=1)
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with file_size_limit(size + 10), pytest.raises(UserError, match=r"metrics\.jsonl: .*choose another folder"):
            tracker.log({"loss": 2.0}, step=2)
        assert (tmp_path / "metrics.jsonl").stat().st_size == size
        tracker.log({"loss": 2.0}, step=2)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HYDRA_FULL_ERROR": "0"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def refused(done: subprocess.CompletedProcess[str], where: Path) -> str:
    """The one line of an entry point that could not write."""
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: cannot write {where}"), said
    assert not [path for path in where.rglob("*") if path.name.endswith(".tmp")]
    return line


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A cache and a finished run on a disk with space."""
    folder = tmp_path_factory.mktemp("prepared")
    assert command(str(ROOT / "train.py"), *SMALL, "run_dir=run", cwd=folder).returncode == 0
    return folder


def commands(folder: Path) -> dict[str, list[str]]:
    """Each entry point, told to write to a folder."""
    return {
        "embed": [str(ROOT / "embed.py"), *SMALL, f"cache_dir={folder}/cache"],
        "train": [str(ROOT / "train.py"), *SMALL, "seed=1", f"run_dir={folder}/run"],
        "predict": ["-m", "ehr_embed.predict", "run=run", "data.root=cache/demo-300-0", f"output={folder}/p.parquet"],
        "tabulate": ["-m", "ehr_embed.tabulate", "run", "--output", f"{folder}/table"],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [("embed", "200k"), ("train", "24k"), ("train", "120k"), ("predict", "4k"), ("tabulate", "4k")],
)
def test_an_entry_point_on_a_full_disk(prepared, tmp_path, name, size):
    with mounted(tmp_path / "full", f"size={size}") as folder:
        (folder / "ballast").write_bytes(b"x" * 4096 if size == "4k" else b"")
        line = refused(command(*commands(folder)[name], cwd=prepared), folder)
        assert "No space left on device" in line or "only a part" in line or "disk is full" in line
        print(f"\n{line}")
        assert not list(folder.rglob("manifest.json"))
        assert not list(folder.rglob("metrics.json"))
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        done = command(*commands(folder)[name], cwd=prepared)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embed", "train", "predict", "tabulate"])
def test_an_entry_point_on_a_read_only_disk(prepared, read_only, name):
    line = refused(command(*commands(read_only)[name], cwd=prepared), read_only)
    assert "Read-only file system" in line
    print(f"\n{line}")
