"""The event collector: events in over HTTP, durable, and seen by the next recommendation.

An event is acknowledged when the event log has it on disk. The online store follows the log; an
answer waits a moment for it, and says whether it is up to date.
"""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response

from feature_repo.event_log import (
    EventLog,
    NewEvent,
    Outcome,
)
from model.errors import HrnnError, InputError, UnavailableError
from model.schema import MAX_ID, FieldKind, Schema
from serving import collector_metrics as metrics
from serving.appender import Appender, Work, Written
from serving.collector_http import (
    Intake,
    ProblemError,
    Route,
    add_routes,
    answer,
    path_id,
    path_parameter,
)
from serving.collector_schemas import (
    Batch,
    DeleteAnswer,
    Event,
    EventsAnswer,
    Invalid,
    ItemFields,
    ItemsAnswer,
    Problem,
    UserFields,
    WriteAnswer,
    check_kinds,
    parse,
    parse_events,
)
from serving.follower import Follower, Live
from serving.http import http_config
from serving.process import (
    Signals,
    Uvicorn,
    configure_logging,
    exit_with_parent,
    freeze_garbage_collection,
    leave,
    parse_arguments,
    reserve,
)
from serving.settings import COLLECTOR, EXIT_WITH_PARENT, ServeSettings

log = logging.getLogger("hrnn.serving")

T = TypeVar("T")

PROBE_SECONDS = 2.0  # how often a log that could not be written is tried again
ERASE_SECONDS = 1.0  # until bytes of deleted rows are tried to be given up again; then longer
ERASE_SECONDS_MOST = 30.0
MAX_ITEMS = 1000  # of one answer of GET /items


