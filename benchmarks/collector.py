"""The event collector under load: acknowledged events per second, and how soon they are seen.

    python -m benchmarks.collector
    python -m benchmarks.collector --log sqlite --only throughput

Throughput: batches of 100 events of 10,000 users from four connections, each batch durable before
its answer. Visibility: single events at a fixed rate, open loop; after the acknowledgement of some
of them the transformer is asked for that user until its answer reflects the event. "seen": from
the acknowledgement to the end of the answer that has it; an acknowledgement waits for the online
store for a quarter of a second at most, so "sent to seen" is told too. New items: from the
acknowledgement of a PUT until an answer recommends the item. Databases, all servers and
this generator share the machine. PostgreSQL runs with its durable defaults. Each target is printed
as met or missed.
"""

import argparse
import asyncio
import json
import random
import shutil
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.bundles import NOW, random_bundle
from benchmarks.serving import histories
from feature_repo.settings import FeatureStoreSettings
from model.query import ItemFilter
from model.recommender import Recommender
from serving.client import Client
from serving.event_client import EventClient
from serving.launcher import LocalServing
from serving.settings import ServeSettings
from tests.feature_store import fill
from tests.servers import PostgresServer, RedisServer

BATCH, CONNECTIONS, SENDERS = 100, 4, 10_000
# Column, limit, whether more is better.
TARGETS = (
    ("seen p50 ms", 50, False),
    ("seen p99 ms", 1000, False),
    ("failed", 0.5, False),
    ("events/s", 2000, True),
    ("refused", 0.5, False),
)
ITEMS, USERS = 1682, 1000


class Asker:
    """One keep-alive connection; gives status and body of an answer."""

    def __init__(self, port, path):
        self._port, self._path = port, path
        self._reader = None

    def close(self):
        if self._reader is not None:
            self._writer.close()
            self._reader = None

    async def ask(self, body):
        if self._reader is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(
            b"POST %b HTTP/1.1\r\nHost: l\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (self._path.encode(), len(body), body)
        )
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        at = head.index(b"content-length:") + 15
        length = int(head[at : head.index(b"\r\n", at)])
        return head[9:12].decode(), await self._reader.readexactly(length)


def event(draw, users, at):
    item = f"i{draw.randrange(ITEMS):07}"
    return {"user_id": f"u{draw.randrange(users)}", "item_id": item, "timestamp": at}


async def throughput(port, seconds):
    """Acknowledged events per second, and the time of a batch."""
    end = time.perf_counter() + seconds
    taken, refused = [], 0

    async def send(k):
        nonlocal refused
        draw, asker = random.Random(k), Asker(port, "/events")  # noqa: S311
        while time.perf_counter() < end:
            batch = [event(draw, SENDERS, NOW + draw.randrange(10**6)) for _ in range(BATCH)]
            body = json.dumps({"events": batch}).encode()
            begun = time.perf_counter()
            status, answer = await asker.ask(body)
            if status == "200" and b'"stored":100,' in answer:
                taken.append(time.perf_counter() - begun)
            else:
                refused += 1
        asker.close()

    begun = time.perf_counter()
    await asyncio.gather(*(send(k) for k in range(CONNECTIONS)))
    elapsed = time.perf_counter() - begun
    return {
        "events/s": round(BATCH * len(taken) / elapsed),
        "batch p50 ms": round(float(np.percentile(taken, 50)) * 1e3, 1),
        "batch p99 ms": round(float(np.percentile(taken, 99)) * 1e3, 1),
        "refused": refused,
    }


class Pool:
    """Connections, reused."""

    def __init__(self, port, path):
        self._make = lambda: Asker(port, path)
        self._free = []

    async def ask(self, body):
        asker = self._free.pop() if self._free else self._make()
        answer = await asker.ask(body)
        self._free.append(asker)
        return answer


