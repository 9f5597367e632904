"""A small vocabulary of codes, and batches of token ids, times and values built from records."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from hypothesis import strategies as st
from meds import birth_code
from torch import Tensor

from ehr_embed.data.vocabulary import Vocabulary, VocabularySettings

CODES = ("A", "B", "C", "D", birth_code)


NAN = float("nan")


def vocabulary(codes=CODES, *, bins: dict[str, list[float]] | None = None) -> Vocabulary:
    """Token i + 2 is code i; bins follow the plain tokens."""
    bins, strings, rows = bins or {}, ["<padding>", "<unknown>", *codes], []
    for number, code in enumerate(codes):
        edges = bins.get(code, [])
        rows.append((code, number + 2, len(strings) if edges else -1, edges))
        strings += [f"{code}//bin_{i + 1}" for i in range(len(edges) + 1)] if edges else []
    schema = {"code": pl.String, "plain_token": pl.Int32, "bin_token": pl.Int32, "edges": pl.List(pl.Float32)}
    frame = pl.DataFrame(rows, schema=schema, orient="row").with_columns(loc=pl.lit(0.0), scale=pl.lit(1.0))
    tokens = pl.DataFrame({"token": np.arange(len(strings)), "str": strings, "text": strings, "count": 0})
    return Vocabulary(VocabularySettings(), tokens, frame, {})


def batch(records: list[list[tuple[int, float, float]]], width: int | None = None) -> dict[str, Tensor]:
    """Inputs of records of (token, days, value)."""
    width = width or max(map(len, records))
    padded = [record + [(0, 0.0, NAN)] * (width - len(record)) for record in records]
    token_ids, days, values = (torch.tensor([[event[i] for event in row] for row in padded]) for i in range(3))
    mask = torch.arange(width) < torch.tensor([len(record) for record in records])[:, None]
    return {"token_ids": token_ids.int(), "days": days.float(), "values": values.float(), "padding_mask": mask}


number = st.floats(-10, 10, width=32)


event = st.tuples(st.integers(1, 6), st.floats(0, 30_000, width=32), number | st.just(NAN))
