"""Requests that wait for the model together."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from modeclip.serving.batching import Batcher


def test_of_two_equal_requests_the_one_that_is_given_up_leaves_the_queue() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work(items: list[np.ndarray]) -> list[float]:
        begun.set()
        go_on.wait(10)
        return [float(item.sum()) for item in items]

    async def ask() -> None:
        with ThreadPoolExecutor(1) as pool:
            batcher = Batcher(work, pool, most=8, waiting=8)
            first = asyncio.create_task(batcher.ask([np.zeros(2)]))
            await asyncio.to_thread(begun.wait, 10)
            kept, given_up = (asyncio.create_task(batcher.ask([np.ones(2)])) for _ in range(2))
            await asyncio.sleep(0)
            assert batcher.waiting == 2
            given_up.cancel()
            with suppress(asyncio.CancelledError):
                await given_up
            assert given_up.cancelled()
            assert batcher.waiting == 1
            go_on.set()
            assert await asyncio.gather(first, kept) == [[0.0], [2.0]]

    asyncio.run(ask())