class Collector:
    """The service; its threads run between `open` and `close`."""

    def __init__(self, settings: ServeSettings) -> None:
        if settings.event_log is None:
            raise InputError(
                "no event log: give --event-log (HRNN_EVENT_LOG), sqlite:///PATH or postgresql://…"
            )
        self.settings = settings
        self._url = settings.event_log
        self._reading: EventLog | None = None
        self._kinds = _Kinds(settings.feature_root)
        self.follower = Follower(self._open_live, settings.follow_seconds)
        self.appender = Appender(
            lambda: EventLog.open(self._url, create=True),
            settings.max_queued_writes,
            self.follower.committed,
        )
        self.intake = Intake(
            settings.max_body_bytes, settings.max_buffered_bytes, settings.max_open_requests
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._deletion = asyncio.Event()  # bytes of deleted rows are to be given up
        self._settled = asyncio.Event()  # as far as it is up to the collector
        self._erased = False

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.appender.start)
        self.follower.start()
        self._deletion.set()  # one that a killed collector did not finish
        self._tasks = [
            asyncio.create_task(self._probe_forever()),
            asyncio.create_task(self._erase_forever()),
        ]

    async def close(self) -> None:
        """Write and apply what is left."""
        for task in self._tasks:
            task.cancel()
        loop = asyncio.get_running_loop()
        grace = max(1.0, self.settings.grace_seconds)
        if not await loop.run_in_executor(None, self.appender.close, grace):
            log.error("the event log hangs: writes that were not acknowledged may be lost")
        await loop.run_in_executor(None, self.follower.close, grace)

    @property
    def ready(self) -> bool:
        return self.appender.ready

    async def _probe_forever(self) -> None:
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            self.appender.probe()

    async def _erase_forever(self) -> None:
        """Give up the bytes of deleted rows; as long as somebody reads them, try again."""
        while True:
            await self._deletion.wait()
            self._deletion.clear()
            metrics.ERASING.set(1)
            done: bool | None = False
            pause = ERASE_SECONDS
            while done is False and not self._deletion.is_set():
                try:
                    done = await self._read(EventLog.erase_traces)
                except (HrnnError, ProblemError):
                    done = False
                if done is False:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, ERASE_SECONDS_MOST)
            if done is not False and not self._deletion.is_set():
                metrics.ERASING.set(0)
                self._erased = bool(done)
                self._settled.set()

    def _open_live(self) -> Live:
        if not self.settings.feature_root:
            raise UnavailableError("no feature store: set HRNN_FEATURE_ROOT")
        from feature_repo.live import LiveFeatures  # slow to import
        from feature_repo.settings import FeatureStoreSettings

        where = FeatureStoreSettings(
            root=self.settings.feature_root,
            online=self.settings.online_store,
            redis_url=self.settings.redis_url,
            registry_url=self.settings.registry_url,
        )
        events = EventLog.open(self._url)
        try:
            live = LiveFeatures(where, events)
        except BaseException:
            events.close()  # it is opened again with every attempt
            raise
        freeze_garbage_collection()
        return live

    async def append(self, request: Request) -> Response:
        """POST /events"""
        raw = await self._body(request)
        batch = isinstance(raw, dict) and "events" in raw
        events = raw["events"] if batch else [raw]
        if batch and raw.keys() != {"events"}:
            raise ProblemError(400, "unknown_field", "a batch holds `events` and nothing else")
        if not isinstance(events, list) or not events:
            raise ProblemError(400, "wrong_type", "events: must be a list of at least one event")
        if len(events) > self.settings.max_events:
            raise ProblemError(
                413,
                "too_many_events",
                f"events: at most {self.settings.max_events} in one request (got {len(events)});"
                " split the batch",
            )
        parsed = parse_events(events, self.settings.max_ahead_seconds)
        good = [e for e in parsed if isinstance(e, NewEvent)]
        outcomes: list[Outcome] = []
        visible = True
        if good:
            written = await self._write(lambda t: t.append(good), len(good))
            outcomes = written.result
            visible = await self._visible(written)
        content = _events_answer(events, parsed, outcomes, visible)
        return answer(content, 200 if content["stored"] or content["duplicates"] else 400)

    async def put_user(self, request: Request) -> Response:
        """PUT /users/{user_id}"""
        user_id = path_id(request, "user_id")
        body = self._checked(UserFields, await self._body(request), "body")
        self._check_kinds(body.fields, self._kinds.users)
        return await self._put(lambda t: t.put_user(user_id, body.fields))

    async def put_item(self, request: Request) -> Response:
        """PUT /items/{item_id}"""
        item_id = path_id(request, "item_id")
        body = self._checked(ItemFields, await self._body(request), "body")
        self._check_kinds(body.fields, self._kinds.items)
        created = None if body.created_at is None else int(body.created_at)
        return await self._put(lambda t: t.put_item(item_id, body.fields, created))

    async def delete_user(self, request: Request) -> Response:
        """DELETE /users/{user_id}"""
        user_id = path_id(request, "user_id")
        written = await self._write(lambda t: t.delete_user(user_id))
        self._settled.clear()
        self._deletion.set()
        visible = await self._visible(written)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), self.settings.visible_wait_seconds)
        erased = self._settled.is_set() and self._erased
        return answer({"events": written.result, "visible": visible, "erased": erased})

    async def items(self, request: Request) -> Response:
        """GET /items?after=SEQ"""
        try:
            after = int(request.query_params.get("after", "0"))
            limit = int(request.query_params.get("limit", str(MAX_ITEMS)))
        except ValueError:
            after = limit = -1
        if not 0 <= after < 2**63 or not 1 <= limit <= MAX_ITEMS:
            raise ProblemError(
                400, "wrong_type", f"after: a number; limit: a number from 1 to {MAX_ITEMS}"
            )
        head, found = await self._read(lambda e: (e.position(), e.items(after, limit)))
        return answer({**asdict(head), "items": [asdict(item) for item in found]})

    async def _read(self, query: Callable[[EventLog], T]) -> T:
        """Ask the log in another thread, within the deadline."""

        def work() -> T:
            if self._reading is None:
                self._reading = EventLog.open(self._url)
            return query(self._reading)

        loop = asyncio.get_running_loop()
        try:
            return await asyncio.wait_for(
                loop.run_in_executor(None, work), self.settings.append_deadline_seconds
            )
        except TimeoutError:
            raise _late() from None

    async def _put(self, work: Work) -> Response:
        return answer({"visible": await self._visible(await self._write(work))})

    async def _write(self, work: Work, size: int = 1) -> Written:
        future: Future[Written] = self.appender.submit(work, size)
        try:
            return await asyncio.wait_for(
                asyncio.wrap_future(future), self.settings.append_deadline_seconds
            )
        except TimeoutError:
            raise _late() from None

    async def _visible(self, written: Written) -> bool:
        wait = self.settings.visible_wait_seconds
        return wait > 0 and await self.follower.visible(written.seq, wait)

    async def _body(self, request: Request) -> Any:
        return await self.intake.read_json(request, self.settings.append_deadline_seconds)

    def _checked(self, kind: Any, raw: Any, where: str) -> Any:
        body = parse(kind, raw, where)
        if isinstance(body, Invalid):
            raise ProblemError(400, body.reason, body.error)
        return body

    def _check_kinds(self, fields: Any, kinds: dict[str, FieldKind]) -> None:
        wrong = check_kinds(fields, kinds, "body")
        if wrong is not None:
            raise ProblemError(400, wrong.reason, wrong.error)


