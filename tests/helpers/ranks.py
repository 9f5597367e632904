"""Start the processes of a run in a fraction of a second."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import get_context

import pytest

from ehr_embed.training import processes


@pytest.fixture(scope="module")
def quick_ranks() -> Iterator[None]:
    """`run_ranks` forks its processes from one that has imported the package once, where a run starts Python anew for each."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["ehr_embed.experiment.run", "tests.helpers.planted"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # as in `run_ranks`: torch reads it when it is loaded
        patch.setattr(processes, "get_context", lambda method: context)
        yield
