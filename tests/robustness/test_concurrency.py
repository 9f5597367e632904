"""Processes that build the same store or cache at once share the work, and take over from one that was killed."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from filelock import FileLock

from tests.helpers.small_meds import ROOT
from tests.helpers.watched_runs import Watched, cached, many_texts  # noqa: F401 (a fixture)

N_PROCESSES = 3
EMBED = """
import logging, sys, time
from pathlib import Path
from ehr_embed.embedding.vector_cache import embed_texts
from ehr_embed.embedders.hashing import HashingEmbedder
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s")
class Slow(HashingEmbedder):
    def embed(self, texts):
        print("embedded", len(texts), flush=True)
        while not (folder / "go").exists():
            time.sleep(0.01)
        return super().embed(texts)
folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
texts = [f"finding number {number}" for number in range(first, last)]
vectors = embed_texts(Slow(embedding_dim=16, batch_size=5), texts, cache_dir=folder)
print("sum", float(abs(vectors).sum()), flush=True)
"""


class Embedding:
    """A process that embeds some texts into a cache; its first batch waits for `go`, however slow other processes start."""

    def __init__(self, folder: Path, first: int = 0, last: int = 200) -> None:
        self.output = folder / f"output-{len(list(folder.glob('output-*')))}"
        command = [sys.executable, "-c", EMBED, str(folder), str(first), str(last)]
        with open(self.output, "wb") as file:
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def said(self) -> str:
        return self.output.read_text()

    def n_embedded(self) -> int:
        return sum(map(int, re.findall(r"embedded (\d+)", self.said())))

    def wait_until_said(self, text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def total(self) -> str:
        assert self.process.wait(timeout=120) == 0, self.said()
        return self.said().rpartition("sum ")[2].strip()


def n_vectors(folder: Path) -> int:
    with closing(sqlite3.connect(lock_of(folder).with_suffix(".sqlite"))) as database:
        return int(database.execute("SELECT count(*) FROM vectors").fetchone()[0])


def lock_of(folder: Path) -> Path:
    deadline = time.monotonic() + 120
    while not (found := list(folder.glob("embeddings/*.sqlite"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found[0].with_suffix(".lock")


def test_processes_embed_every_text_once(tmp_path):
    """Overlapping texts: 0-199, 50-249 and 100-299, which are 300 in all."""
    first = Embedding(tmp_path, 0, 200)
    first.wait_until_said("embedded")
    others = [Embedding(tmp_path, start, start + 200) for start in (50, 100)]
    for process in others:
        process.wait_until_said("waiting for another process that is embedding texts")
    (tmp_path / "go").touch()
    processes = [first, *others]
    for process in processes:
        process.total()
    assert first.n_embedded() == 200
    assert sum(process.n_embedded() for process in processes) == n_vectors(tmp_path) == 300


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    holder = Embedding(tmp_path)
    holder.wait_until_said("embedded")
    waiting = Embedding(tmp_path)
    waiting.wait_until_said("waiting for another process that is embedding texts")
    holder.process.send_signal(signal.SIGKILL)
    holder.process.wait()
    (tmp_path / "go").touch()
    killed = time.monotonic()
    total = waiting.total()
    assert lock_of(tmp_path).exists(), "the file stays, and holds nothing"
    print(f"\ntaken over and finished {time.monotonic() - killed:.2f} s after the kill")
    n_embedded = holder.n_embedded() + waiting.n_embedded()
    assert 200 <= n_embedded <= 200 + 5, "at most the batch at hand is embedded again"
    assert Embedding(tmp_path).total() == total
    assert n_vectors(tmp_path) == 200


def test_a_process_that_misses_nothing_does_not_wait(tmp_path):
    (tmp_path / "go").touch()
    Embedding(tmp_path).total()
    with FileLock(lock_of(tmp_path)):
        again = Embedding(tmp_path, 10, 90)
        again.total()
    assert again.n_embedded() == 0


def started(tmp_path: Path, lock: Path, *commands: tuple[str, ...]) -> list[Watched]:
    """Processes that all wait for a lock, which is then let go."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        processes = [Watched(*command, cwd=tmp_path) for command in commands]
        for process in processes:
            process.wait_for(lambda process=process: "waiting for another process" in process.said())
            assert "waiting for another process" in process.said(), process.said()
    return processes


def embed_command(root: Path, *overrides: str) -> tuple[str, ...]:
    return ("embed.py", "data=meds", f"data.root={root}", "data.min_count=1", "embedder=hashing", *overrides)


@pytest.mark.slow
def test_one_of_many_builds_the_store(many_texts, tmp_path, capsys):
    command = embed_command(many_texts, "embedder.batch_size=64")
    Watched(*command, "cache_dir=first", cwd=tmp_path).finish()
    (folder,) = (tmp_path / "first" / "stores").glob("*.lock")
    processes = started(tmp_path, tmp_path / "cache" / "stores" / folder.name, *[command] * N_PROCESSES)
    outputs = [process.finish() for process in processes]
    n_built = sum("building the event store" in output for output in outputs)
    n_texts = [process.count("t") for process in processes]
    tables = {re.findall(r"digest (\w+)", output)[0] for output in outputs}
    with capsys.disabled():
        print(f"\none store: {N_PROCESSES} processes, {n_built} built it, texts embedded by each {sorted(n_texts)}")
    assert n_built == len(tables) == 1
    assert sorted(n_texts) == [0] * (N_PROCESSES - 1) + [cached(tmp_path)]


@pytest.mark.slow
def test_stores_of_their_own_share_one_cache(many_texts, tmp_path, capsys):
    commands = [embed_command(many_texts, "embedder.batch_size=8", f"data.n_bins={n}") for n in (5, 6, 7)]
    processes = [Watched(*command, cwd=tmp_path) for command in commands]
    for process in processes:
        process.finish()
    n_texts = [process.count("t") for process in processes]
    with capsys.disabled():
        print(
            f"\none cache: {len(commands)} stores, texts embedded by each process {n_texts}, {cached(tmp_path)} distinct"
        )
    assert sum(n_texts) == cached(tmp_path)
    assert len(list(tmp_path.glob("cache/stores/*/*.safetensors"))) == len(commands)


@pytest.mark.slow
def test_a_killed_builder_is_replaced(many_texts, tmp_path, capsys):
    command = embed_command(many_texts, "embedder.batch_size=1")
    holder = Watched(*command, cwd=tmp_path)
    holder.wait_for(lambda: holder.count("t") > 100)
    os.killpg(holder.process.pid, signal.SIGSTOP)  # so that it is still at work when the other one has started
    waiting = Watched(*command, cwd=tmp_path)
    waiting.wait_for(lambda: "waiting for another process" in waiting.said())
    assert holder.kill(), "it had ended before the kill"
    waiting.finish()
    total = holder.count("t") + waiting.count("t")
    with capsys.disabled():
        print(
            f"\nkilled after {holder.count('t')} texts; the waiting process embedded {waiting.count('t')}, {total} in all for "
            f"{cached(tmp_path)} distinct"
        )
    assert cached(tmp_path) <= total <= cached(tmp_path) + 1
    assert "building the event store" not in waiting.said(), "the store that was whole is taken over"
