"""Micro-batches: requests that arrive while the model computes are computed together next.

One thread computes. No request waits for others unless `max_wait_s` says so: the requests that have gathered when the
thread is free form the next batch, so that batches grow with the load and a lone request is answered at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from ehr_embed.core.errors import UserError

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFullError(Exception):
    """The queue is full: one more item would wait too long."""


@dataclass
class _Job(Generic[Item, Result]):
    items: Sequence[Item]
    future: asyncio.Future[list[Result]]
    waits: bool = True


class MicroBatches(Generic[Item, Result]):
    """A queue of items, and the thread that works on them in batches.

    Args:
        work: returns one result per item, in order; called in one thread, never twice at a time.
        max_batch: largest number of items of a batch; the items of one caller stay together, even if they are more.
        max_queued: largest number of items that wait.
        max_wait_s: seconds for which a batch waits for further items.
        tell: is told the number of items of each batch.

    Attributes:
        n_queued: number of items that wait.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], list[Result]],
        *,
        max_batch: int,
        max_queued: int,
        max_wait_s: float = 0.0,
        tell: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._work, self._tell = work, tell
        self.max_batch, self.max_queued, self.max_wait_s = max_batch, max_queued, max_wait_s
        self.n_queued = 0
        self._queue: asyncio.Queue[_Job[Item, Result] | None] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work; called in a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def is_working(self) -> bool:
        """Return whether items are being worked on as they come."""
        return self._task is not None and not self._task.done()

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Return the results of items. If the caller is cancelled before its batch begins, its items are dropped.

        Raises:
            QueueFullError: too many items wait.
            Exception: what the work raised for these items alone.
        """
        if not self.is_working or self.n_queued + len(items) > self.max_queued:
            raise QueueFullError
        job = _Job[Item, Result](items, asyncio.get_running_loop().create_future())
        self.n_queued += len(items)
        self._queue.put_nowait(job)
        try:
            return await job.future
        finally:
            self._count_out(job)

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function between two batches, in the thread that computes them, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *arguments))

    async def close(self) -> None:
        """Work on the items that wait, and end."""
        if self._task is not None:
            self._queue.put_nowait(None)
            await self._task
        self._thread.shutdown(wait=True)

    async def _run(self) -> None:
        is_open = True
        while is_open:
            jobs, is_open = await self._next()
            wanted = [job for job in jobs if not job.future.done()]  # a caller that gave up is done
            if wanted:
                await self._compute(wanted)

    async def _next(self) -> tuple[list[_Job[Item, Result]], bool]:
        """Return the jobs of the next batch, and whether more may come."""
        jobs: list[_Job[Item, Result]] = []
        n, until = 0, None
        while n < self.max_batch:
            try:
                if not jobs:
                    job = await self._queue.get()
                    until = asyncio.get_running_loop().time() + self.max_wait_s
                elif self._queue.qsize():
                    job = self._queue.get_nowait()
                else:
                    assert until is not None
                    async with asyncio.timeout_at(until):
                        job = await self._queue.get()
            except TimeoutError:
                break
            if job is None:
                return jobs, False
            self._count_out(job)
            if not job.future.done():
                jobs.append(job)
                n += len(job.items)
        return jobs, True

    def _count_out(self, job: _Job[Item, Result]) -> None:
        if job.waits:
            job.waits = False
            self.n_queued -= len(job.items)

    async def _compute(self, jobs: list[_Job[Item, Result]]) -> None:
        items = [item for job in jobs for item in job.items]
        self._tell(len(items))
        try:
            results = await self.call(self._work, items)
        except Exception as error:
            if len(jobs) == 1:
                _fail(jobs[0], error)
                return
            for job in jobs:  # one of them is the reason: the others get their results
                await self._compute([job])
            return
        start = 0
        for job in jobs:
            if not job.future.done():
                job.future.set_result(results[start : start + len(job.items)])
            start += len(job.items)


def _fail(job: _Job[Any, Any], error: Exception) -> None:
    if not isinstance(error, UserError):
        log.error("a batch of %d records failed with %s", len(job.items), type(error).__name__)
    if not job.future.done():
        job.future.set_exception(error)
