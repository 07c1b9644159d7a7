"""The real serving processes under load, next to a KServe chain that does nothing.

    python -m benchmarks.serving --items 1682 100000 1000000
    python -m benchmarks.serving --items 1682 --only overload swap refresh
    python -m benchmarks.serving --items 1682 --only soak --seconds 1800

Redis (features), predictor, transformer and load generator share this machine, as does the no-op
chain, which is driven in the same run, before and after: only the ratios are claims. Every request
is `recommend` with 25 results for one of 1,000 users with histories of 100 events.
"""

import argparse
import asyncio
import itertools
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.bundles import NOW, random_bundle
from benchmarks.load import Load, Result, closed_grpc
from feature_repo.settings import FeatureStoreSettings
from model.query import Event
from model.recommender import Recommender
from model.store import Lineage, ModelStore
from model.trends import snapshot_from_counts
from serving.launcher import LocalServing
from serving.settings import ServeSettings
from tests.feature_store import fill
from tests.servers import RedisServer

USERS, EVENTS, RESULTS = 1000, 100, 25
TURNS = 3
FORCE_SECONDS = 60.0  # until a change must be in force
LOOK_SECONDS = 0.5  # between two looks whether it is
SCENARIOS = ("steady", "overload", "swap", "refresh", "soak")


def bodies():
    instances = (
        {"user_id": f"u{k}", "timestamp": NOW, "num_results": RESULTS} for k in range(USERS)
    )
    return [json.dumps({"instances": [i]}, separators=(",", ":")).encode() for i in instances]


def histories(num_items, seed=0):
    draw = random.Random(seed)  # noqa: S311
    return {
        f"u{k}": [
            Event(f"i{min(int(draw.paretovariate(0.5)), num_items) - 1:07}", float(NOW - 60 * e))
            for e in range(EVENTS, 0, -1)
        ]
        for k in range(USERS)
    }


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Target:
    """Something to ask: ports and the model's name."""

    def __init__(self, http_port, grpc_port, model):
        self.http_port, self.grpc_port, self.model = http_port, grpc_port, model
        self.load = Load(http_port, f"/v1/models/{model}:predict", bodies())

    def run(self, connections, seconds, protocol="rest"):
        if protocol == "rest":
            return self.load.closed(connections, seconds)
        loop = closed_grpc(self.grpc_port, self.model, bodies(), connections, seconds)
        return asyncio.run(loop)


def answers(target):
    try:
        return target.run(1, 0.1).counts["200"] > 0
    except OSError:  # nobody listens yet
        return False


@contextmanager
def noop_chain():
    """KServe's own chain, ready."""
    http, grpc_port, p_http, p_grpc = free_ports(4)
    commands = [("predictor", p_http, p_grpc), ("transformer", http, grpc_port, p_grpc)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.noop_chain", *map(str, command)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for command in commands
    ]
    target = Target(http, grpc_port, "noop")
    try:
        deadline = time.monotonic() + 60
        while not answers(target):
            assert time.monotonic() < deadline, "the no-op chain did not start"
            time.sleep(0.2)
        yield target
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


