"""Requests in flight are computed together: what waits when the model is free goes through it as one batch.

No request waits for others to come. While one batch is computed, the next requests gather; so batches grow with the
load by themselves, and a lone request is answered at once. One thread computes for all batchers of a model, another for
searches, on all cores for a lone request, and on all but one under load, since the event loop has work then too. A
request that does not fit into the queue is refused at once, and one that was given up (its client has gone, its time is
over) is taken out before it costs anything.

Price: a request that comes while a batch is computed waits for that batch.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from modeclip.errors import ModeclipError
from modeclip.serving.limits import RefusedError
from modeclip.system.devices import leave_a_core

Item = TypeVar("Item")
Result = TypeVar("Result")

SECONDS_GUESSED = 0.1
"""What a batch is taken to last before one was computed."""


@dataclass
class Counts:
    """What a batcher has done, for metrics."""

    batches: int = 0
    items: int = 0
    largest: int = 0
    seconds: float = 0.0
    refused: int = 0


@dataclass(eq=False)  # two requests may ask for the same, in arrays that have no one truth value
class _Request(Generic[Item, Result]):
    items: Sequence[Item]
    answer: asyncio.Future[list[Result]] = field(repr=False)


class Batcher(Generic[Item, Result]):
    """Collects the items of requests and computes them in batches."""

    def __init__(
        self, work: Callable[[list[Item]], Iterable[Result]], executor: Executor, *, most: int, waiting: int
    ) -> None:
        """Start without a request.

        Args:
            work: Computes a result for each item, in their order; called in the executor, one batch at a time.
            executor: Where it computes.
            most: Items in a batch; a request with more is a batch of its own.
            waiting: Items that may wait.
        """
        self.counts = Counts()
        self._work, self._executor, self._most, self._limit = work, executor, most, waiting
        self._queue: deque[_Request[Item, Result]] = deque()
        self._waiting = self._alone = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Items that wait, those of the batch that is being computed left out."""
        return self._waiting

    async def ask(self, items: Sequence[Item]) -> list[Result]:
        """Return the results of some items.

        Raises:
            RefusedError: Too many items wait, or the model cannot be loaded.
        """
        if not items:
            return []
        if self._waiting and self._waiting + len(items) > self._limit:
            self.counts.refused += 1
            seconds = self._retry_after()
            raise RefusedError(f"too many requests wait; try again in {seconds:.0f} s", 429, retry_after=seconds)
        request = _Request[Item, Result](items, asyncio.get_running_loop().create_future())
        self._queue.append(request)
        self._waiting += len(items)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            return await request.answer
        except asyncio.CancelledError:
            if request in self._queue:
                self._queue.remove(request)
                self._waiting -= len(items)
            raise

    async def _run(self) -> None:
        """Compute batches until nobody waits."""
        loop = asyncio.get_running_loop()
        while self._queue:
            batch = self._take()
            items = [item for request in batch for item in request.items]
            is_loaded = len(batch) > 1 or bool(self._queue)
            begun = time.perf_counter()
            try:
                results = await loop.run_in_executor(self._executor, self._compute, items, is_loaded)
            except Exception as error:
                if len(batch) > 1:  # the others of a batch must not suffer from one that cannot be computed
                    self._queue.extendleft(reversed(batch))
                    self._waiting += len(items)
                    self._alone = len(batch)
                elif not batch[0].answer.done():
                    batch[0].answer.set_exception(_as_refusal(error))
                continue
            self._count(len(items), time.perf_counter() - begun)
            start = 0
            for request in batch:
                end = start + len(request.items)
                if not request.answer.done():  # its client may have gone
                    request.answer.set_result(results[start:end])
                start = end

    def _compute(self, items: list[Item], is_loaded: bool) -> list[Result]:
        leave_a_core(is_loaded)
        return list(self._work(items))

    def _take(self) -> list[_Request[Item, Result]]:
        """Take requests from the queue, oldest first, until the next would not fit into the batch."""
        batch = [self._queue.popleft()]
        size = len(batch[0].items)
        self._alone = max(0, self._alone - 1)
        while self._queue and not self._alone and size + len(self._queue[0].items) <= self._most:
            batch.append(self._queue.popleft())
            size += len(batch[-1].items)
        self._waiting -= size
        return batch

    def _count(self, items: int, seconds: float) -> None:
        counts = self.counts
        counts.batches, counts.items = counts.batches + 1, counts.items + items
        counts.largest, counts.seconds = max(counts.largest, items), counts.seconds + seconds

    def _retry_after(self) -> float:
        """Return the seconds that what waits will take, by the batches so far, at least 1."""
        each = self.counts.seconds / self.counts.items if self.counts.items else SECONDS_GUESSED / self._most
        return max(1.0, each * self._waiting)


def _as_refusal(error: Exception) -> Exception:
    """Return what a client is told: what modeclip says is wrong with the model, which may be mended."""
    is_told = isinstance(error, ModeclipError) and not isinstance(error, RefusedError)
    return RefusedError(str(error), 503) if is_told else error
