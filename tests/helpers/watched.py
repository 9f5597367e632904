"""`python tests/helpers/watched.py LOG SCRIPT ARGUMENTS`: an entry point as it is, which also tells a file how far it is.

A byte a step, written at once, so that a test knows what a process had done when it was killed.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from typing import Any

import torch

from ehr_embed.embedders.hashing import HashingEmbedder
from ehr_embed.experiment import inputs


def told(
    log: int, function: Callable[..., Any], mark: Callable[..., bytes], *, before: bool = False
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if before:
            os.write(log, mark(*args))
        result = function(*args, **kwargs)
        if not before:
            os.write(log, mark(*args))
        return result

    return call


if __name__ == "__main__":
    file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    inputs.prepare = told(file, inputs.prepare, lambda *_: b"p", before=True)
    HashingEmbedder.embed = told(file, HashingEmbedder.embed, lambda _, texts: b"t" * len(texts))  # type: ignore[method-assign]
    torch.optim.AdamW.step = told(file, torch.optim.AdamW.step, lambda *_: b"s")  # type: ignore[method-assign]
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
