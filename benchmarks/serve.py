"""Requests a second and their latency, of a server of a finished run, by the number of clients that ask at once.

    python -m benchmarks.serve --run RUN_DIR --data DIR
    python -m benchmarks.serve --run RUN_DIR --data DIR --clients 1 8 32 --seconds 20 --records 1

Each client asks again as soon as it is answered, over a connection that it keeps, for records of held_out at their last event. The
clients are threads of this process and so share the machine with the server, which is a process of its own. `cpu_ms_a_request` is
the server's own CPU time, which other programs of the machine change little (Linux only). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.common import report
from ehr_embed.sources.meds import MedsSource


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--records", type=int, default=1, help="records in a request")
    parser.add_argument("--threads", type=int, default=1, help="of the server")
    options = parser.parse_args(arguments)
    bodies, events = requests_of(options.data, options.records)
    rows = []
    with served(options.run, options.threads) as (port, pid):
        load(port, bodies, n_clients=1, seconds=min(2.0, options.seconds))  # warm-up
        for n_clients in options.clients:
            before, cpu_before = batches_of(port), cpu_seconds(pid)
            found = load(port, bodies, n_clients=n_clients, seconds=options.seconds)
            n_batches = batches_of(port) - before
            cpu_ms = 1000 * (cpu_seconds(pid) - cpu_before) / found["n_requests"]
            n_records = found["n_requests"] * options.records
            rows.append(found | {"records_per_batch": n_records / max(1, n_batches), "cpu_ms_a_request": cpu_ms})
    result = {
        "by_clients": rows,
        "records_a_request": options.records,
        "events_a_record": events,
        "server_threads": options.threads,
    }
    report("serve", result, dataset=MedsSource(root=options.data).name, device="cpu")


def requests_of(root: str, n_records: int) -> tuple[list[bytes], float]:
    """Return the bodies of requests for the records of held_out, and the mean number of events of a record."""
    source = MedsSource(root=root)
    frames = [source.read(shard).filter(split="held_out") for shard in source.shards]
    records: list[dict[str, Any]] = []
    n_events = 0
    for frame in pl.concat(frames).partition_by("subject_id", maintain_order=True):
        if frame["time"].null_count() == len(frame):
            continue
        rows = frame.select(pl.col("time").dt.strftime("%Y-%m-%dT%H:%M:%S%.6f"), "code", "numeric_value")
        records.append({"events": rows.to_dicts()})
        n_events += len(frame)
    groups = [records[start : start + n_records] for start in range(0, len(records), n_records)]
    return [json.dumps({"records": group}).encode() for group in groups], n_events / len(records)


@contextmanager
def served(run: str, threads: int) -> Iterator[tuple[int, int]]:
    """Start the server, yield its port and process id, and end it."""
    command = [sys.executable, "-m", "ehr_embed.serve", f"run={run}", "port=0", f"threads={threads}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = next(
            (found[1] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:(\d+)", line))), ""
        )
        if not port:
            raise SystemExit(f"the server of {run} did not start")
        yield int(port), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def load(port: int, bodies: Sequence[bytes], *, n_clients: int, seconds: float) -> dict[str, Any]:
    """Return requests a second and percentiles of the milliseconds to an answer, of clients that ask one after another."""
    took: list[list[float]] = [[] for _ in range(n_clients)]
    failed: list[str] = []
    begin = threading.Barrier(n_clients + 1)

    def ask(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.connect()
        begin.wait()
        until = time.perf_counter() + seconds
        for body in itertools.islice(itertools.cycle(bodies), number * 7, None):
            began = time.perf_counter()
            if began > until:
                break
            connection.request("POST", "/predict", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                failed.append(text.decode())
                break
            took[number].append(time.perf_counter() - began)
        connection.close()

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(n_clients)]
    for client in clients:
        client.start()
    begin.wait()
    began = time.perf_counter()
    for client in clients:
        client.join()
    elapsed = time.perf_counter() - began
    if failed:
        raise SystemExit(f"a request failed: {failed[0]}")
    milliseconds = np.concatenate([np.array(own) for own in took]) * 1000
    p50, p99 = np.percentile(milliseconds, [50, 99]).tolist()
    return {
        "clients": n_clients,
        "n_requests": len(milliseconds),
        "requests_per_s": len(milliseconds) / elapsed,
        "p50_ms": p50,
        "p99_ms": p99,
    }


def batches_of(port: int) -> float:
    """Return how many batches the server has computed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = re.search(r"^ehr_embed_batch_records_count (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has spent, NaN where the system does not tell it."""
    path = Path(f"/proc/{pid}/stat")
    if not path.exists():
        return float("nan")
    fields = path.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
