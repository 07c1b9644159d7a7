"""Features for the transformer: users read with a deadline, the trend snapshot kept fresh.

The feature store blocks and may be down, slow or wrong; nothing here waits longer than its
deadline, and the event loop never waits at all.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from model.errors import InputError, UnavailableError
from model.query import Event
from model.trends import TrendSnapshot
from serving import metrics
from serving.batching import Batcher
from serving.guards import Breaker
from serving.ranking import Trend
from serving.settings import ServeSettings

log = logging.getLogger("hrnn.serving")

MOST_TOGETHER = 64  # users in one read
READS_AT_ONCE = 2  # so that one that is slow does not hold up the next


class _FullError(UnavailableError):
    """Every thread is stuck in the store."""


class _OpenError(UnavailableError):
    """The store did not answer others."""


class _RowError(UnavailableError):
    """The store answers, but what it holds of this user cannot be read."""


class UserFeatures(Protocol):
    """What a feature store knows of a user; see feature_repo.store."""

    @property
    def known(self) -> bool: ...
    @property
    def profile(self) -> dict[str, Any]: ...
    @property
    def history(self) -> Sequence[Event]: ...


class Reader(Protocol):
    """feature_repo.store.FeatureReader as used here; what blocks is thread-safe."""

    @property
    def asynchronous(self) -> bool: ...
    def users(self, user_ids: Sequence[str]) -> Sequence[UserFeatures | UnavailableError]: ...
    async def read_users(
        self, user_ids: Sequence[str]
    ) -> Sequence[UserFeatures | UnavailableError]: ...
    async def close(self) -> None: ...
    def trend(self) -> TrendSnapshot | None: ...
    def trend_lag(self) -> tuple[int, int]: ...


class Features:
    """User reads and the current trend.

    The last good snapshot stays in use, labelled stale after a while; before the first one the
    model's own serves as a stale one. `open_reader` is tried again while it fails, so that a
    store that comes up later is used.
    """

    def __init__(
        self,
        open_reader: Callable[[], Reader],
        settings: ServeSettings,
        spare_trend: Callable[[float], Awaitable[TrendSnapshot]],
    ) -> None:
        """
        Args:
            spare_trend: asked, with seconds to answer, while no snapshot was ever read.
        """
        self._open_reader = open_reader
        self._settings = settings
        self._spare_trend = spare_trend
        self._reader: Reader | None = None
        self._users = ThreadPoolExecutor(settings.feature_threads, "features")
        # A thread of its own: reads of users that hang must not stop the trend.
        self._trends = ThreadPoolExecutor(1, "trend")
        self._busy = 0  # threads
        self._reads: Batcher[str, UserFeatures] = Batcher(
            self._read, most=MOST_TOGETHER, limit=READS_AT_ONCE
        )
        self._breaker = Breaker("features", settings.breaker_failures, settings.breaker_seconds)
        self._trend: Trend | None = None
        self._snapshot: TrendSnapshot | None = None
        self._trend_read_at = float("-inf")  # monotonic seconds
        self._trend_behind = False
        self._healthy = True
        self._refreshing: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """Connect and read the trend before serving; a store that is down is not an error."""
        try:
            self._refresh()
        except InputError:
            raise
        except Exception as error:
            self._trend_failed("error", error)

    async def open(self) -> None:
        """Keep the trend fresh from now on."""
        self._refreshing = asyncio.create_task(self._refresh_forever())

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._refreshing
        await self._reads.close()
        if self._reader is not None:
            await self._reader.close()
        for executor in (self._users, self._trends):
            executor.shutdown(wait=False, cancel_futures=True)

    def trend(self) -> tuple[Trend, str | None]:
        """The snapshot to use for one answer, and what is wrong with it if anything."""
        if self._trend is None:
            return Trend.uniform(), "trend_unavailable"
        age = time.monotonic() - self._trend_read_at
        stale = self._trend_behind or age > self._settings.trend_stale_seconds
        return self._trend, "trend_stale" if stale else None

    async def user(self, user_id: str) -> UserFeatures:
        """Profile and history of one user.

        Raises:
            UnavailableError: the store failed, or did not answer within the deadline, or did so
                often just now; or this user's row cannot be read.
        """
        if self._reader is None:
            metrics.FEATURE_ERRORS.labels("user", "error").inc()
            raise UnavailableError("the feature store is not connected")
        if not self._breaker.allows():
            metrics.FEATURE_ERRORS.labels("user", "open_circuit").inc()
            raise _open()
        try:
            async with asyncio.timeout(self._settings.feature_deadline_seconds):
                return await self._reads.ask(user_id)
        except TimeoutError:
            kind, failure = "deadline", UnavailableError("the feature store missed its deadline")
            # Each that waited in vain counts, in a read or for one; and once it is clear that the
            # store hangs, nobody waits on.
            self._breaker.failed()
            if self._breaker.open:
                self._reads.release(_open())
        except _OpenError as error:
            kind, failure = "open_circuit", error
        except _FullError as error:
            kind, failure = "full", error
        except _RowError as error:
            kind, failure = "bad_row", error
        except Exception as error:
            name = type(error).__name__
            kind, failure = "error", UnavailableError(f"the feature store failed: {name}")
            failure.__cause__ = error
        finally:
            # What the read taught is told once, by `_read`; who did not wait for it was no trial.
            self._breaker.gave_up()
        metrics.FEATURE_ERRORS.labels("user", kind).inc()
        raise failure

    async def _read(self, user_ids: list[str]) -> list[UserFeatures | Exception]:
        """Users that were asked for at the same time, by one read: one result of the breaker's, but
        for a read that hangs (see `user`).
        """
        try:
            found = await self._read_distinct(list(dict.fromkeys(user_ids)))
        except TimeoutError:
            raise  # those who asked count it
        except Exception:
            self._breaker.failed()
            raise
        self._breaker.succeeded()
        return [found[user_id] for user_id in user_ids]

    async def _read_distinct(self, user_ids: list[str]) -> dict[str, UserFeatures | Exception]:
        reader = self._reader
        assert reader is not None  # noqa: S101 - it stays once it is there
        # No longer than the first of the callers waits: what hangs must not hold up the next.
        async with asyncio.timeout(self._settings.feature_deadline_seconds):
            if reader.asynchronous:
                found = await reader.read_users(user_ids)
            else:
                found = await self._in_thread(reader, user_ids)
        return {
            user_id: _RowError(str(one)) if isinstance(one, UnavailableError) else one
            for user_id, one in zip(user_ids, found, strict=True)
        }

    async def _in_thread(
        self, reader: Reader, user_ids: list[str]
    ) -> Sequence[UserFeatures | UnavailableError]:
        if self._busy >= self._settings.feature_threads:
            raise _FullError("all threads wait for the feature store")
        future = self._users.submit(reader.users, user_ids)
        self._busy += 1
        loop = asyncio.get_running_loop()
        # Counted until the thread is free, not until the caller has given up.
        future.add_done_callback(lambda _: _call_soon(loop, self._thread_is_free))
        return await asyncio.wrap_future(future)

    def _thread_is_free(self) -> None:
        self._busy -= 1

    async def _refresh_forever(self) -> None:
        loop = asyncio.get_running_loop()
        reading: asyncio.Future[None] | None = None
        while True:
            if self._trend is None:
                await self._borrow()
            await asyncio.sleep(self._settings.trend_refresh_seconds)
            if reading is not None and not reading.done():
                metrics.FEATURE_ERRORS.labels("trend", "deadline").inc()
                continue  # still stuck in the one before
            reading = loop.run_in_executor(self._trends, self._refresh)
            try:
                # Not wait_for, which until Python 3.12 forgets that it was cancelled when what it
                # waits for ends at the same moment: `close` would then wait for ever.
                async with asyncio.timeout(self._settings.trend_deadline_seconds):
                    await asyncio.shield(reading)
            except TimeoutError as error:
                reading.add_done_callback(_retrieve)
                self._trend_failed("deadline", error)
            except Exception as error:
                self._trend_failed("error", error)

    async def _borrow(self) -> None:
        """Use the model's own snapshot, as a stale one, until the store gives one."""
        try:
            snapshot = await self._spare_trend(self._settings.trend_deadline_seconds)
        except (UnavailableError, InputError):
            return  # answers say so, and it is tried again
        if self._trend is None:
            self._trend = Trend.of(snapshot)
            log.warning("trend snapshot %s of the model in use", self._trend.version)

    def _refresh(self) -> None:
        """Read the snapshot; blocking, one at a time."""
        if self._reader is None:
            self._reader = self._open_reader()
        snapshot = self._reader.trend()
        if snapshot is None:
            raise UnavailableError("the feature store holds no trend snapshot")
        if self._snapshot is None or not _same(snapshot, self._snapshot):
            self._trend, self._snapshot = Trend.of(snapshot), snapshot
            log.info("trend snapshot %s in use", self._trend.version)
        self._trend_read_at = time.monotonic()
        lag, period = self._reader.trend_lag()
        # Nobody counts the trend anew although the log goes on.
        self._trend_behind = lag > self._settings.trend_stale_periods * period > 0
        metrics.trend_read(snapshot, lag, period)
        if not self._healthy:
            log.info("feature store readable again")
            self._healthy = True

    def _trend_failed(self, kind: str, error: BaseException) -> None:
        metrics.FEATURE_ERRORS.labels("trend", kind).inc()
        if self._healthy:  # once, not every few seconds
            log.warning("cannot read the trend snapshot: %s", type(error).__name__)
            self._healthy = False


def _open() -> _OpenError:
    return _OpenError("the feature store failed several times just now")


def _same(a: TrendSnapshot, b: TrendSnapshot) -> bool:
    return (
        a.as_of == b.as_of
        and a.floor == b.floor
        and a.item_ids == b.item_ids
        and bool((a.log_q == b.log_q).all())
    )


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the process is stopping
        loop.call_soon_threadsafe(callback)


def _retrieve(future: "asyncio.Future[None]") -> None:
    """Take an exception nobody waits for any more."""
    if not future.cancelled():
        future.exception()
