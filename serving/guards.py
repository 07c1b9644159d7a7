"""Two guards against collapse: a circuit breaker per dependency, a limit on requests in flight."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from model.errors import UnavailableError
from serving import metrics

RETRY_AFTER_SECONDS = 1
PUSHBACK = "grpc-retry-pushback-ms"  # what gRPC calls Retry-After


class Breaker:
    """Stops asking a dependency that does not answer, so that not every request waits for it.

    Closed: asks go through. After `failures` in a row it opens: asks are refused at once. After
    `seconds` one ask goes through as a trial; it closes the breaker or opens it anew. Not
    thread-safe: for one event loop.
    """

    def __init__(
        self,
        name: str,
        failures: int,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = metrics.BREAKER_OPEN.labels(name)
        self._limit = failures
        self._seconds = seconds
        self._clock = clock
        self._failures = 0
        self._closed_from = 0.0  # when the next trial is due
        self._trial = False
        self._state.set(0)

    @property
    def open(self) -> bool:
        return self._failures >= self._limit

    def allows(self) -> bool:
        """Whether to ask; after True, call `succeeded`, `failed` or `gave_up`.

        Several askers may share an outcome; `gave_up` after it is harmless.
        """
        if not self.open:
            return True
        if self._trial or self._clock() < self._closed_from:
            return False
        self._trial = True
        return True

    def succeeded(self) -> None:
        self._trial = False
        self._failures = 0
        self._state.set(0)

    def failed(self) -> None:
        self._trial = False
        self._failures += 1
        if self.open:
            self._closed_from = self._clock() + self._seconds
            self._state.set(1)

    def gave_up(self) -> None:
        """The asker waits no longer: it has learned nothing."""
        self._trial = False


class OverloadedError(UnavailableError):
    """Refused at once because too much is in flight; to be tried again later."""


class Gate:
    """Admits up to `limit` requests at a time and refuses the rest at once.

    What is refused costs next to nothing, so that what is admitted stays fast and memory flat.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside = 0
        self._shed = metrics.REQUESTS.labels("unknown", "shed")
        self.reason = (
            f"overloaded: {limit} requests are in flight; try again in {RETRY_AFTER_SECONDS} s"
        )

    @property
    def full(self) -> bool:
        """The limit is reached."""
        return self._inside >= self._limit

    def shed(self) -> None:
        """Count a request as refused."""
        self._shed.inc()

    def check(self) -> None:
        """
        Raises:
            OverloadedError: the limit is reached.
        """
        if self.full:
            self.shed()
            raise OverloadedError(self.reason)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """
        Raises:
            OverloadedError: the limit is reached.
        """
        self.check()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
