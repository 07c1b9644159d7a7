"""Doing what is asked for at the same time together, without waiting for anybody.

What comes while `limit` batches are being worked on accumulates and makes the next one, so that
batches are large when the load is high and of one when it is low.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Gathers items for `work`. For one event loop.

    How many wait is bounded by the requests that the process admits (serving.guards.Gate).
    """

    def __init__(
        self,
        work: Callable[[list[T]], Awaitable[Sequence[R | Exception]]],
        *,
        most: int,
        limit: int = 1,
        size: Callable[[T], int] = lambda _: 1,
    ) -> None:
        """
        Args:
            work: one result or error per item; what it raises is everybody's.
            most: of one batch, as measured by `size`; a larger item is a batch by itself.
            limit: batches that are worked on at a time.
        """
        self._work = work
        self._most, self._limit, self._size = most, limit, size
        self._waiting: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._running: dict[asyncio.Task[None], list[asyncio.Future[R]]] = {}
        self._due = False

    async def ask(self, item: T) -> R:
        """The item's result. Whoever is cancelled while waiting is left out of the batch."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        self._waiting.append((item, future))
        if not self._due and len(self._running) < self._limit:
            self._due = True
            loop.call_soon(self._start)  # after all that this turn of the loop brings
        return await future

    def release(self, error: Exception) -> None:
        """Let go everybody who waits, also for what is being worked on."""
        for future in [f for _, f in self._waiting] + [
            f for b in self._running.values() for f in b
        ]:
            if not future.done():
                future.set_exception(error)

    async def close(self) -> None:
        """Stop working; who still waits is cancelled."""
        for task in self._running:
            task.cancel()
        for _, future in self._waiting:
            future.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _start(self) -> None:
        self._due = False
        while self._waiting and len(self._running) < self._limit:
            batch: list[tuple[T, asyncio.Future[R]]] = []
            total = 0
            while self._waiting:
                item, future = self._waiting[0]
                if not future.done():
                    total += self._size(item)
                    if batch and total > self._most:
                        break
                    batch.append((item, future))
                self._waiting.popleft()
            if batch:
                task = asyncio.get_running_loop().create_task(self._run(batch))
                self._running[task] = [future for _, future in batch]
                task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        del self._running[task]
        self._start()

    async def _run(self, batch: list[tuple[T, "asyncio.Future[R]"]]) -> None:
        try:
            results: Sequence[R | Exception] = await self._work([item for item, _ in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results of {len(batch)} items")
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        except Exception as error:
            results = [error] * len(batch)
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():  # nobody waits for it any more
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
