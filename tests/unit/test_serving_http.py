"""What clients may send, over real sockets: slowly, without end, or without ever beginning."""

import asyncio
import json
import os
import socket
import threading
import time
from contextlib import ExitStack, contextmanager

import psutil
import pytest
from prometheus_client import REGISTRY
from starlette.exceptions import HTTPException

from serving import http
from serving.guards import Gate, OverloadedError
from serving.http import Bodies, http_config
from serving.kserve_api import ModelRepository
from serving.process import Uvicorn, reserve
from serving.server import JsonModel, Plane, Rest
from serving.settings import ServeSettings

SETTINGS = ServeSettings(
    max_in_flight=2,
    max_open_requests=30,
    body_deadline_seconds=1.0,
    max_head_bytes=20_000,
    max_body_bytes=2**20,
)
PATH = b"/v1/models/hrnn-meta:predict"
HEAD = b"POST " + PATH + b" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = b'{"instances":[{"a":1}]}'
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
SLOW = HEAD + b"Content-Length: 1000\r\n\r\n{"


class Echo(JsonModel):
    async def answer(self, instances, record):
        record.task = "recommend"
        return instances


@contextmanager
def serving():
    """The port of a server such as a transformer's, in a thread."""
    model = Echo(SETTINGS)
    model.ready = True
    registry = ModelRepository()
    registry.update(model)
    with reserve("127.0.0.1", 0) as listening:
        app = Rest(Plane(registry), SETTINGS).application()
        server = Uvicorn(http_config(app, SETTINGS, lifespan="off"))

        def serve():
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                runner.run(server.serve([listening]))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def port():
    with serving() as port:
        yield port


@pytest.fixture
def connect(port):
    with ExitStack() as stack:

        def connect(data=b""):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
            sock.sendall(data)
            return sock

        yield connect


def status(sock):
    """Of the next answer, which is read to its end; None: the connection was closed."""
    data = b""
    try:
        while b"\r\n\r\n" not in data:
            more = sock.recv(1)
            if not more:
                return None
            data += more
        head, _, _ = data.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        length = int(fields[b"content-length"])
        while length:
            length -= len(sock.recv(length))
    except ConnectionResetError:
        return None
    return int(head.split()[1])


def closed(sock):
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def flood(sock, piece, most=64 * 2**20):
    """Send pieces until the server has had enough; returns the bytes that were taken."""
    sent = 0
    try:
        while sent < most:
            sent += sock.send(piece)
    except (ConnectionResetError, BrokenPipeError):
        pass
    return sent


def count(outcome):
    name = {"task": "unknown", "outcome": outcome}
    return REGISTRY.get_sample_value("hrnn_requests_total", name) or 0


def test_slow_bodies_take_no_place_of_those_that_are_there(connect):
    shed = count("shed")
    slow = [connect(SLOW) for _ in range(SETTINGS.max_open_requests - 1)]
    time.sleep(0.1)
    start = time.monotonic()
    for _ in range(5):
        assert status(connect(WHOLE)) == 200
    assert time.monotonic() - start < SETTINGS.body_deadline_seconds / 2
    assert [status(sock) for sock in slow] == [408] * len(slow)
    assert all(closed(sock) for sock in slow)
    assert count("shed") == shed


def test_of_too_many_slow_bodies_the_slowest_give_way(connect):
    shed = count("shed")
    slow = [connect(SLOW) for _ in range(SETTINGS.max_open_requests)]
    time.sleep(0.1)
    late = connect(SLOW[:-1])
    assert status(slow[0]) == 503 and closed(slow[0])
    late.sendall(b" " * 977 + BODY)
    assert status(late) == 200
    assert status(connect(WHOLE)) == 200
    assert [status(sock) for sock in slow[2:]] == [408] * len(slow[2:])
    assert count("shed") >= shed + 1


def test_all_bodies_together_are_bounded():
    async def run():
        settings = SETTINGS.model_copy(
            update={"max_buffered_bytes": 150, "max_body_bytes": 100, "body_deadline_seconds": 5}
        )
        bodies = Bodies(settings, Gate(1))

        async def send(chunks, pause):
            messages = [{"type": "http.request", "body": c, "more_body": True} for c in chunks]
            messages.append({"type": "http.request", "body": b"", "more_body": False})

            async def receive():
                if len(messages) == 1:
                    await asyncio.sleep(pause)
                return messages.pop(0)

            return await bodies.read(receive)

        first = asyncio.create_task(send([b"a" * 60, b"b" * 20], 3))
        await asyncio.sleep(0)
        second = asyncio.create_task(send([b"c" * 70], 0.05))
        await asyncio.sleep(0.01)
        assert bodies._held == 150
        assert await send([b"d"], 0) == b"d"
        with pytest.raises(OverloadedError, match="too many bodies"):
            await first
        assert await second == b"c" * 70
        with pytest.raises(HTTPException) as error:
            await send([b"e" * 101], 0)
        assert error.value.status_code == 413
        assert (bodies._held, bodies._reading) == (0, {})

    asyncio.run(run())