class Service(Target):
    """Our processes on a model store of two generated models and a feature store in Redis."""

    def __init__(self, folder, num_items):
        self.folder, self.num_items = folder, num_items
        # Made once, without certificates: to read those holds the load generator up for 50 ms.
        self.http = httpx.Client(trust_env=False, verify=False)  # noqa: S501
        self.redis = RedisServer()
        self.features = FeatureStoreSettings(
            root=str(folder / "features"), online="redis", redis_url=self.redis.database()
        )
        self.store = ModelStore(str(folder / "models"))
        self.versions = []
        for seed in range(2):
            bundle = random_bundle(folder / f"bundle-{seed}", num_items, seed)
            self.versions.append(self.store.publish(bundle, Lineage()))
        self.store.promote(self.versions[0])
        self.trend = Recommender.load(folder / "bundle-0").trend
        fill(self.features, histories(num_items), self.trend)
        settings = ServeSettings(model_refresh_seconds=0.5, trend_refresh_seconds=0.5)
        self.serving = LocalServing(
            folder / "models", self.features, settings.with_free_ports(), folder / "logs"
        )
        s = self.serving.settings
        super().__init__(s.transformer_http_port, s.transformer_grpc_port, s.model_name)

    def __enter__(self):
        self.serving.start(timeout=300)
        return self

    def __exit__(self, *_):
        self.serving.stop()
        self.redis.close()
        self.http.close()

    def memory(self):
        """Resident bytes of both processes."""
        return sum(psutil.Process(p.pid).memory_info().rss for p in self.serving.processes.values())

    def metric(self, role, sample):
        """What a process says of itself now; None: it has no such sample."""
        answer = self.http.get(self.serving.metrics_urls[role])
        for line in answer.raise_for_status().text.splitlines():
            name, _, value = line.rpartition(" ")
            if name == sample:
                return float(value)
        return None

    def during(self, changes, connections, seconds):
        """A closed loop while one change after the other is made.

        The next one waits until the last is in force, so that what is in force at the end is not
        an earlier one that happens to look the same. Afterwards the last one is waited for, so that
        it does not disturb what is measured next.

        Returns:
            The result, and the seconds of each change from when it was begun until it was in force,
            of those that were before the loop ended.
        """
        over, failed, in_force = threading.Event(), [], []

        def changing():
            try:
                while not over.is_set():
                    began = time.monotonic()
                    changes.make()
                    while not changes.in_force():
                        assert time.monotonic() - began < FORCE_SECONDS, "a change is not in force"
                        time.sleep(LOOK_SECONDS)
                    if not over.is_set():
                        in_force.append(time.monotonic() - began)
                        over.wait(began + changes.every - time.monotonic())
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=changing)
        thread.start()
        result = self.run(connections, seconds)
        over.set()
        thread.join()
        if failed:
            raise failed[0]
        return result, in_force


class Swaps:
    """Promotions of the two versions in turn."""

    scenario, every = "a model swap every 15 s", 15.0

    def __init__(self, service):
        self._service = service
        self._versions = itertools.cycle(reversed(service.versions))

    def make(self):
        self._last = next(self._versions)
        self._service.store.promote(self._last)

    def in_force(self):
        return self._service.metric("predictor", f'hrnn_model_info{{version="{self._last}"}}') == 1


class Refreshes:
    """Trend snapshots with other counts, each as of a second later than the last."""

    scenario, every = "a trend refresh every 1 s", 1.0

    def __init__(self, service, number):
        """
        Args:
            number: of refreshes that can be made.
        """
        from feature_repo import snapshot as snapshots
        from feature_repo.connection import open_existing
        from feature_repo.online import protos

        self._service = service
        self._store = open_existing(service.features)
        # Counted before, as the pipeline that does it is no part of what is measured.
        rows, ids = [], service.trend.item_ids
        # The online store does not write what is not newer than what it has.
        for as_of in range(NOW + 1, NOW + 1 + number):
            counts = np.random.default_rng(as_of).zipf(1.3, len(ids)).clip(max=10**6)
            new = snapshot_from_counts(
                *(ids, counts),
                num_items=service.num_items,
                smoothing=1.0,
                as_of=as_of,
                window_seconds=0,
            )
            rows.append((as_of, protos(snapshots.to_row(new))))
        self._rows = iter(rows)

    def make(self):
        from feature_repo.names import CATALOGUE_ID, TREND_SNAPSHOT
        from feature_repo.online import write_rows

        self._last, row = next(self._rows)
        write_rows(self._store, TREND_SNAPSHOT, [(CATALOGUE_ID, row, self._last)])

    def in_force(self):
        used = self._service.metric("transformer", "hrnn_trend_as_of_timestamp_seconds")
        return used == self._last


def steady(service, noop, seconds):
    """Protocol and connections; the ratios are to the no-op chain driven alike."""
    rows = []
    for protocol, connections in (
        ("rest", 1),
        ("rest", 8),
        ("rest", 16),
        ("grpc", 1),
        ("grpc", 16),
    ):
        service.run(connections, 1.0, protocol)
        row = service.run(connections, seconds, protocol).row()
        noop.run(connections, 1.0, protocol)
        base = noop.run(connections, seconds, protocol).row()
        row |= {
            "scenario": f"{protocol}, {connections}",
            "rate ratio": round(row["per s"] / base["per s"], 2),
            "p99 ratio": round(row["p99 ms"] / base["p99 ms"], 2),
            "p50 beyond ms": round(row["p50 ms"] - base["p50 ms"], 2),
        }
        rows += [base | {"scenario": f"no-op, {protocol}, {connections}"}, row]
    return rows


