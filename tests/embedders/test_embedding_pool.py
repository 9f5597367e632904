"""Embedding on several devices, here processes on the CPU: the vectors of one, and what a kill and Ctrl-C leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ehr_embed.core.pretrained_weights import BUNDLED
from ehr_embed.embedders.sentence_transformer import SentenceTransformerEmbedder
from ehr_embed.embedding.vector_cache import embed_texts
from tests.helpers.many_texts import MANY, TEXTS
from tests.helpers.small_meds import ROOT

pytestmark = pytest.mark.slow  # each starts three processes that import torch
PROGRAM = """
from pathlib import Path
import sys
import numpy as np
from ehr_embed.embedding.vector_cache import embed_texts
from ehr_embed.embedders.sentence_transformer import SentenceTransformerEmbedder
from ehr_embed.core.errors import UserError
from tests.helpers.many_texts import MANY, TEXTS
if __name__ == "__main__":
    embedder = SentenceTransformerEmbedder(model="bundled", device=["cpu", "cpu"], batch_size=16)
    embedder.embed(TEXTS[:2])
    print("pool", embedder._pool, flush=True)
    np.save("few.npy", embedder.embed(TEXTS))
    print("processes", *(process.pid for process in embedder._pool["processes"]), flush=True)
    try:
        if sys.argv[1:]:
            embed_texts(embedder, MANY, cache_dir=Path("cache"))
    except UserError as error:
        raise SystemExit(str(error)) from None
    finally:
        embedder.close()
"""


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """The program and its two processes, in a group of their own, once they embed; none of them is left afterwards."""
    (folder / "main.py").write_text(PROGRAM)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    program = subprocess.Popen(
        [sys.executable, "main.py", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert said(program, "pool") == ["None"], "two texts are not worth two processes"
        yield program, [int(pid) for pid in said(program, "processes")]
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
            program.communicate()


def said(program: subprocess.Popen[str], word: str) -> list[str]:
    """Return the text that follows a word at the beginning of a line; libraries may print lines of their own."""
    assert program.stdout is not None
    for line in program.stdout:
        if line.startswith(f"{word} "):
            return line.split()[1:]
    raise AssertionError(f"the program ended before it said {word}")


def wait_until(happened, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def cached(folder: Path) -> int:
    """Bytes of the vectors that are kept so far."""
    return sum(path.stat().st_size for path in folder.glob("cache/embeddings/*"))


def test_two_devices_give_the_vectors_of_one_in_the_same_order(tmp_path):
    with started(tmp_path) as (program, pids):
        _, errors = program.communicate(timeout=120)
        assert program.returncode == 0, errors
        assert len(set(pids)) == 2
        assert not any(map(is_running, pids))
    one = SentenceTransformerEmbedder(model=BUNDLED, device="cpu").embed(TEXTS)
    np.testing.assert_allclose(np.load(tmp_path / "few.npy"), one, atol=1e-5)
    assert np.abs(one[0] - one[7]).max() > 1e-3, "another order would be seen"


def test_a_killed_process_ends_in_one_line_and_what_was_embedded_is_kept(tmp_path):
    with started(tmp_path, "many") as (program, pids):
        wait_until(lambda: cached(tmp_path) > 200_000)
        os.kill(pids[0], signal.SIGKILL)
        _, errors = program.communicate(timeout=60)
        assert program.returncode == 1
        assert "1 of 2 processes that embed on cpu, cpu ended (exit code -9" in errors
        assert "Traceback" not in errors
        assert not is_running(pids[1])
    assert cached(tmp_path) > 200_000
    one = SentenceTransformerEmbedder(model=BUNDLED, device="cpu")
    longest = sorted(MANY, key=lambda text: (len(text), text))[-3:]
    one.embed = lambda texts: pytest.fail("the longest were embedded before the kill")  # type: ignore[method-assign]
    assert embed_texts(one, longest, cache_dir=tmp_path / "cache").shape == (3, 384)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_interrupt_ends_every_process_at_once(tmp_path, is_terminal):
    with started(tmp_path, "many") as (program, pids):
        wait_until(lambda: cached(tmp_path) > 200_000)
        os.killpg(program.pid, signal.SIGINT) if is_terminal else os.kill(program.pid, signal.SIGINT)
        _, errors = program.communicate(timeout=60)
        assert program.returncode != 0
        assert errors.count("Traceback") == errors.count("KeyboardInterrupt") == 1, "the processes say nothing of it"
        wait_until(lambda: not any(map(is_running, pids)), 10)


def test_processes_do_not_outlive_a_killed_program(tmp_path):
    with started(tmp_path, "many") as (program, pids):
        wait_until(lambda: cached(tmp_path) > 200_000)
        program.kill()
        wait_until(lambda: not any(map(is_running, pids)), 10)
        program.communicate()