def test_a_body_whose_time_is_up_makes_room_for_others():
    async def run():
        settings = SETTINGS.model_copy(
            update={"max_open_requests": 1, "body_deadline_seconds": 0.05}
        )
        bodies = Bodies(settings, Gate(10))

        async def whole():
            return {"type": "http.request", "body": b"{}", "more_body": False}

        late = asyncio.create_task(bodies.read(asyncio.Event().wait))
        await asyncio.sleep(0.01)
        time.sleep(0.06)  # its timer fires in the next turn, in which another one comes
        await asyncio.sleep(0)
        other = asyncio.create_task(bodies.read(whole))
        outcomes = await asyncio.gather(late, other, return_exceptions=True)
        assert isinstance(outcomes[0], HTTPException | OverloadedError)
        assert outcomes[1] == b"{}"
        assert (bodies._held, bodies._reading) == (0, {})

    asyncio.run(run())


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (HEAD, b"X-More: " + b"x" * 8000 + b"\r\n"),
        (HEAD + b"X-Long: ", b"x" * 8192),
        (b"GET /", b"x" * 8192),
        (b"", b"\r\n" * 4096),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-More: " + b"x" * 8000 + b"\r\n"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1;" + b"x" * 8000 + b"\r\n{\r\n"),
    ],
    ids=["headers", "header", "url", "line-breaks", "trailers", "chunk-extensions"],
)
def test_what_is_no_body_is_bounded(connect, begin, piece):
    """Kernel buffers of both ends hold some of what was sent."""
    process = psutil.Process(os.getpid())
    before = process.memory_info().rss
    sock = connect(begin)
    assert flood(sock, piece) < 16 * 2**20
    assert status(sock) in (431, 400, None)
    assert process.memory_info().rss - before < 16 * 2**20
    assert status(connect(WHOLE)) == 200


def test_a_large_head_is_refused_with_a_reason(connect):
    for size in (SETTINGS.max_head_bytes - 300, SETTINGS.max_head_bytes + 10):
        sock = connect(HEAD + b"X-Long: " + b"x" * size + b"\r\n" + WHOLE[len(HEAD) :])
        assert status(sock) == (200 if size < SETTINGS.max_head_bytes else 431)
    pieces = connect(HEAD)
    for _ in range(3):
        time.sleep(0.02)
        pieces.sendall(b"X-Long: " + b"x" * 7000 + b"\r\n")
    assert status(pieces) == 431 and closed(pieces)


def test_a_head_has_a_deadline_for_its_whole(connect):
    start = time.monotonic()
    sock = connect(WHOLE)
    assert status(sock) == 200
    for byte in HEAD * 10:  # never silent for long
        try:
            sock.sendall(bytes([byte]))
        except (ConnectionResetError, BrokenPipeError):
            break
        time.sleep(0.02)
        if time.monotonic() - start > 4 * SETTINGS.body_deadline_seconds:
            break
    assert (
        SETTINGS.body_deadline_seconds
        < time.monotonic() - start
        < 2.5 * SETTINGS.body_deadline_seconds
    )
    assert status(sock) in (408, None)


def test_what_follows_an_answer_given_early_has_a_deadline(connect):
    sock = connect(b"GET /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
    assert status(sock) == 200
    start = time.monotonic()
    while time.monotonic() - start < 4 * SETTINGS.body_deadline_seconds:
        try:
            sock.sendall(b"x")
        except (ConnectionResetError, BrokenPipeError):
            break
        time.sleep(0.02)
    assert time.monotonic() - start < 2.5 * SETTINGS.body_deadline_seconds


@pytest.mark.parametrize("rest", [b"x", b"xGET / HT"])
def test_a_connection_whose_answer_came_early_is_closed_when_nothing_follows(rest, monkeypatch):
    monkeypatch.setattr(http, "KEEP_ALIVE_SECONDS", 1)
    with serving() as port, socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n")
        assert status(sock) == 200
        sock.sendall(rest)
        start = time.monotonic()
        assert closed(sock) if rest == b"x" else status(sock) == 408
        assert time.monotonic() - start < 3


def test_a_connection_that_never_begins_is_closed(connect, monkeypatch):
    """As late as one between two requests: clients open connections before they need them."""
    monkeypatch.setattr(http, "KEEP_ALIVE_SECONDS", 1)
    with serving() as port, socket.create_connection(("127.0.0.1", port), timeout=5) as idle:
        start = time.monotonic()
        assert closed(idle)
        assert 0.9 < time.monotonic() - start < 3
    later = connect()
    time.sleep(1.5)
    later.sendall(WHOLE)
    assert status(later) == 200


def test_correct_clients_notice_nothing(connect):
    text = json.dumps({"instances": [{"text": "x" * 10} for _ in range(5000)]}).encode()
    sock = connect()
    for size in (3, 50, 100_000):  # chunks as small as a JSON encoder writes them
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        sock.sendall(b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n")
        assert status(sock) == 200
    sock.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(text))
    for i in range(0, len(text), 30_000):
        sock.sendall(text[i : i + 30_000])
        time.sleep(0.005)
    assert status(sock) == 200
    sock.sendall(WHOLE * 50)  # pipelined
    assert [status(sock) for _ in range(50)] == [200] * 50
    time.sleep(2 * SETTINGS.body_deadline_seconds)
    sock.sendall(WHOLE)
    assert status(sock) == 200
