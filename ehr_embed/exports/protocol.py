"""Interface of exports, which write a prepared dataset in another format, and the checks that all exports share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import torch
from torch import Tensor

from ehr_embed.core.errors import UserError
from ehr_embed.core.settings import OneOf, check_setting
from ehr_embed.embedding.prepare import Prepared
from ehr_embed.tasks.protocol import Task

DTYPES = {"float32": torch.float32, "float16": torch.float16}
Dtype = Annotated[str, OneOf(*DTYPES)]


class Export(Protocol):
    """Interface of an export, chosen by `export=NAME`."""

    def check(self) -> None:
        """Check the settings before the dataset is prepared, which may take hours.

        Raises:
            UserError: the folder to write to is not given, or is not empty.
        """
        ...

    def write(self, prepared: Prepared, task: Task, labels_dir: Path) -> None:
        """Write the export; an interruption must leave no half-written file.

        Args:
            prepared: the event store and the embedding table.
            task: the task before its `setup`; it determines the samples.
            labels_dir: folder with the label sets of the source.
        """
        ...


def export_folder(folder: str | None) -> Path:
    """Return `export.dir` after checking that it is absent or empty, since an export never overwrites a file.

    Raises:
        UserError: the folder is not given, or is not empty.
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
    """Return the floating-point type of a name.

    >>> export_dtype("float16")
    torch.float16
    """
    check_setting("export.dtype", name, Dtype)
    return DTYPES[name]


def token_strings(prepared: Prepared) -> tuple[list[int], list[str]]:
    """Return the ids and strings of all tokens including padding, in the order of vocab.csv."""
    tokens = prepared.store.vocabulary.tokens
    return tokens["token"].to_list(), tokens["str"].to_list()


def as_stored(table: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the embedding table in the type of the export.

    Raises:
        UserError: the type cannot hold a value of the table.
    """
    stored = table.to(dtype)
    if not np.isfinite(stored.numpy()).all():
        raise UserError(f"a vector does not fit into {dtype}. Type: export.dtype=float32")
    return stored
