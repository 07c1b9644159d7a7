"""Real collectors under real faults: kill -9 under load, frozen databases, a full disk, SIGTERM."""

import random
import socket
import threading
import time
from collections import Counter
from contextlib import closing

import httpx
import psutil
import pytest
import sqlalchemy as sa

from feature_repo import event_tables
from feature_repo.event_log import EventLog
from feature_repo.settings import FeatureStoreSettings
from feature_repo.store import FeatureReader, ViewOptions, apply
from tests.e2e.collectors import CollectorProcess
from tests.feature_sources import AS_OF, SCHEMA, write_sources
from tests.servers import PostgresServer, RedisServer

LENGTH = 20_000  # of histories: every event of a test can be looked for


def feature_store(folder, redis_url=None):
    settings = FeatureStoreSettings(
        root=str(folder / "features"),
        online="redis" if redis_url else "sqlite",
        redis_url=redis_url,
    )
    write_sources(settings)
    apply(settings, SCHEMA, ViewOptions(history_length=LENGTH))
    return settings


def event(event_id, user="u", at=AS_OF):
    return {"event_id": event_id, "user_id": user, "item_id": event_id, "timestamp": at}


def log_ids(url):
    with closing(EventLog.open(url)) as log, log.engine.connect() as connection:
        return Counter(connection.scalars(sa.select(event_tables.events.c.event_id)))


def history_ids(features, users):
    reader = FeatureReader(features)
    return Counter(e.item_id for user in users for e in reader.user(user).history)


class Senders:
    """Threads that send batches for ever and remember what was acknowledged."""

    def __init__(self, url, users, threads=3):
        self.acknowledged = []
        self.url, self.users = url, users
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(k,)) for k in range(threads)]

    def _send(self, k):
        rng = random.Random(k)
        n = 0
        with httpx.Client(base_url=self.url, timeout=10, trust_env=False) as http:
            while not self._stop.is_set():
                n += 1
                batch = [
                    event(f"{k}-{n}-{j}", rng.choice(self.users), AS_OF + rng.randrange(1000))
                    for j in range(rng.randrange(1, 20))
                ]
                while not self._stop.is_set():  # again until it is acknowledged, as clients do
                    try:
                        answer = http.post("/events", json={"events": batch})
                    except httpx.HTTPError:
                        time.sleep(0.01)
                        continue
                    assert answer.status_code in (200, 429, 503), answer.text
                    if answer.status_code == 200:
                        assert answer.json()["refused"] == 0
                        self.acknowledged += [e["event_id"] for e in batch]
                        break

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize(
    ("database", "online", "rounds"), [("sqlite", "sqlite", 20), ("postgresql", "redis", 20)]
)
def test_killed_under_load_nothing_acknowledged_is_lost_or_doubled(
    database, online, rounds, request, tmp_path
):
    """kill -9 at random moments; then every acknowledged event is there exactly once."""
    redis_url = None
    if online == "redis":
        redis_url = request.getfixturevalue("redis_server").database()
    url = f"sqlite:///{tmp_path}/events.db"
    if database == "postgresql":
        url = request.getfixturevalue("postgres_server").database()
    features = feature_store(tmp_path, redis_url)
    users = [f"u{n}" for n in range(8)]
    rng = random.Random(0)
    collector = CollectorProcess(url, features, tmp_path, visible_wait_seconds=0.02)
    with closing(collector), Senders(collector.url, users) as senders:
        for _ in range(rounds):
            collector.start()
            before = len(senders.acknowledged)
            collector.wait(lambda b=before: len(senders.acknowledged) > b)
            time.sleep(rng.random() * 0.5)  # when the kill strikes
            collector.kill()
        collector.start()
    with CollectorProcess(url, features, tmp_path) as collector:
        stored = log_ids(url)
        assert set(stored.values()) == {1}
        assert len(senders.acknowledged) > 20 * rounds
        assert set(senders.acknowledged) <= stored.keys()
        collector.wait(lambda: history_ids(features, users) == stored)


def test_sigterm_finishes_what_was_accepted(tmp_path):
    features = feature_store(tmp_path)
    url = f"sqlite:///{tmp_path}/events.db"
    with CollectorProcess(url, features, tmp_path, visible_wait_seconds=0) as collector:
        with Senders(collector.url, ["u"]) as senders:
            collector.wait(lambda: len(senders.acknowledged) > 50)
            collector.process.terminate()
            collector.process.join(60)
            assert collector.process.exitcode == 0
        stored = log_ids(url)
        assert set(senders.acknowledged) <= stored.keys()
        # What was committed has been applied before the end, too.
        assert history_ids(features, ["u"]) == stored


