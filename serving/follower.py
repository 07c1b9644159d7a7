"""The thread that keeps the online store up to date with the event log."""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from model.errors import HrnnError
from serving import collector_metrics as metrics

log = logging.getLogger("hrnn.serving")

RETRY_SECONDS = (0.25, 5.0)  # after the first failure, doubled with each; at most
COMMITS = 10_000  # remembered while the online store cannot be written


class Live(Protocol):
    """feature_repo.live.LiveFeatures as used here."""

    @property
    def replaced(self) -> int: ...
    def follow(self, progress: Callable[[int], None]) -> int: ...
    def lag(self) -> tuple[int, float | None] | None: ...
    def close(self) -> None: ...


class Follower:
    """Applies changes when told of a commit, and looks for those of other collectors."""

    def __init__(self, open_live: Callable[[], Live], poll_seconds: float) -> None:
        """
        Args:
            open_live: tried again while it fails; a feature store may come later than the log.
            poll_seconds: how often other collectors' changes are looked for.
        """
        self._open_live = open_live
        self._poll_seconds = poll_seconds
        self._live: Live | None = None
        self._applied = 0
        self._news = threading.Event()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._waiting: dict[Callable[[], None], int] = {}  # who waits for which change
        # (seq, Unix seconds) of own commits that are not applied yet
        self._commits: deque[tuple[int, float]] = deque(maxlen=COMMITS)
        self._oldest: float | None = None  # Unix seconds: of others' too, when following fails
        self._current_at = time.time()  # Unix seconds: up to date then, as far as is known
        self._lag_known = False
        self._healthy = True
        metrics.LAG_SECONDS.set_function(self._lag_seconds)
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def committed(self, seq: int) -> None:
        """Something is new in the log."""
        with self._lock:
            if seq > self._applied:
                self._commits.append((seq, time.time()))
        self._news.set()

    async def visible(self, seq: int, timeout: float) -> bool:
        """Whether the online store has everything up to a change; waits at most `timeout` s."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def done() -> None:
            if not future.done():
                future.set_result(None)

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is stopping
                loop.call_soon_threadsafe(done)

        with self._lock:
            if seq <= self._applied:
                return True
            self._waiting[wake] = seq
        try:
            await asyncio.wait_for(future, timeout)
        except TimeoutError:
            return False
        finally:
            with self._lock:
                self._waiting.pop(wake, None)
        return True

    def close(self, timeout: float) -> None:
        """Apply what is left, if it can be done in time (seconds), and stop."""
        self._stop.set()
        self._news.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        failures = 0
        while True:
            self._news.wait(self._poll_seconds)
            self._news.clear()
            stopping = self._stop.is_set()
            try:
                self._follow()
                failures = 0
            except Exception as error:
                self._failed(error)
                if not stopping:
                    # Not cut short by news: a store that is down is not asked with every event.
                    first, most = RETRY_SECONDS
                    self._stop.wait(min(first * 2**failures, most))
                failures += 1
            if stopping:
                if self._live is not None:
                    self._live.close()
                return

    def _follow(self) -> None:
        if self._live is None:
            self._live = self._open_live()
        before = self._live.replaced
        try:
            self._live.follow(self._reached)
        finally:
            metrics.REPLACED.inc(self._live.replaced - before)
        self._current_at = time.time()
        self._oldest = None
        metrics.LAG_CHANGES.set(0)
        metrics.FOLLOWING.set(1)
        if not self._healthy:
            log.info("the online store follows the event log again")
            self._healthy = True

    def _reached(self, applied: int) -> None:
        """The online store has everything up to a change: let go who waited for it."""
        now = time.time()
        with self._lock:
            self._applied = applied
            while self._commits and self._commits[0][0] <= applied:
                metrics.VISIBLE_SECONDS.observe(max(0.0, now - self._commits.popleft()[1]))
            woken = [wake for wake, seq in self._waiting.items() if seq <= applied]
        for wake in woken:
            wake()

    def _failed(self, error: Exception) -> None:
        metrics.FOLLOW_ERRORS.inc()
        metrics.FOLLOWING.set(0)
        if self._healthy:  # once, not every few seconds
            text = str(error) if isinstance(error, HrnnError) else type(error).__name__
            log.warning("the online store does not follow the event log: %s", text)
        lag = None
        if self._live is not None:
            with contextlib.suppress(Exception):  # the log may be what is down
                lag = self._live.lag()
        changes, self._oldest = lag or (math.nan, None)
        metrics.LAG_CHANGES.set(changes)
        self._lag_known = lag is not None
        self._healthy = False

    def _lag_seconds(self) -> float:
        with self._lock:
            own = self._commits[0][1] if self._commits else None
        # What the store lacks may not be known: nothing it was given since it was last current.
        unknown = None if self._healthy or self._lag_known else self._current_at
        since = min((t for t in (own, self._oldest, unknown) if t is not None), default=None)
        return 0.0 if since is None else max(0.0, time.time() - since)
