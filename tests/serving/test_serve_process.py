"""The server as a process: asked to end in the middle of a request, killed there, and left by its clients."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from benchmarks import serve as benchmark
from ehr_embed.experiment.run import run
from tests.helpers.configs import composed
from tests.helpers.small_ensemble import SMALL
from tests.helpers.small_meds import ROOT

pytestmark = pytest.mark.slow
RECORD = {"events": [{"time": f"2020-01-{day:02}", "code": "A", "description": "fever"} for day in range(1, 20)]}
SLOW = {"records": [RECORD] * 8, "attributions": True}
LONG = ("n_steps=512", "max_steps=512", "timeout_s=120", "shutdown_s=120")
"""An explanation with this number of points takes a second or more."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("process")
    run(composed(*SMALL, f"cache_dir={place / 'cache'}", f"run_dir={place / 'run'}"))
    return (
        place / "run" / "members" / "pooled-0"
    )  # whose attributions are by gradients, at as many points as are asked for


@contextmanager
def served(folder: Path, *overrides: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "ehr_embed.serve", f"run={folder}", f"port={port}", "threads=1", *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                yield process, int(found[1])
                break
        else:
            pytest.fail("the server ended before it served: " + "".join(lines))
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def post(port: int, body: object, timeout: float = 60) -> tuple[int, dict]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)) as connection:
        connection.request("POST", "/predict", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_request_that_was_begun_is_answered_before_the_server_ends(folder):
    before, answers = files(folder), []
    with served(folder, *LONG) as (process, port):
        asking = threading.Thread(target=lambda: answers.append(post(port, SLOW)))
        asking.start()
        wait_until_begun(port)
        process.send_signal(signal.SIGTERM)
        asking.join(60)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        with pytest.raises(OSError, match=r"."):
            post(port, RECORD)
    ((status, found),) = answers
    assert status == 200
    assert len(found["predictions"]) == 8
    assert "Traceback" not in output
    assert files(folder) == before, "a server writes nothing"


def test_killed_in_mid_request_it_leaves_nothing_and_serves_again(folder):
    before, broken = files(folder), []

    def ask(port: int) -> None:
        try:
            post(port, SLOW)
        except (OSError, http.client.HTTPException) as error:
            broken.append(error)

    with served(folder, *LONG) as (process, port):
        asking = threading.Thread(target=ask, args=(port,))
        asking.start()
        wait_until_begun(port)
        process.kill()
        asking.join(30)
    assert len(broken) == 1
    assert files(folder) == before
    with served(folder, port=port) as (_, again):
        assert again == port
        assert post(again, RECORD)[0] == 200


def test_clients_that_leave_or_dawdle_take_nothing_from_others(folder):
    with served(folder, "timeout_s=2", "max_body_mib=1") as (process, port):
        head = b"POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n"
        dawdling = socket.create_connection(("127.0.0.1", port))
        dawdling.sendall(head + b"{")
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as leaving:
                leaving.sendall(head + b'{"events"')
        with socket.create_connection(("127.0.0.1", port)) as garbage:
            garbage.sendall(os.urandom(500) + b"\r\n\r\n")
        assert post(port, RECORD)[0] == 200
        dawdling.settimeout(20)
        assert b" 504 " in dawdling.recv(4096)
        dawdling.close()
        status, found = post(port, {"events": [{"code": "x" * 2_000_000}]})
        assert (status, "max_body_mib" in found["error"]) == (413, True)
        assert post(port, RECORD)[0] == 200
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in output


def wait_until_begun(port: int) -> None:
    """Return once a batch of the slow request was computed, so that its attributions are."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
            connection.request("GET", "/metrics")
            if b"ehr_embed_batch_records_count 1.0" in connection.getresponse().read():
                return
        time.sleep(0.02)
    pytest.fail("the request was not begun")


def test_the_benchmark_measures_a_server(folder, capsys):
    root = next((folder.parents[2] / "cache").glob("demo-160-*"))
    benchmark.main(["--run", str(folder), "--data", str(root), "--clients", "1", "3", "--seconds", "0.5"])
    (found,) = (json.loads(text) for text in capsys.readouterr().out.splitlines() if text.startswith("{"))
    assert [row["clients"] for row in found["by_clients"]] == [1, 3]
    for row in found["by_clients"]:
        assert row["requests_per_s"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["cpu_ms_a_request"] > 0
    assert found["by_clients"][0]["records_per_batch"] == pytest.approx(1)