def test_after_sigterm_new_connections_are_answered_until_it_is_drained(tmp_path):
    features = feature_store(tmp_path)
    url = f"sqlite:///{tmp_path}/events.db"
    with CollectorProcess(url, features, tmp_path, drain_seconds=1.5) as collector:
        collector.process.terminate()
        told, acknowledged = time.monotonic(), []
        while time.monotonic() < told + 1.0:
            sent = event(f"e{len(acknowledged)}")
            answer = httpx.post(f"{collector.url}/events", json=sent, trust_env=False)
            assert answer.json()["stored"] == 1
            acknowledged.append(sent["event_id"])
            time.sleep(0.1)
        collector.process.join(60)
        assert collector.process.exitcode == 0
        assert time.monotonic() - told >= 1.5
        assert acknowledged
        assert log_ids(url).keys() == {*acknowledged}
        assert history_ids(features, ["u"]).keys() == {*acknowledged}


def test_two_collectors_of_one_user(postgres_server, redis_server, tmp_path):
    features = feature_store(tmp_path, redis_server.database())
    url = postgres_server.database()
    with (
        CollectorProcess(url, features, tmp_path) as one,
        CollectorProcess(url, features, tmp_path) as two,
    ):
        with (
            Senders(one.url, ["u"], threads=2) as first,
            Senders(two.url, ["u"], threads=2) as second,
        ):
            one.wait(lambda: len(first.acknowledged) > 200 and len(second.acknowledged) > 200)
        stored = log_ids(url)
        assert set(stored.values()) == {1}
        assert {*first.acknowledged, *second.acknowledged} <= stored.keys()
        one.wait(lambda: history_ids(features, ["u"]) == stored)


def test_a_frozen_online_store_delays_nothing_but_itself(postgres_server, tmp_path):
    redis = RedisServer()
    with closing(redis):
        features = feature_store(tmp_path, redis.database())
        url = postgres_server.database()
        with CollectorProcess(url, features, tmp_path, visible_wait_seconds=0.1) as collector:
            collector.wait(
                lambda: collector.http.post("/events", json=event("a")).json()["visible"]
            )
            redis.pause()
            answer = collector.http.post("/events", json=event("b"))
            assert answer.status_code == 200
            assert answer.json()["visible"] is False
            collector.wait(lambda: collector.metric("hrnn_collector_lag_seconds") > 0)
            assert collector.ready()  # events are durable, which is what it is there for
            redis.resume()
            collector.wait(collector.caught_up)
            assert history_ids(features, ["u"]).keys() == {"a", "b"}
            redis.kill()
            assert collector.http.post("/events", json=event("c")).json()["stored"] == 1
            errors = "hrnn_collector_follow_errors_total"
            before, started = collector.metric(errors), time.monotonic()
            for n in range(200):  # a store that is down is not asked with every event
                collector.http.post("/events", json=event("c", at=AS_OF + n))
            tries = 1 + (time.monotonic() - started) / 0.25
            assert collector.metric(errors) - before < tries
            assert collector.metric("hrnn_collector_following") == 0
            # Nor is it up to date because a restarted collector cannot tell.
            collector.kill()
            collector.start()
            collector.wait(lambda: collector.metric("hrnn_collector_lag_seconds") > 0.2)
            redis.start()  # empty: it kept nothing
            collector.wait(lambda: history_ids(features, ["u"]).keys() == {"a", "b", "c"})
            collector.wait(collector.caught_up)
            assert collector.metric("hrnn_collector_following") == 1


def test_a_frozen_database_is_answered_in_time_and_recovers(tmp_path):
    postgres = PostgresServer("fsync=off")
    with closing(postgres):
        features, url = feature_store(tmp_path), postgres.database()
        with CollectorProcess(url, features, tmp_path, append_deadline_seconds=1) as collector:
            assert collector.http.post("/events", json=event("a")).status_code == 200
            postgres.pause()
            statuses = set()
            for n in range(3):
                answer = collector.http.post("/events", json=event(f"b{n}"), timeout=20)
                assert answer.json()["reason"] in ("deadline", "log_unavailable")
                assert answer.headers["Retry-After"]
                statuses.add(answer.status_code)
            assert statuses == {503}
            assert collector.http.get("/v2/health/live").status_code == 200
            collector.wait(lambda: not collector.ready())
            postgres.resume()
            collector.wait(collector.ready)
            for n in range(3):  # sent again, as the answers asked for
                answer = collector.http.post("/events", json=event(f"b{n}")).json()
                assert answer["stored"] + answer["duplicates"] == 1
            assert set(log_ids(url)) == {"a", "b0", "b1", "b2"}
            postgres.kill()
            answer = collector.http.post("/events", json=event("c"), timeout=20)
            assert answer.status_code == 503
            postgres.start()
            collector.wait(collector.ready)
            assert collector.http.post("/events", json=event("c")).json()["stored"] == 1
            assert set(log_ids(url).values()) == {1}


