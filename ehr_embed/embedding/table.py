"""Build, write and read the embedding table, whose row i is the vector of token i's text."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.core.files import atomic_path
from ehr_embed.core.manifest import REBUILD
from ehr_embed.embedders.protocol import Embedder
from ehr_embed.embedding.vector_cache import embed_texts

log = logging.getLogger(__name__)
LARGEST = torch.finfo(torch.float16).max
SMALLEST = torch.finfo(torch.float16).smallest_normal
"""Smallest number that float16 represents in full precision."""


def build_table(texts: list[str], *, embedder: Embedder, cache_dir: Path) -> Tensor:
    """Return the table (V, E) float32 of V texts; row 0, padding, is zero, and its text is not embedded."""
    vectors = embed_texts(embedder, texts[1:], cache_dir=cache_dir)
    return torch.from_numpy(np.concatenate([np.zeros((1, vectors.shape[1]), np.float32), vectors]))


def save_table(path: Path, table: Tensor, about: dict[str, str]) -> None:
    """Write the table as safetensors, in float16 if that suffices; its metadata are `about` and a sha256."""
    vectors = as_stored(table).contiguous()
    if vectors.dtype != torch.float16:
        log.warning(
            "%s: vectors up to %.3g do not fit float16 (%.0e to %.0f), so the table is kept in float32 and takes twice the space. "
            "Models bring vectors to unit variance anyway: let the embedder scale them to a norm of 1",
            path,
            float(table.abs().max()),
            SMALLEST,
            LARGEST,
        )
    with atomic_path(path) as temporary:
        save_file({"embeddings": vectors}, temporary, metadata=about | {"sha256": _sha256(vectors, about)})


def as_stored(vectors: Tensor) -> Tensor:
    """Return vectors as they are stored on disk: in float16, or in float32 if float16 cannot represent them.

    That is the case if a number would become infinite, or if all numbers are so small that they would lose digits.

    >>> as_stored(torch.tensor([1.0])).dtype, as_stored(torch.tensor([1e5])).dtype, as_stored(torch.tensor([1e-6])).dtype
    (torch.float16, torch.float32, torch.float32)
    """
    largest = float(vectors.abs().max()) if vectors.numel() else 0.0
    fits = largest == 0 or SMALLEST <= largest <= LARGEST
    return vectors.half() if fits else vectors.float()


def load_table(path: Path, *, expected: dict[str, str]) -> tuple[Tensor, dict[str, str]]:
    """Return the table (V, E) as float32, and its metadata.

    Raises:
        UserError: the file is damaged, or its metadata differ from `expected`: it belongs to other texts or another
            embedder.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about, vectors = file.metadata() or {}, file.get_tensor("embeddings")
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path}: not a readable table ({error}). {REBUILD}") from error
    said = about.pop("sha256", None)
    for key, value in expected.items():
        if about.get(key) != value:
            raise UserError(
                f"{path}: {key} is {about.get(key)}, expected {value}; vectors would belong to other texts. {REBUILD}"
            )
    if said != (found := _sha256(vectors, about)):
        wanted = f"its header says {said[:12]}" if said else "and its header none, as earlier versions wrote it"
        raise UserError(
            f"{path} was changed: its vectors have sha256 {found[:12]}, {wanted}. Damaged vectors would train a damaged model, so "
            f"none was loaded. {REBUILD}"
        )
    return vectors.float(), about


def _sha256(vectors: Tensor, about: dict[str, str]) -> str:
    """Return the SHA-256 of the vectors' bytes, shape and dtype, and of the metadata."""
    facts = json.dumps([about, list(vectors.shape), str(vectors.dtype)], sort_keys=True)
    total = hashlib.sha256(facts.encode())
    total.update(vectors.contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()
