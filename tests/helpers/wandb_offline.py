"""Reads what really landed in an offline `.wandb` file: protobuf records in LevelDB's log framing."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

# Made at import by protobuf, where type checkers do not see it.
Record: Any = vars(wandb_internal_pb2)["Record"]
BLOCK = 32 * 1024
FILE_HEADER = 7
RECORD_HEADER = 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    config: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    name: str = ""
    run_id: str = ""
    project: str = ""
    group: str = ""
    job_type: str = ""
    host: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    kinds: set[str] = field(default_factory=set)


def payloads(data: bytes) -> Iterator[bytes]:
    """The records' bytes, their fragments joined. Blocks count from the file's start, its header included."""
    assert data[:4] == b":W&B", data[:4]
    at, parts = FILE_HEADER, bytearray()
    while at + RECORD_HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < RECORD_HEADER:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += RECORD_HEADER
        if at + length > len(data):
            return  # W&B's process is still writing it
        if kind in (FULL, FIRST):
            parts.clear()
        parts += data[at : at + length]
        at += length
        if kind in (FULL, LAST):
            yield bytes(parts)


def read_offline_run(path: Path) -> OfflineRun:
    run = OfflineRun()
    for payload in payloads(path.read_bytes()):
        record = Record()
        record.ParseFromString(payload)
        kind = record.WhichOneof("record_type")
        run.kinds.add(str(kind))
        if kind == "run":
            run.name, run.project, run.host = record.run.display_name, record.run.project, record.run.host
            run.run_id = record.run.run_id
            run.tags, run.group, run.job_type = list(record.run.tags), record.run.run_group, record.run.job_type
            merge(run.config, record.run.config.update)
        elif kind == "config":
            merge(run.config, record.config.update)
        elif kind == "history":
            run.history.append(merge({}, record.history.item))
        elif kind == "summary":
            merge(run.summary, record.summary.update)
        elif kind == "files":
            run.files += [file.path for file in record.files.files]
        elif kind == "artifact":
            artifact = record.artifact
            run.artifacts.append(
                {"name": artifact.name, "type": artifact.type, **json.loads(artifact.metadata or "{}")}
            )
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def merge(into: dict[str, Any], updates: Iterable[Any]) -> dict[str, Any]:
    """Set each update's JSON value at its key, or along its nested keys."""
    for update in updates:
        *parents, last = [update.key] if update.key else update.nested_key
        node = into
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = json.loads(update.value_json)
    return into


def offline_files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))


def read_offline_runs(run_dir: Path, timeout_s: float = 10.0) -> list[OfflineRun]:
    """W&B's own process writes the end of a file shortly after `finish` returns: read until it is there."""
    deadline = time.monotonic() + timeout_s
    while True:
        runs = [read_offline_run(path) for path in offline_files(run_dir)]
        if all(run.exit_code is not None for run in runs) or time.monotonic() > deadline:
            return runs
        time.sleep(0.05)
