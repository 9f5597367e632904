"""What an export must offer."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ehr_embed.core.errors import UserError, unknown_name
from ehr_embed.embedding.prepare import Prepared
from ehr_embed.tasks.protocol import Task

DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Export(Protocol):
    """Writes a prepared dataset in another format."""

    def check(self) -> None:
        """Refuse what can be refused before the dataset is prepared.

        Raises:
            UserError: no folder to write to, or one that holds something.
        """
        ...

    def write(self, prepared: Prepared, task: Task, labels_dir: Path) -> None:
        """Write everything; whole files only.

        Args:
            prepared: the store and the table.
            task: before `setup`; says which samples there are.
            labels_dir: the source's label sets.
        """
        ...


def export_folder(folder: str | None) -> Path:
    """`export.dir`, checked to be absent or empty: nothing is ever written over.

    Raises:
        UserError: it is not given, or holds something.
    """
    if folder is None:
        raise UserError(
            "export.dir is not set: expected a folder to write to. Type: python embed.py export=... export.dir=DIR"
        )
    path = Path(folder).expanduser()
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise UserError(
            f"export.dir={folder} is not empty, and an export writes over nothing. Type: export.dir=ANOTHER"
        )
    return path


def export_dtype(name: str) -> torch.dtype:
    """The floating type a name stands for.

    >>> export_dtype("float16")
    torch.float16
    """
    if name not in DTYPES:
        raise unknown_name("export.dtype", name, DTYPES)
    return DTYPES[name]


def token_strings(prepared: Prepared) -> tuple[list[int], list[str]]:
    """Ids and strings of all tokens, padding included, as vocab.csv lists them."""
    tokens = prepared.store.vocabulary.tokens
    return tokens["token"].to_list(), tokens["str"].to_list()


def as_stored(table: Tensor, dtype: torch.dtype) -> Tensor:
    """The table in the export's type.

    Raises:
        UserError: a value that the type cannot hold.
    """
    stored = table.to(dtype)
    if not np.isfinite(stored.numpy()).all():
        raise UserError(f"a vector does not fit into {dtype}. Type: export.dtype=float32")
    return stored