class _Kinds:
    """Kinds of the fields that the feature store knows; empty while there is none."""

    def __init__(self, feature_root: str | None) -> None:
        self._path = Path(feature_root or "") / "applied.json" if feature_root else None
        self._stamp = 0
        self._schema = Schema()

    @property
    def users(self) -> dict[str, FieldKind]:
        return self._current().users

    @property
    def items(self) -> dict[str, FieldKind]:
        return self._current().items

    def _current(self) -> Schema:
        if self._path is not None:
            try:
                stamp = self._path.stat().st_mtime_ns
                if stamp != self._stamp:
                    document = orjson.loads(self._path.read_bytes())
                    self._schema = Schema.parse(document["schema"], self._path.name)
                    self._stamp = stamp
            except (OSError, ValueError, KeyError, InputError):
                # Not there yet, or being replaced; wrong kinds are left out when they are read.
                pass
        return self._schema


def _events_answer(
    raw: Sequence[Any],
    parsed: Sequence[NewEvent | Invalid],
    outcomes: Sequence[Outcome],
    visible: bool,
) -> dict[str, Any]:
    """Per-item answers, and the counts of what became of them."""
    left = iter(outcomes)
    statuses: list[dict[str, Any]] = []
    for values, event in zip(raw, parsed, strict=True):
        if isinstance(event, Invalid):
            given = values.get("event_id") if isinstance(values, dict) else None
            metrics.EVENTS.labels("invalid").inc()
            metrics.REFUSED.labels(event.reason).inc()
            statuses.append(
                {
                    "event_id": given if isinstance(given, str) and len(given) <= MAX_ID else None,
                    "status": "invalid",
                    "reason": event.reason,
                    "error": event.error,
                }
            )
            continue
        outcome = next(left)
        metrics.EVENTS.labels(outcome.value).inc()
        status: dict[str, Any] = {"event_id": event.event_id, "status": outcome.value}
        if outcome is Outcome.USER_DELETED:
            metrics.REFUSED.labels(outcome.value).inc()
            status |= {
                "reason": outcome.value,
                "error": "this user's data of that time was deleted on request",
            }
        statuses.append(status)
    stored = sum(s["status"] == Outcome.STORED for s in statuses)
    duplicates = sum(s["status"] == Outcome.DUPLICATE for s in statuses)
    return {
        "stored": stored,
        "duplicates": duplicates,
        "refused": len(statuses) - stored - duplicates,
        "visible": visible,
        "events": statuses,
    }


def _late() -> ProblemError:
    return ProblemError(
        503,
        "deadline",
        "the event log did not answer in time; send it again, with the same event_id: what was"
        " stored after all then counts once",
        retry=True,
    )


def application(collector: Collector) -> FastAPI:
    """The HTTP routes."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await collector.open()
        yield
        await collector.close()

    app = FastAPI(
        title="HRNN-meta event collector",
        version="1",
        description=__doc__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    user, item = (path_parameter(name) for name in ("user_id", "item_id"))
    users, items = "/users/{user_id:rest}", "/items/{item_id:rest}"
    page = [
        {"name": name, "in": "query", "schema": {"type": "integer", "minimum": a, "maximum": b}}
        for name, a, b in (("after", 0, 2**63 - 1), ("limit", 1, MAX_ITEMS))
    ]
    routes = [
        Route(
            *("POST", "/events", "events", collector.append, EventsAnswer),
            bodies=[Event, Batch],
            refused=EventsAnswer | Problem,  # where all events are refused, each says why
        ),
        Route("PUT", users, "put_user", collector.put_user, WriteAnswer, [UserFields], [user]),
        Route("DELETE", users, "delete_user", collector.delete_user, DeleteAnswer, [], [user]),
        Route("PUT", items, "put_item", collector.put_item, WriteAnswer, [ItemFields], [item]),
        Route("GET", "/items", "items", collector.items, ItemsAnswer, [], page),
    ]
    add_routes(app, routes, lambda: collector.ready, collector.intake, collector.appender.admit)
    return app


def serve(settings: ServeSettings) -> None:
    """Serve until told to stop (`Signals`).

    What was acknowledged or is being written is finished.
    """
    with reserve(settings.host, settings.collector_http_port) as http_socket:
        collector = Collector(settings)
        server = Uvicorn(http_config(application(collector), settings, lifespan="on"))

        async def run() -> None:
            told = asyncio.create_task(Signals(settings.drain_seconds).wait())
            serving = asyncio.create_task(server.serve([http_socket]))
            await asyncio.wait({serving, told}, return_when=asyncio.FIRST_COMPLETED)
            server.should_exit = True
            told.cancel()
            await serving

        log.info("collecting events on %s", settings.collector_url)
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(run())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the collector until it is told to stop.

    Returns:
        0 after a clean stop, 2 after an error a person can fix (one sentence on stderr).
    """
    configure_logging(COLLECTOR)
    try:
        settings = parse_arguments(COLLECTOR, sys.argv[1:] if arguments is None else arguments)
        if os.environ.get(EXIT_WITH_PARENT):
            exit_with_parent(settings.drain_seconds + settings.grace_seconds)
        serve(settings)
    except HrnnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(main())
