"""Write a small corpus of the original tokenized pipeline."""

from __future__ import annotations

import csv
import pickle
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

TOKENS = (
    "<start>", "<end>", "<unknown>", "GENDER//F", "GENDER//M", "AGE: 45", "REGION//1", "MEDICAL//asthma", "MEDICAL//copd",
    "LAB//CRP", "5.5", "Q3", "very high", "<time_interval_1d-2d>", "DIAG_I10", "MED_aspirin", "PROC_K5", "LAB_NA",
    "MEASUREMENT//bp", "LIFESTYLE//smoker", "ETHNICITY//WHITE", "DRUG//x",
)  # fmt: skip


ID = {token: number for number, token in enumerate(TOKENS)}


START = datetime(2010, 1, 1, tzinfo=UTC)


def record(
    subject: int, timed: list[tuple[str, float]], static: tuple[str, ...] = ("<start>", "AGE: 45")
) -> dict[str, Any]:
    """A record as the original tokenizer writes it: static tokens at 0, then (token, day) and the end mark."""
    seconds = [(START + timedelta(days=day)).timestamp() for _, day in timed]
    names = [*static, *(token for token, _ in timed), "<end>"]
    times = [0] * len(static) + seconds + [seconds[-1] if seconds else 0]
    return {"subject_id": subject, "tokens": [ID[name] for name in names], "timestamps": times}


def write_corpus(root: Path, splits: dict[str, list[list[Any]]], labels: list[tuple[Any, ...]]) -> Path:
    """Write shards of records and labels (subject_id, is_case, site, cancerdate), with lookups."""
    for split, shards in splits.items():
        (root / split).mkdir(parents=True)
        for number, records in enumerate(shards):
            (root / split / f"{number}.pkl").write_bytes(pickle.dumps(records))
    for name, header, rows in (
        ("vocab", ("token", "str", "count"), [(number, token, 1) for token, number in ID.items()]),
        ("labels", ("subject_id", "is_case", "site", "cancerdate"), labels),
        ("medical", ("code", "term"), [("ASTHMA", "Asthma"), ("i10", "Hypertension"), ("BP", "Blood pressure")]),
        ("lab", ("code", "term"), [("CRP", "C-reactive protein"), ("NA", "Sodium")]),
        ("region", ("regionid", "Description"), [("1", "North East")]),
    ):
        # As spreadsheets save it, with a byte order mark.
        with open(root / f"{name}.csv", "w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    return root
