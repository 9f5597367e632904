"""The embedding table: row i is the vector of token i's text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ehr_embed.embedders.cache import embed_texts
from ehr_embed.embedders.protocol import Embedder
from ehr_embed.errors import UserError
from ehr_embed.files import atomic_path


def build_table(texts: list[str], *, embedder: Embedder, cache_dir: Path) -> Tensor:
    """(V, E) float32; row 0, padding, is zero and its text is not embedded."""
    vectors = embed_texts(embedder, texts[1:], cache_dir=cache_dir)
    return torch.from_numpy(np.concatenate([np.zeros((1, vectors.shape[1]), np.float32), vectors]))


def save_table(path: Path, table: Tensor, about: dict[str, str]) -> None:
    """Write the table as float16 safetensors with `about` as its metadata."""
    with atomic_path(path) as temporary:
        save_file({"embeddings": table.half()}, temporary, metadata=about)


def load_table(path: Path, *, expected: dict[str, str]) -> tuple[Tensor, dict[str, str]]:
    """The table as float32, and its metadata.

    Raises:
        UserError: the file is damaged, or was made from other texts or by another embedder than `expected` says.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about, table = file.metadata(), file.get_tensor("embeddings").float()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable table ({error}). Type: python embed.py overwrite=true") from error
    for key, value in expected.items():
        if about.get(key) != value:
            raise UserError(
                f"{path}: {key} is {about.get(key)}, expected {value}; vectors would belong to other texts. "
                "Type: python embed.py overwrite=true with the same overrides"
            )
    return table, about
