"""The vectors of a batch's events, in the two forms in which a model may be given them.

`EventEmbedding.inputs` gives `rows` (R, E), the distinct vectors, and `row_ids` (B, T), the row of each event, so that a model may
project each vector once. Whoever calls a model by hand may give `embeddings` (B, T, E) instead, one vector per event.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ehr_embed.core.errors import UserError

LEFT_OUT = ("embeddings", "places", "sequence_starts", "values", "segments", "event_index")
"""Inputs of a model that are not always there."""


def event_vectors(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the vector of each event, (B, T, E), from either form.

    Raises:
        UserError: `inputs` has neither.

    >>> rows, row_ids = torch.eye(2), torch.tensor([[1, 0, 1]])
    >>> vectors = event_vectors({"rows": rows, "row_ids": row_ids})
    >>> vectors.tolist(), torch.equal(vectors, event_vectors({"embeddings": vectors}))
    ([[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]], True)
    """
    if "rows" in inputs:
        return F.embedding(inputs["row_ids"], inputs["rows"])
    if "embeddings" in inputs:
        return inputs["embeddings"]
    raise UserError(
        "the inputs of the model hold no event vectors: expected rows (R, E) with row_ids (B, T), or embeddings (B, T, E); they "
        f"have {', '.join(inputs) or 'nothing'}. Give one of the two."
    )


def as_rows(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with `rows` and `row_ids` in place of `embeddings`, each event with a row of its own; gradients pass.

    >>> given = as_rows({"embeddings": torch.eye(2)[None]})
    >>> sorted(given), given["row_ids"].tolist()
    (['row_ids', 'rows'], [[0, 1]])
    """
    rest = {name: x for name, x in inputs.items() if name != "embeddings"}
    vectors_BTE = inputs["embeddings"]
    ids = torch.arange(vectors_BTE.shape[0] * vectors_BTE.shape[1], device=vectors_BTE.device)
    return rest | {"rows": vectors_BTE.flatten(0, 1), "row_ids": ids.view(vectors_BTE.shape[:2])}


@contextmanager
def named_inputs(model: str) -> Iterator[None]:
    """Let a model that reads an input which is not there end in what to type, in place of a KeyError.

    Args:
        model: name of the model's class.

    Raises:
        UserError: an input of `LEFT_OUT` was read and is missing.

    >>> with named_inputs("Bag"):
    ...     {"rows": 1}["embeddings"]
    Traceback (most recent call last):
    ...
    ehr_embed.core.errors.UserError: Bag reads inputs["embeddings"], which is not there: ...
    """
    try:
        yield
    except KeyError as error:
        if not (error.args and error.args[0] in LEFT_OUT):
            raise
        name = error.args[0]
        remedy = (
            "models are given the distinct vectors as rows and row_ids. Read the vector of each event by "
            "ehr_embed.api.event_vectors(inputs), which takes both forms"
            if name == "embeddings"
            else f'a model is given it only sometimes. Ask first: if "{name}" in inputs'
        )
        raise UserError(f'{model} reads inputs["{name}"], which is not there: {remedy} (docs/extending.md).') from error
