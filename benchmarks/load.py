"""A load generator that is cheap beside what it measures: one process, asyncio, raw HTTP/1.1.

Closed loop: each connection sends its next request when the answer is there. Open loop: requests
start at random moments of a fixed rate, whether or not earlier ones were answered.
"""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc
import numpy as np

from serving.kserve_api import pb, pb_grpc


@dataclass
class Result:
    """What came back: seconds by outcome (HTTP status or gRPC code name), and for how long."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    elapsed: float = 0.0
    degraded: int = 0

    def add(self, outcome, seconds):
        self.seconds.setdefault(outcome, []).append(seconds)

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
        return {
            "per_second": round(self.rate, 1),
            **{f"p{p:g}_ms": round(self.ms(p), 2) for p in (50, 99, 99.9)},
            "outcomes": dict(self.counts),
            "degraded": self.degraded,
        }


class Rest:
    """One keep-alive connection."""

    def __init__(self, port, path):
        self._port, self._path = port, path
        self._reader = None

    async def ask(self, body):
        if self._reader is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(
            b"POST %b HTTP/1.1\r\nHost: l\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (self._path.encode(), len(body), body)
        )
        head = await self._reader.readuntil(b"\r\n\r\n")
        lower = head.lower()
        at = lower.index(b"content-length:") + 15
        length = int(lower[at : lower.index(b"\r\n", at)])
        answer = await self._reader.readexactly(length)
        if b"connection: close" in lower:
            self.close()
        return head[9:12].decode(), b'"degraded":["' in answer

    def close(self):
        if self._reader is not None:
            self._writer.close()
            self._reader = None


class Grpc:
    """One call at a time on a channel that others share."""

    def __init__(self, channel, model):
        self._call = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        self._model = model

    async def ask(self, body):
        instance = body[len(b'{"instances":[') : -len(b"]}")]
        tensor = pb.ModelInferRequest.InferInputTensor(
            name="instances",
            datatype="BYTES",
            shape=[1],
            contents=pb.InferTensorContents(bytes_contents=[instance]),
        )
        try:
            answer = await self._call(
                pb.ModelInferRequest(model_name=self._model, inputs=[tensor]), timeout=30
            )
        except grpc.RpcError as error:
            return error.code().name, False
        return "200", b'"degraded":["' in answer.outputs[0].contents.bytes_contents[0]

    def close(self):
        pass


async def _one(asker, body, result):
    start = time.perf_counter()
    try:
        outcome, degraded = await asker.ask(body)
    except (OSError, asyncio.IncompleteReadError):
        asker.close()
        outcome, degraded = "broken", False
    result.add(outcome, time.perf_counter() - start)
    result.degraded += degraded


async def closed_loop(make, bodies, connections, seconds):
    """Args: make: builds an asker; bodies: request bodies, taken in turn."""
    result = Result()
    end = time.perf_counter() + seconds

    async def worker(k):
        asker, number = make(), k
        while time.perf_counter() < end:
            await _one(asker, bodies[number % len(bodies)], result)
            number += connections
        asker.close()

    start = time.perf_counter()
    await asyncio.gather(*map(worker, range(connections)))
    result.elapsed = time.perf_counter() - start
    return result


async def open_loop(make, bodies, rate, seconds, seed=0):
    result, free, tasks = Result(), [], set()
    draw = random.Random(seed)  # noqa: S311

    async def one(body):
        asker = free.pop() if free else make()
        await _one(asker, body, result)
        free.append(asker)

    start = time.perf_counter()
    due, number = start, 0
    while due < start + seconds:
        due += draw.expovariate(rate)
        wait = due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(one(bodies[number % len(bodies)]))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        number += 1
    await asyncio.gather(*tasks)
    result.elapsed = time.perf_counter() - start
    for asker in free:
        asker.close()
    return result
