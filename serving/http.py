"""HTTP/1.1 in bounded memory: what a client may send before, beside and as a body."""

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import uvicorn
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.guards import RETRY_AFTER_SECONDS, Gate, OverloadedError
from serving.settings import ServeSettings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive

KEEP_ALIVE_SECONDS = 65  # longer than the proxies in front
CHUNK_FRAME = 16  # bytes around a chunk: its length in hexadecimal and two line breaks


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol with a limit and a deadline for all that is not body.

    httptools holds a request line or a header of any length, and uvicorn waits for its end, and
    for the first byte of a connection, without end. Counted are the bytes of the head (request
    line and headers) and later those beside the body (chunk extensions, trailers).
    """

    def __init__(self, *args: Any, max_head_bytes: int, head_seconds: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self._max_head_bytes, self._head_seconds = max_head_bytes, head_seconds
        self._in_head = True  # not in a body
        self._begun = False  # a head, that has not ended
        self._too_large = False
        self._beside_body = 0  # bytes that the parser may hold
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._met_deadline()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._beside_body += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._beside_body > self._max_head_bytes:
            self._refuse(431, "the head of the request is too large")
        elif self._owes_bytes:
            if self._deadline is None:
                self._deadline = self.loop.call_later(self._head_seconds, self._missed_deadline)
        elif self._in_head and not self._answering and self.timeout_keep_alive_task is None:
            # The answer came before the end of its request, which has taken its timer away.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_message_begin(self) -> None:
        self._begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self._max_head_bytes:  # came in one piece
            self._too_large = True
            raise ValueError  # ends the parsing: uvicorn calls `send_400_response`
        self._in_head = self._begun = False
        self._beside_body = 0  # what follows is taken off by `on_body`
        self._met_deadline()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._beside_body = max(0, self._beside_body - len(body) - CHUNK_FRAME)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head = True
        self._beside_body = 0
        self._met_deadline()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if self._too_large:
            self._refuse(431, "the head of the request is too large")
        else:
            super().send_400_response(msg)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _owes_bytes(self) -> bool:
        """A request has begun to arrive that no application waits for, with its own deadline."""
        if self._in_head:
            return self._begun or self._beside_body > 0
        return not self._answering

    def _met_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _missed_deadline(self) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        if self._answering:  # an earlier request; its client may be read later
            self._deadline = self.loop.call_later(self._head_seconds, self._missed_deadline)
        else:
            self._refuse(408, f"the request did not arrive within {self._head_seconds:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Close the connection, with an answer where none is under way or was given."""
        if self._in_head and not self._answering:
            body = b'{"error":"%b"}' % message.encode()
            self.transport.write(
                b"%bcontent-type: application/json\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n%b" % (STATUS_LINE[status], len(body), body)
            )
        self.transport.close()


def http_config(app: "ASGIApp", settings: ServeSettings, **more: Any) -> uvicorn.Config:
    """How every role serves HTTP; `more` as for uvicorn."""
    protocol = partial(
        BoundedHttp,
        max_head_bytes=settings.max_head_bytes,
        head_seconds=settings.body_deadline_seconds,
    )
    return uvicorn.Config(
        app,
        http=cast("type[asyncio.Protocol]", protocol),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing reads the client's address
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
        **more,
    )


class GaveWayError(OverloadedError):
    """A body that was being sent gave way to others; its connection is to be closed."""


class Bodies:
    """Reads the bodies of many requests at once, in bounded memory.

    Where too many are being read, or they hold too much together, the one that has been sent for
    longest gives way: clients that send slowly keep nobody out. For one event loop.
    """

    def __init__(self, settings: ServeSettings, gate: Gate) -> None:
        """
        Args:
            gate: counts those that give way.
        """
        self._max_body = settings.max_body_bytes
        self._max_held = settings.max_buffered_bytes
        self._max_reading = settings.max_open_requests
        self._seconds = settings.body_deadline_seconds
        self._gate = gate
        self._reading: dict[asyncio.Timeout, int] = {}  # bytes held, the longest sent for first
        self._held = 0

    async def read(self, receive: "Receive") -> bytes:
        """One whole body.

        Raises:
            HTTPException: 400 cut off, 408 too slow, 413 too large.
            GaveWayError: too many or too much is being sent.
        """
        body = bytearray()
        deadline = asyncio.timeout(self._seconds)
        try:
            async with deadline:
                self._reading[deadline] = 0
                self._make_room()
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise HTTPException(400, "the body was cut off")
                    chunk = message.get("body", b"")
                    if len(body) + len(chunk) > self._max_body:
                        raise HTTPException(413, f"the body is larger than {self._max_body} bytes")
                    if deadline not in self._reading:
                        raise self._gave_way()
                    body += chunk
                    self._reading[deadline] += len(chunk)
                    self._held += len(chunk)
                    self._make_room()
                    more = message.get("more_body", False)
        except TimeoutError:
            if deadline not in self._reading:
                raise self._gave_way() from None
            raise HTTPException(
                408,
                f"the body did not arrive within {self._seconds:g} s",
                {"Connection": "close"},
            ) from None
        finally:
            self._held -= self._reading.pop(deadline, 0)
        return bytes(body)

    def _make_room(self) -> None:
        now = asyncio.get_running_loop().time()
        while len(self._reading) > self._max_reading or self._held > self._max_held:
            longest = next(iter(self._reading))
            self._held -= self._reading.pop(longest)
            if not longest.expired():  # it ends by itself, and cannot be changed any more
                longest.reschedule(now)

    def _gave_way(self) -> GaveWayError:
        self._gate.shed()
        return GaveWayError(
            f"overloaded: too many bodies are being sent; try again in {RETRY_AFTER_SECONDS} s"
        )
