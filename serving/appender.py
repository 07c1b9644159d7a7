"""Writes into the event log, many requests to a transaction, each durable before it is answered.

One thread writes. While a transaction is on its way to the disk the next requests gather, and go
together in the next one: the more load, the fewer commits per event.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from feature_repo.event_log import EventLog, RefusedError, StorageFullError, Transaction
from model.errors import HrnnError, UnavailableError
from serving import collector_metrics as metrics

log = logging.getLogger("hrnn.serving")

TOGETHER = 2000  # writes in one transaction
STUCK_SECONDS = 5.0  # in one transaction, until the collector calls itself not ready

Work = Callable[[Transaction], Any]


class QueueFullError(HrnnError):
    """More is waiting than can be written soon; try again a moment later."""


@dataclass(frozen=True)
class Written:
    """What a work returned, and the number of the last change of its transaction."""

    result: Any
    seq: int


@dataclass(frozen=True)
class _Job:
    work: Work
    size: int
    future: "Future[Written]" = field(default_factory=Future)


class Appender:
    """The writing thread."""

    def __init__(
        self,
        open_log: Callable[[], EventLog],
        max_queued: int,
        committed: Callable[[int], None] = lambda seq: None,
    ) -> None:
        """
        Args:
            open_log: tried again with each transaction while it fails.
            max_queued: events and upserts that may wait.
            committed: called in the writing thread with the last change's number.
        """
        self._open_log = open_log
        self._max_queued = max_queued
        self._committed = committed
        self._log: EventLog | None = None
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._lock = threading.Lock()
        self._queued = 0
        self._began: float | None = None  # monotonic seconds: the transaction under way
        self._healthy = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="appender", daemon=True)

    def start(self) -> None:
        """Open the log, if it can be opened yet, and begin to write."""
        with contextlib.suppress(UnavailableError):
            self._open()
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether the last transaction went well and none is stuck."""
        began = self._began
        return self._healthy and (began is None or time.monotonic() - began < STUCK_SECONDS)

    def submit(self, work: Work, size: int = 1) -> "Future[Written]":
        """Have `work` done in one of the next transactions; `size` is its number of writes.

        The future is cancelled by whoever does not want to wait any longer; a work that has not
        begun by then is not done.

        Raises:
            QueueFullError: too much is waiting already.
            UnavailableError: the collector is stopping.
        """
        with self._lock:
            if self._closed:
                raise UnavailableError("the collector is stopping")
            # One request is always let in, however large: it could never be sent otherwise.
            if self._queued and self._queued + size > self._max_queued:
                raise self._full()
            self._queued += size
            metrics.QUEUED.set(self._queued)
        job = _Job(work, size)
        self._jobs.put(job)
        return job.future

    def admit(self) -> None:
        """See whether anything could be submitted now, before a request is read.

        Raises:
            QueueFullError: nothing could.
        """
        with self._lock:
            if self._queued >= self._max_queued:
                raise self._full()

    def _full(self) -> QueueFullError:
        return QueueFullError(f"{self._queued} writes are waiting; try again in a moment")

    def probe(self) -> None:
        """Write nothing, to see whether the log can be written again."""
        if not self._healthy and self._queued == 0:
            with contextlib.suppress(HrnnError):
                self.submit(lambda _: None)

    def close(self, timeout: float) -> bool:
        """Write what is waiting and stop; returns whether that was done in time (seconds)."""
        with self._lock:
            self._closed = True
        self._jobs.put(None)
        self._thread.join(timeout)
        done = not self._thread.is_alive()
        if done and self._log is not None:
            self._log.close()
        return done

    def _open(self) -> EventLog:
        if self._log is None:
            self._log = self._open_log()
            self._healthy = True
        return self._log

    def _run(self) -> None:
        running = True
        while running:
            job = self._jobs.get()
            jobs: list[_Job] = []
            writes = 0
            while True:
                if job is None:
                    running = False
                    break
                # A caller that has given up by now was told so: its work is not done.
                if job.future.set_running_or_notify_cancel():
                    jobs.append(job)
                    writes += job.size
                else:
                    self._leave_queue(job)
                if writes >= TOGETHER:
                    break
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
            if jobs:
                self._write(jobs)

    def _write(self, jobs: list[_Job]) -> None:
        started = self._began = time.monotonic()
        try:
            with self._open().write() as transaction:
                results = [job.work(transaction) for job in jobs]
            seq = transaction.seq
        except RefusedError as error:
            self._began = None
            if len(jobs) > 1:  # one of them is at fault: the others must not suffer
                for job in jobs:
                    self._write([job])
                return
            metrics.COMMIT_ERRORS.labels("refused").inc()
            self._answer(jobs, error=error)
        except Exception as error:
            self._began = None
            self._failed(error)
            self._answer(jobs, error=error)
        else:
            self._began = None
            if not self._healthy:
                log.info("the event log can be written again")
            self._healthy = True
            metrics.COMMIT_SECONDS.observe(time.monotonic() - started)
            metrics.COMMIT_WRITES.observe(sum(job.size for job in jobs))
            self._committed(seq)
            self._answer(jobs, [Written(result, seq) for result in results])

    def _failed(self, error: Exception) -> None:
        match error:
            case StorageFullError():
                kind = "full"
            case UnavailableError():
                kind = "unavailable"
            case _:
                kind = "error"
        metrics.COMMIT_ERRORS.labels(kind).inc()
        if self._healthy:  # once, not with every request
            log.warning("the event log cannot be written: %s", error if kind != "error" else kind)
        self._healthy = False

    def _answer(
        self, jobs: list[_Job], results: list[Written] | None = None, error: Exception | None = None
    ) -> None:
        for i, job in enumerate(jobs):
            self._leave_queue(job)
            if results is not None:
                job.future.set_result(results[i])
            else:
                job.future.set_exception(error)

    def _leave_queue(self, job: _Job) -> None:
        with self._lock:
            self._queued -= job.size
            metrics.QUEUED.set(self._queued)
