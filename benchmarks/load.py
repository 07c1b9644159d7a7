"""A load generator that is cheap beside what it measures: one thread, epoll, raw HTTP/1.1.

Closed loop: each connection sends its next request when the answer is there. Open loop: requests
are due at random moments of a fixed rate, whether or not earlier ones were answered; one that
finds no idle connection opens another. An answer's seconds run from when its request was written
until the kernel had it. How late requests were written is the generator's own, and told apart
(`Result.lag`).

gRPC goes through grpc.aio, which costs several times as much.
"""

import asyncio
import random
import select
import socket
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import grpc
import numpy as np

from serving.kserve_api import pb, pb_grpc

PATIENCE = 30.0  # seconds for the last answers


@dataclass
class Result:
    """What came back: seconds by outcome (HTTP status or gRPC code name), and for how long."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    elapsed: float = 0.0
    degraded: int = 0
    lag: list[float] = field(default_factory=list)  # open loop: seconds a request was written late
    busy: float = 0.0  # processor seconds of the generator

    def add(self, outcome, seconds):
        self.seconds.setdefault(outcome, []).append(seconds)

    def __iadd__(self, other):
        for outcome, seconds in other.seconds.items():
            self.seconds.setdefault(outcome, []).extend(seconds)
        self.elapsed += other.elapsed
        self.degraded += other.degraded
        self.lag += other.lag
        self.busy += other.busy
        return self

    @property
    def counts(self):
        return Counter({outcome: len(s) for outcome, s in self.seconds.items()})

    @property
    def rate(self):
        """Good answers per second."""
        return len(self.seconds.get("200", ())) / self.elapsed

    def ms(self, percentile, outcome="200"):
        seconds = self.seconds.get(outcome)
        return float(np.percentile(seconds, percentile)) * 1e3 if seconds else float("nan")

    def row(self):
        row = {
            "per s": round(self.rate, 1),
            **{f"p{p:g} ms": round(self.ms(p), 2) for p in (50, 99, 99.9)},
            "outcomes": dict(self.counts),
            "degraded": self.degraded,
            "generator's core": round(self.busy / self.elapsed, 2),
        }
        if self.lag:
            row["late p99 ms"] = round(float(np.percentile(self.lag, 99)) * 1e3, 2)
        return row


class _Connection:
    """Keep-alive, with one request under way at most."""

    __slots__ = ("buffer", "sent", "socket", "waits")

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer, self.sent, self.waits = b"", 0.0, False


class Load:
    """REST requests to one port and path, bodies taken in turn."""

    def __init__(self, port, path, bodies):
        self._port = port
        self._requests = [
            b"POST %b HTTP/1.1\r\nHost: l\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (path.encode(), len(body), body)
            for body in bodies
        ]

    def closed(self, connections, seconds):
        """Args: connections: how many wait for an answer at any time."""
        with self._run() as result:
            end = time.perf_counter() + seconds
            for _ in range(connections):
                self._send()
            while self._waiting and (events := self._epoll.poll(PATIENCE)):
                now = time.perf_counter()
                for fd, _ in events:
                    if self._receive(fd, now) and now < end:
                        self._send()
        return result

    def open(self, rate, seconds, seed=0):
        """Args: rate: requests per second."""
        draw = random.Random(seed)  # noqa: S311
        with self._run() as result:
            now = time.perf_counter()
            end, due = now + seconds, now + draw.expovariate(rate)
            while due < end or (self._waiting and now < end + PATIENCE):
                while due < end and due <= now:
                    result.lag.append(time.perf_counter() - due)
                    self._send()
                    due += draw.expovariate(rate)
                until = due if due < end else end + PATIENCE
                # Not epoll's own time limit, which is in milliseconds.
                select.select([self._epoll], [], [], max(0.0, until - time.perf_counter()))
                events = self._epoll.poll(0)
                now = time.perf_counter()
                for fd, _ in events:
                    self._receive(fd, now)
        return result

    @contextmanager
    def _run(self):
        self._number, self._waiting = 0, 0
        self._connections, self._idle = {}, []
        self._result = result = Result()
        busy, started = time.process_time(), time.perf_counter()
        with select.epoll() as self._epoll:
            yield result
        now = time.perf_counter()
        result.elapsed, result.busy = now - started, time.process_time() - busy
        for connection in self._connections.values():
            if connection.waits:
                result.add("unanswered", now - connection.sent)
            connection.socket.close()

    def _send(self):
        if self._idle:
            connection = self._idle.pop()
        else:
            connection = _Connection(self._port)
            fd = connection.socket.fileno()
            self._connections[fd] = connection
            self._epoll.register(fd, select.EPOLLIN)
        request = self._requests[self._number % len(self._requests)]
        self._number += 1
        self._waiting += 1
        connection.sent, connection.waits = time.perf_counter(), True
        # A request fits the socket's buffer; what breaks is told by epoll too.
        with suppress(OSError):
            connection.socket.sendall(request)

    def _receive(self, fd, now):
        """Read what came; whether a request has ended."""
        connection = self._connections[fd]
        try:
            data = connection.socket.recv(1 << 18)
        except OSError:
            data = b""
        answer = connection.buffer = connection.buffer + data
        head = answer.find(b"\r\n\r\n")
        if data and (head < 0 or len(answer) < head + 4 + _length(answer[:head])):
            return False
        if not data or b"\r\nconnection: close" in answer[:head].lower():
            connection.socket.close()
            del self._connections[fd]
            if not connection.waits:
                self._idle.remove(connection)
                return False
        else:
            self._idle.append(connection)
        self._result.add(answer[9:12].decode() if data else "broken", now - connection.sent)
        self._result.degraded += b'"degraded":["' in answer
        connection.buffer, connection.waits = b"", False
        self._waiting -= 1
        return True


def _length(head):
    return int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])


async def closed_grpc(port, model, bodies, connections, seconds):
    """The closed loop over gRPC: so many calls at a time on one channel."""
    result, busy = Result(), time.process_time()
    messages = [_message(model, body) for body in bodies]
    start = time.perf_counter()

    async def caller(call, number):
        while (sent := time.perf_counter()) < start + seconds:
            try:
                answer = await call(messages[number % len(messages)], timeout=PATIENCE)
            except grpc.RpcError as error:
                outcome = error.code().name
            else:
                outcome = "200"
                (value,) = answer.outputs[0].contents.bytes_contents
                result.degraded += b'"degraded":["' in value
            result.add(outcome, time.perf_counter() - sent)
            number += connections

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        await asyncio.gather(*(caller(call, k) for k in range(connections)))
    result.elapsed, result.busy = time.perf_counter() - start, time.process_time() - busy
    return result


def _message(model, body):
    """What a body of one instance is over gRPC."""
    instance = body[len(b'{"instances":[') : -len(b"]}")]
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="instances",
        datatype="BYTES",
        shape=[1],
        contents=pb.InferTensorContents(bytes_contents=[instance]),
    )
    return pb.ModelInferRequest(model_name=model, inputs=[tensor])