def overload(service, noop, seconds):
    """Three times as many requests as can be answered; the steady state before it as yardstick."""
    calm = service.run(16, seconds)
    before = service.memory()
    flood = service.load.open(3 * calm.rate, seconds)
    after = service.memory()
    row = flood.row() | {
        "scenario": f"3 × {calm.rate:.0f}/s offered",
        "rate ratio": round(flood.rate / calm.rate, 2),
        "p99 ratio": round(flood.ms(99) / calm.ms(99), 2),
        "503 p99 ms": round(flood.ms(99, "503"), 2),
        "grown MB": round((after - before) / 1e6, 1),
    }
    return [calm.row() | {"scenario": "steady, 16"}, row]


def disturbed(service, changes, seconds):
    """Four connections with and without what is changed meanwhile, in turn: machines drift."""
    calm, changed, in_force, intended = Result(), Result(), [], 0
    service.run(4, 1.0)
    for _ in range(TURNS):
        calm += service.run(4, seconds / TURNS)
        length = max(2 * seconds / TURNS, changes.every)
        result, taken = service.during(changes, 4, length)
        changed += result
        in_force += taken
        intended += int(length / changes.every)
    assert 2 * len(in_force) >= intended, f"{len(in_force)} of {intended} changes came into force"
    return [
        calm.row() | {"scenario": "steady, 4"},
        changed.row()
        | {
            "scenario": changes.scenario,
            "p99 ratio": round(changed.ms(99) / calm.ms(99), 2),
            "changes": f"{len(in_force)} of {intended}",
            "in force after s": round(float(np.median(in_force)), 1),
        },
    ]


def swap(service, noop, seconds):
    return disturbed(service, Swaps(service), seconds)


def refresh(service, noop, seconds):
    return disturbed(service, Refreshes(service, int(2 * seconds) + 10 * TURNS), seconds)


def soak(service, noop, seconds):
    """Memory over time; the slope by least squares after a tenth of the time."""
    samples, start = [], time.monotonic()
    total, slice_seconds = 0, max(2.0, seconds / 60)
    while time.monotonic() - start < seconds:
        total += sum(service.run(4, slice_seconds).counts.values())
        samples.append((time.monotonic() - start, service.memory()))
    at, memory = np.array(samples).T
    warm = at > seconds / 10
    slope = np.polyfit(at[warm], memory[warm], 1)[0] * 600 / memory[warm].mean()
    return [
        {
            "scenario": f"soak, {seconds:.0f} s",
            "requests": total,
            "memory MB": round(memory[-1] / 1e6),
            "slope per 10 min": f"{slope:+.2%}",
        }
    ]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[1682, 100_000, 1_000_000])
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS[:4]))
    parser.add_argument("--seconds", type=float, default=8.0, help="of one measurement")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are stopped
    found, console = {}, Console(width=180)
    for num_items in options.items:
        with (
            tempfile.TemporaryDirectory(prefix="hrnn-bench-") as folder,
            Service(Path(folder), num_items) as service,
            noop_chain() if "steady" in options.only else nullcontext() as noop,
        ):
            rows = []
            for name in options.only:
                rows += globals()[name](service, noop, options.seconds)
            found[num_items] = rows
        show(f"{num_items:,} items", rows, console)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def show(title, rows, console):
    columns = list(dict.fromkeys(["scenario", *(name for row in rows for name in row)]))
    table = Table(*columns, title=title)
    for row in rows:
        cells = {name: _text(value) for name, value in row.items()}
        table.add_row(*(cells.get(column, "") for column in columns))
    console.print(table)


def _text(value):
    if isinstance(value, dict):
        return ", ".join(f"{name}: {number}" for name, number in value.items())
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