def test_a_full_disk_is_said_and_nothing_acknowledged_is_lost(tmp_path):
    """A limit on file sizes: to SQLite a write that fails like one on a full disk."""
    features = feature_store(tmp_path)
    url = f"sqlite:///{tmp_path}/log/events.db"
    collector = CollectorProcess(url, features, tmp_path, visible_wait_seconds=0)
    acknowledged = []
    with closing(collector):
        collector.start(max_file_bytes=600_000)
        for n in range(400):
            batch = [event(f"{n}-{j}-{'x' * 200}") for j in range(20)]
            answer = collector.http.post("/events", json={"events": batch})
            if answer.status_code != 200:
                break
            acknowledged += [e["event_id"] for e in batch]
        assert answer.status_code == 507, answer.text
        assert answer.json()["reason"] == "storage_full"
        assert answer.headers["Retry-After"]
        assert not collector.ready()
        assert acknowledged
        collector.kill()
        assert log_ids(url) == Counter(acknowledged)
        collector.start()  # with room again
        assert collector.http.post("/events", json={"events": batch}).json()["stored"] == 20
        assert len(log_ids(url)) == len(acknowledged) + 20


def test_more_than_can_be_written_is_pushed_back(tmp_path):
    features = feature_store(tmp_path)
    url = f"sqlite:///{tmp_path}/events.db"
    options = {"max_queued_writes": 10, "append_deadline_seconds": 3}
    with (
        CollectorProcess(url, features, tmp_path, **options) as collector,
        closing(EventLog.open(url)) as other,
        other.write(),  # holds the database's write lock: nothing can be written meanwhile
    ):
        statuses = []

        def send(n):
            batch = [event(f"{n}-{j}") for j in range(4)]
            answer = httpx.post(f"{collector.url}/events", json={"events": batch}, timeout=30)
            statuses.append((answer.status_code, answer.headers.get("Retry-After")))

        threads = [threading.Thread(target=send, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {status for status, _ in statuses} == {429, 503}
    assert all(retry for _, retry in statuses)


def test_requests_made_from_the_openapi_description(tmp_path):
    """Valid and broken requests for every operation: no 5xx, and only answers as described."""
    import schemathesis
    from hypothesis import HealthCheck, given
    from hypothesis import settings as hypothesis_settings
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    features = feature_store(tmp_path)
    checks = [
        schemathesis.checks.not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    with CollectorProcess(
        f"sqlite:///{tmp_path}/events.db", features, tmp_path, visible_wait_seconds=0
    ) as collector:
        schema = schemathesis.openapi.from_url(f"{collector.url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) == 5
        for operation in operations:
            for mode in schemathesis.GenerationMode:

                @hypothesis_settings(
                    max_examples=15, deadline=None, suppress_health_check=list(HealthCheck)
                )
                @given(case=operation.as_strategy(generation_mode=mode))
                def run(case):
                    case.validate_response(case.call(), checks=checks)

                run()
        assert collector.ready()


def test_a_head_has_a_limit_and_a_deadline(tmp_path):
    features = feature_store(tmp_path)
    collector = CollectorProcess(
        f"sqlite:///{tmp_path}/events.db", features, tmp_path, body_deadline_seconds=1.0
    )
    with closing(collector):
        collector.start()
        memory = psutil.Process(collector.process.pid).memory_info
        before, address = memory().rss, ("127.0.0.1", collector.settings.collector_http_port)
        with socket.create_connection(address, timeout=10) as flood:
            flood.sendall(b"POST /events HTTP/1.1\r\n")
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                for _ in range(100):
                    flood.sendall(b"X-More: " + b"x" * 2**20 + b"\r\n")
        assert memory().rss - before < 16 * 2**20
        with socket.create_connection(address, timeout=10) as slow:
            slow.sendall(b"POST /events HTTP/1.1\r\nHost: x\r\n")
            assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
        assert collector.http.post("/events", json=event("after")).status_code == 200