async def visibility(settings, rate, seconds, check):
    """Seconds until acknowledged, and from then until an answer reflects the event."""
    collector = Pool(settings.collector_http_port, "/events")
    transformer = Pool(settings.transformer_http_port, f"/v1/models/{settings.model_name}:predict")
    acknowledged, seen, whole, failed = [], [], [], 0
    draw = random.Random(0)  # noqa: S311

    async def one(n):
        nonlocal failed
        # An item that the user has not seen: only this event can take it out of the answer.
        user, item = f"u{draw.randrange(USERS)}", f"i{n % ITEMS:07}"
        body = json.dumps({"user_id": user, "item_id": item, "timestamp": NOW + n}).encode()
        begun = time.perf_counter()
        status, _ = await collector.ask(body)
        done = time.perf_counter()
        if status != "200":
            failed += 1
            return
        acknowledged.append(done - begun)
        if n % check:
            return
        instance = {"user_id": user, "num_results": 1, "exclude_seen": True}
        instance |= {"timestamp": NOW + 10**6, "filter": {"include": [item]}}
        question = json.dumps({"instances": [instance]}).encode()
        while True:
            status, answer = await transformer.ask(question)
            if status == "200" and b'"items":[]' in answer and b'"degraded":[]' in answer:
                seen.append(time.perf_counter() - done)
                whole.append(time.perf_counter() - begun)
                return
            if time.perf_counter() - done > 30:
                failed += 1
                return

    tasks, begun = [], time.perf_counter()
    for n in range(int(rate * seconds)):
        due = begun + n / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(n)))
    await asyncio.gather(*tasks)

    def ms(values, percentile):
        return round(float(np.percentile(values, percentile)) * 1e3, 1)

    return {
        "rate": round(len(acknowledged) / (time.perf_counter() - begun), 1),
        "ack p50 ms": ms(acknowledged, 50),
        "ack p99 ms": ms(acknowledged, 99),
        "seen p50 ms": ms(seen, 50),
        "seen p99 ms": ms(seen, 99),
        "sent to seen p99 ms": ms(whole, 99),
        "looked for": len(seen),
        "failed": failed,
    }


def new_items(settings, count):
    """Seconds from the acknowledgement of a new item until an answer recommends it."""
    times = []
    with EventClient(settings.collector_url) as collector, Client(settings.transformer_url) as ask:
        for n in range(count):
            time.sleep(random.random())  # noqa: S311 - anywhere between two looks
            collector.put_item(f"new-{n}", {})
            begun = time.perf_counter()
            only = ItemFilter(include=frozenset({f"new-{n}"}))
            while not ask.recommend(timestamp=NOW, num_results=1, item_filter=only).items:
                if time.perf_counter() - begun > 60:
                    raise SystemExit("a new item is not recommended after a minute")
                time.sleep(0.01)
            times.append(time.perf_counter() - begun)
    return {f"recommended p{q} ms": round(float(np.percentile(times, q)) * 1e3) for q in (50, 99)}


def lag(url):
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    line = next(x for x in text.splitlines() if x.startswith("hrnn_collector_lag_seconds "))
    return float(line.rpartition(" ")[2])


def measure(log, arguments, folder):
    """One database: SQLite with the SQLite online store, PostgreSQL with Redis."""
    with ExitStack() as stack:
        redis_url, url = None, f"sqlite:///{folder}/events.db"
        if log == "postgresql":
            redis_url = stack.enter_context(closing(RedisServer())).database()
            url = stack.enter_context(closing(PostgresServer())).database()
        features = FeatureStoreSettings(
            root=str(folder / "features"),
            online="redis" if redis_url else "sqlite",
            redis_url=redis_url,
        )
        bundle = random_bundle(folder / "bundle", ITEMS)
        fill(features, histories(ITEMS), Recommender.load(bundle).trend)
        settings = ServeSettings(event_log=url).with_free_ports()
        serving = stack.enter_context(LocalServing(bundle, features, settings, folder / "logs"))
        settings = serving.settings
        asyncio.run(visibility(settings, 50, 5, 1))  # warm
        if "visibility" in arguments.only:
            row = asyncio.run(
                visibility(settings, arguments.rate, arguments.seconds, arguments.check)
            )
            yield {"log": log, "scenario": f"{arguments.rate} events/s, one by one"} | row
        if "throughput" in arguments.only:
            row = asyncio.run(throughput(settings.collector_http_port, arguments.seconds))
            behind, begun = lag(settings.collector_url), time.perf_counter()
            while lag(settings.collector_url) > 0:
                time.sleep(0.05)
            row |= {"lag at the end s": round(behind, 2)}
            row |= {"caught up after s": round(time.perf_counter() - begun, 1)}
            yield {"log": log, "scenario": f"batches of {BATCH}"} | row
        if "items" in arguments.only:
            row = new_items(settings, 20)
            yield {"log": log, "scenario": f"new items, catalogue of {ITEMS}"} | row


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--log", nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--only", nargs="+", default=["visibility", "throughput", "items"])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rate", type=float, default=200.0, help="events per second")
    parser.add_argument("--check", type=int, default=4, help="look for every n-th event")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for log in arguments.log:
        folder = Path(tempfile.mkdtemp(prefix="hrnn-collector-"))
        try:
            rows += measure(log, arguments, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        mine = [row for row in rows if row["scenario"] == scenario]
        table = Table(*mine[0].keys(), title=scenario)
        for row in mine:
            table.add_row(*map(str, row.values()))
        Console().print(table)
    for row in rows:
        for column, limit, more in TARGETS:
            if column in row:
                met = row[column] >= limit if more else row[column] < limit
                bound = f"{'at least' if more else 'below'} {limit:g}"
                verdict = "met   " if met else "MISSED"
                print(f"{verdict} {row['log']}: {column} {row[column]:g}, {bound}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
