"""Processes that tell how far they are, so that a test can kill them at a known place."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.helpers.overrides import last_of_each
from tests.helpers.small_meds import ROOT, Event, write_meds

WATCHED = str(ROOT / "tests" / "helpers" / "watched.py")


class Watched:
    """A process of an entry point and what it said of itself."""

    def __init__(self, script: str, *arguments: str, cwd: Path) -> None:
        self.log = cwd / f"watched-{len(list(cwd.glob('watched-*')))}"
        self.log.touch()
        self.output = open(self.log.with_suffix(".out"), "w+b")  # noqa: SIM115 (read when it has ended)
        command = [sys.executable, WATCHED, str(self.log), str(ROOT / script), *last_of_each(arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def count(self, mark: str) -> int:
        return self.log.read_bytes().count(mark.encode())

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read().decode(errors="replace")

    def wait_for(self, is_there: Callable[[], bool], seconds: float = 120) -> None:
        """Until something is there or the process has ended."""
        deadline = time.monotonic() + seconds
        while not is_there() and self.process.poll() is None:
            assert time.monotonic() < deadline, f"waited in vain: {self.said()}"
            time.sleep(0.002)

    def kill(self) -> bool:
        """Kill the process and all it started; False if it had ended by itself."""
        was_alive = self.process.poll() is None
        if was_alive:
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        assert was_alive or code == 0, self.said()
        return was_alive

    def finish(self, *, seconds: float = 300) -> str:
        assert self.process.wait(timeout=seconds) == 0, self.said()
        return self.said()


@pytest.fixture
def many_texts(tmp_path) -> Path:
    """3,000 codes with a text each, in events of many subjects."""
    rng = random.Random(0)
    codes = [(f"C//{i}", f"Finding number {i} of the left or right side", None) for i in range(3000)]
    splits: dict[str, list[Event]] = {}
    for number, split in enumerate(("train", "tuning", "held_out")):
        subjects = range(10_000 * number, 10_000 * number + (3000 if split == "train" else 500))
        splits[split] = [
            (subject, float(day), codes[(subject + 50 * day) % 3000 if day < 3 else rng.randrange(3000)][0], None)
            for subject in subjects
            for day in range(20)
        ]
    labels = {
        "any": [
            (subject, 99.0, subject % 2 == 0)
            for number in range(3)
            for subject in (10_000 * number, 10_000 * number + 1)
        ]
    }
    return write_meds(tmp_path / "set", splits, codes=codes, labels=labels)


def cached(tmp_path: Path) -> int:
    """Vectors in the cache."""
    total = 0
    for path in tmp_path.glob("cache/embeddings/*.sqlite"):
        with closing(sqlite3.connect(path)) as database:
            tables = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'vectors'").fetchall()
            total += database.execute("SELECT count(*) FROM vectors").fetchone()[0] if tables else 0
    return total
