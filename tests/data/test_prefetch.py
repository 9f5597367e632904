"""A thread that reads the next batch changes neither batches nor random numbers, and its errors reach the caller."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from ehr_embed.core.errors import UserError
from ehr_embed.core.stopping import Stopped
from ehr_embed.data.batches import HOST, batch_loader
from ehr_embed.data.bucket_sampler import BucketSampler
from ehr_embed.data.prefetch import PrefetchedLoader
from ehr_embed.run_folder.checkpoints import Continuation, read_checkpoint
from tests.helpers.planted import planted, train, without_times  # noqa: F401 (fixtures)
from tests.helpers.stopped_runs import after_steps, terminate


class Numbers(Dataset[Any]):
    """Rows that are numbers; of the row `bad` the reading fails."""

    def __init__(self, n: int, bad: int = -1) -> None:
        self.n, self.bad, self.events = n, bad, None
        self.threads: list[str] = []
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: np.ndarray) -> list[int]:
        self.threads.append(threading.current_thread().name)
        self.read.append(int(index[0]))
        if self.bad in index:
            raise UserError(f"row {self.bad} cannot be read")
        return index.tolist()


def loader(data: Numbers, *, prefetch: bool) -> Any:
    sampler = BucketSampler(np.full(data.n, 8), batch_size=2, batch_tokens=64, shuffle=True)
    return batch_loader(data, sampler, device=HOST, data_device="host", prefetch=prefetch)  # type: ignore[arg-type]


def test_the_batches_are_the_same_and_read_one_ahead():
    plain, ahead = Numbers(20), Numbers(20)
    torch.manual_seed(0)
    expected, random = list(loader(plain, prefetch=False)), torch.get_rng_state()
    torch.manual_seed(0)
    found = loader(ahead, prefetch=True)
    assert isinstance(found, PrefetchedLoader)
    assert list(found) == expected
    assert torch.equal(torch.get_rng_state(), random)
    assert set(plain.threads) == {threading.current_thread().name}
    assert not set(ahead.threads) & set(plain.threads), "no batch was read by the thread that computes"
    batches, n = iter(loader(ahead, prefetch=True)), len(ahead.read)
    next(batches)
    deadline = time.monotonic() + 10
    while len(ahead.read) < n + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(ahead.read) == n + 2, "one batch ahead, no more"


def test_an_error_of_the_thread_comes_in_place_of_its_batch():
    order = [batch[0] for batch in loader(Numbers(20), prefetch=False)]
    batches = iter(loader(Numbers(20, bad=order[3]), prefetch=True))
    assert [next(batches)[0] for _ in range(3)] == order[:3]
    with pytest.raises(UserError, match="cannot be read"):
        next(batches)
    assert not [t for t in threading.enumerate() if t.name.startswith("next batch")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_caller_that_leaves_ends_the_thread(error):
    def leave() -> None:
        for _ in loader(Numbers(20), prefetch=True):
            raise error

    with pytest.raises(error):
        leave()
    assert not [t for t in threading.enumerate() if t.name.startswith("next batch")]


def test_a_run_that_reads_ahead_equals_one_that_does_not_also_after_a_stop(planted, tmp_path, monkeypatch):
    plain = train(planted, tmp_path / "plain", epochs=2, prefetch=False)[1]
    n_ahead = 0

    def counted(self: PrefetchedLoader) -> Any:
        nonlocal n_ahead
        n_ahead += 1
        return begin(self)

    begin = PrefetchedLoader.__iter__
    monkeypatch.setattr(PrefetchedLoader, "__iter__", counted)
    with monkeypatch.context() as patch:
        after_steps(patch, 3, terminate)
        with pytest.raises(Stopped):
            train(planted, tmp_path / "run", epochs=2, prefetch=True)
    path, checkpoint = read_checkpoint(tmp_path / "run" / "latest_checkpoint.pt")
    rows = train(planted, tmp_path / "run", epochs=2, prefetch=True, run=Continuation(path, checkpoint, False))[1]
    assert n_ahead
    assert without_times(rows) == without_times(plain)
