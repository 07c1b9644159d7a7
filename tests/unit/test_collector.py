"""The collector's contract in-process: real logs and online stores, bad input of all kinds."""

import asyncio
import json
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from fastapi import Request
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from feature_repo import event_tables
from feature_repo.event_log import EventLog
from feature_repo.store import FeatureReader
from model.errors import InputError, UnavailableError
from serving.collector import Collector, application
from serving.collector_http import Intake, ProblemError
from serving.settings import ServeSettings
from tests.feature_sources import AS_OF, HARSH, filled


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    from feature_repo.settings import FeatureStoreSettings

    settings = FeatureStoreSettings(root=str(tmp_path_factory.mktemp("features")))
    return filled(settings)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def service(request, features, tmp_path_factory):
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('log')}/events.db"
    else:
        url = request.getfixturevalue("postgres_server").database()
    settings = ServeSettings(
        event_log=url, feature_root=features.root, visible_wait_seconds=20, max_events=500
    )
    collector = Collector(settings)
    with TestClient(application(collector), raise_server_exceptions=False) as client:
        client.collector, client.url = collector, url
        yield client


@pytest.fixture
def log(service):
    with closing(EventLog.open(service.url)) as log:
        yield log


def stored(log):
    with log.engine.connect() as connection:
        return connection.execute(sa.select(event_tables.events)).all()


def event(n, **fields):
    return {
        "event_id": f"e{n}",
        "user_id": f"u{n}",
        "item_id": f"i{n}",
        "timestamp": AS_OF,
    } | fields


def metric(client, line):
    for text in client.get("/metrics").text.splitlines():
        if text.startswith(line + " "):
            return float(text.rpartition(" ")[2])
    return 0.0


def test_an_event_is_durable_and_in_the_next_history(service, log, features):
    answer = service.post("/events", json=event("one", user_id="u1", event_type="play"))
    assert answer.status_code == 200
    assert answer.json() == {
        "stored": 1,
        "duplicates": 0,
        "refused": 0,
        "visible": True,
        "events": [{"event_id": "eone", "status": "stored"}],
    }
    assert [row.item_id for row in stored(log) if row.event_id == "eone"] == ["ione"]
    assert FeatureReader(features).user("u1").history[-1].item_id == "ione"


def test_an_id_and_a_time_are_made_where_there_is_none(service, log):
    before = int(time.time())
    answer = service.post("/events", json={"user_id": "u", "item_id": "i"}).json()
    (row,) = [row for row in stored(log) if row.event_id == answer["events"][0]["event_id"]]
    assert before <= row.timestamp <= time.time()


def test_a_batch_is_answered_event_by_event(service, log):
    batch = [
        event("b1"),
        {"user_id": "u", "item_id": "i", "colour": "red"},
        event("b1", item_id="other"),
        event("b2", timestamp=-1),
        event("b3", timestamp=AS_OF + 0.9, event_value=2, context={"device": "tv"}),
    ]
    answer = service.post("/events", json={"events": batch})
    assert answer.status_code == 200
    found = answer.json()
    assert (found["stored"], found["duplicates"], found["refused"]) == (2, 1, 2)
    assert [e["status"] for e in found["events"]] == [
        "stored",
        "invalid",
        "duplicate",
        "invalid",
        "stored",
    ]
    assert found["events"][1]["reason"] == "unknown_field"
    assert "events[1].colour: no such field" in found["events"][1]["error"]
    assert (found["events"][3]["event_id"], found["events"][3]["reason"]) == (
        "eb2",
        "negative_timestamp",
    )
    row = next(row for row in stored(log) if row.event_id == "eb3")
    assert (row.timestamp, row.event_value, row.context) == (AS_OF, 2.0, {"device": "tv"})


def test_sent_again_an_event_counts_once(service, log):
    for expected in ("stored", "duplicate"):
        answer = service.post("/events", json={"events": [event("again"), event("again2")]})
        assert answer.status_code == 200
        assert {e["status"] for e in answer.json()["events"]} == {expected}
    assert sum(row.event_id.startswith("eagain") for row in stored(log)) == 2


BAD_EVENTS = {
    "unknown field": (event(1, x=1), "unknown_field"),
    "no user": ({"item_id": "i"}, "missing_field"),
    "a number as id": (event(1, user_id=7), "wrong_type"),
    "an empty id": (event(1, item_id=""), "empty_id"),
    "an id of 1,000 characters": (event(1, item_id="x" * 1000), "too_long"),
    "a NUL in an id": (event(1, user_id="a\0b"), "bad_text"),
    "a text as time": (event(1, timestamp="yesterday"), "wrong_type"),
    "true as time": (event(1, timestamp=True), "wrong_type"),
    "a negative time": (event(1, timestamp=-5), "negative_timestamp"),
    "milliseconds": (event(1, timestamp=1_700_000_000_000), "future_timestamp"),
    "next year": (event(1, timestamp=time.time() + 31e6), "future_timestamp"),
    "a list as value": (event(1, event_value=[1]), "wrong_type"),
    "a long impression": (event(1, impression=["i"] * 1001), "too_long"),
    "a nested context": (event(1, context={"a": {"b": 1}}), "wrong_type"),
    "no object": ([1], "wrong_type"),
    "null": (None, "wrong_type"),
}


@pytest.mark.parametrize("bad", BAD_EVENTS)
def test_bad_events_are_refused_with_a_reason_and_counted(service, log, bad):
    value, reason = BAD_EVENTS[bad]
    line = f'hrnn_collector_refused_total{{reason="{reason}"}}'
    before, rows = metric(service, line), len(stored(log))
    for body in (value, {"events": [value]}):
        answer = service.post("/events", content=json.dumps(body))
        assert answer.status_code == 400, answer.text
        (status,) = answer.json()["events"]
        assert (status["status"], status["reason"]) == ("invalid", reason)
        assert "events[0]" in status["error"]
        assert len(answer.text) < 2000
    assert metric(service, line) == before + 2
    assert len(stored(log)) == rows


BAD_BODIES = {
    "empty": (b"", 400, "not_json"),
    "no JSON": (b"{", 400, "not_json"),
    "not UTF-8": (b'{"user_id": "\xff", "item_id": "i"}', 400, "not_utf8"),
    "half a character": (b'{"user_id": "\\ud800", "item_id": "i"}', 400, "not_json"),
    "NaN": (b'{"user_id": "u", "item_id": "i", "event_value": NaN}', 400, "not_json"),
    "infinity": (b'{"user_id": "u", "item_id": "i", "event_value": 1e999}', 400, "not_json"),
    "deep": (b"[" * 100_000, 400, "not_json"),
    "10 MB": (b'{"user_id": "' + b"x" * 10_000_000 + b'"}', 413, "too_large"),
    "100k events": (b'{"events": [' + b"{}," * 100_000 + b"{}]}", 413, "too_many_events"),
    "a text": (b'"hello"', 400, None),
    "an empty batch": (b'{"events": []}', 400, "wrong_type"),
    "no list": (b'{"events": {}}', 400, "wrong_type"),
    "a batch and more": (b'{"events": [{}], "x": 1}', 400, "unknown_field"),
}


@pytest.mark.parametrize("bad", BAD_BODIES)
def test_bad_bodies_are_refused_with_a_reason_and_counted(service, bad):
    body, status, reason = BAD_BODIES[bad]
    line = f'hrnn_collector_refused_total{{reason="{reason or "wrong_type"}"}}'
    before = metric(service, line)
    answer = service.post("/events", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    if reason:
        assert answer.json()["reason"] == reason
    assert len(answer.text) < 2000
    assert metric(service, line) == before + 1


def test_only_plain_json_is_read(service):
    for headers in ({"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"}):
        answer = service.post("/events", content=b"{}", headers=headers)
        assert answer.status_code == 415


@pytest.mark.parametrize("text", [*HARSH[:4], " ", "a/b?c=d#e", "../..", "%", "x" * 512])
def test_any_text_can_be_an_id(service, log, features, text):
    from urllib.parse import quote

    answer = service.post("/events", json=event(f"t{text}"[:500], user_id=text, item_id=text))
    assert answer.json()["stored"] == 1
    path = quote(text, safe="")
    if text != "../..":  # the test client folds it away; a server would not
        assert service.put(f"/users/{path}", json={"fields": {"age": 5}}).status_code == 200
        assert service.put(f"/items/{path}", json={"fields": {"title": text}}).status_code == 200
        assert log.states([text], 9)[text].fields == {"age": 5}
        assert log.items(limit=1000)[-1].item_id == text
    assert FeatureReader(features).user(text).history[-1].item_id == text


BAD_PATHS = ["/users/", "/items/", f"/users/{'x' * 1000}", "/users/%00", "/users/%FF"]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_what_cannot_be_an_id_in_a_path(service, path):
    answer = service.put(path, json={"fields": {}})
    assert answer.status_code == 400
    assert answer.json()["reason"] == "bad_id"


class TestFields:
    def test_a_profile_is_used_at_once(self, service, features):
        answer = service.put("/users/u2", json={"fields": {"age": 44, "tags": ["a"], "new": "x"}})
        assert answer.json() == {"visible": True}
        assert FeatureReader(features).user("u2").profile == {"age": 44, "tags": ["a"]}

    def test_items_can_be_followed(self, service, log):
        after = log.position().seq
        for n in range(3):
            body = {"fields": {"title": f"Item {n}", "genres": ["a"]}, "created_at": 5.5}
            assert service.put(f"/items/n{n}", json=body).status_code == 200
        found = service.get("/items", params={"after": after, "limit": 2}).json()["items"]
        assert [(i["item_id"], i["created_at"]) for i in found] == [("n0", 5), ("n1", 5)]
        found = service.get("/items", params={"after": found[-1]["seq"]}).json()["items"]
        assert [i["fields"]["title"] for i in found] == ["Item 2"]

    @pytest.mark.parametrize("query", ["after=x", "after=-1", "limit=0", "limit=1001", "after=1e3"])
    def test_bad_pages(self, service, query):
        assert service.get(f"/items?{query}").status_code == 400

    @pytest.mark.parametrize(
        ("path", "fields", "reason"),
        [
            ("/users/u", {"age": "old"}, "wrong_kind"),
            ("/users/u", {"tags": "one"}, "wrong_kind"),
            ("/items/i", {"age": ["1"]}, "wrong_kind"),
            ("/items/i", {"genres": [1]}, "wrong_type"),
            ("/users/u", {"x": {"y": 1}}, "wrong_type"),
            ("/users/u", {f"f{n}": 1 for n in range(101)}, "too_long"),
        ],
    )
    def test_values_that_the_model_could_not_read(self, service, path, fields, reason):
        answer = service.put(path, json={"fields": fields})
        assert answer.status_code == 400
        assert answer.json()["reason"] == reason
        assert "fields" in answer.json()["error"]

    @pytest.mark.parametrize("body", [{}, {"fields": 1}, {"fields": {}, "x": 1}, [], 5])
    def test_bad_bodies(self, service, body):
        for path in ("/users/u", "/items/i"):
            assert service.put(path, json=body).status_code == 400


def test_a_deleted_user_is_gone_from_log_and_features(service, log, features):
    # Both logs have one store, which repeats a deletion that it knows in a log that lacks it.
    leaver = f"leaver-of-{service.url[:6]}"
    service.post("/events", json={"events": [event(f"d{n}", user_id=leaver) for n in range(3)]})
    service.put(f"/users/{leaver}", json={"fields": {"age": 1}})
    assert FeatureReader(features).user(leaver).known
    answer = service.delete(f"/users/{leaver}")
    erased = service.url.startswith("sqlite")  # elsewhere it is up to the database
    assert answer.json() == {"events": 3, "visible": True, "erased": erased}
    assert not FeatureReader(features).user(leaver).known
    assert not [row for row in stored(log) if row.user_id == leaver]
    late = service.post("/events", json=event("d9", user_id=leaver))
    assert late.status_code == 400
    assert late.json()["events"][0]["status"] == "user_deleted"
    # Sent again without a time, it would be an event of now; and the sender's clock may be ahead.
    for again in (event("d1", user_id=leaver, timestamp=None), event("d2", user_id=leaver)):
        again["timestamp"] = again["timestamp"] and int(time.time()) + 200
        answer = service.post("/events", json=again)
        assert answer.json()["events"][0]["status"] == "user_deleted"
    assert service.delete("/users/nobody").json()["events"] == 0


def test_bytes_of_a_deleted_user_leave_the_file_once_nobody_reads_them(features, tmp_path):
    """A reader of an old state (an ingestion, say) keeps them in the write-ahead log."""
    url = f"sqlite:///{tmp_path}/events.db"
    settings = ServeSettings(event_log=url, feature_root=features.root, append_deadline_seconds=0.5)

    def held():
        return any(b"needle in" in p.read_bytes() for p in tmp_path.glob("events.db*"))

    with TestClient(application(Collector(settings))) as client:
        client.post("/events", json=event(" needle in a haystack", user_id="leaver"))
        with closing(EventLog.open(url)) as other, other._read() as reading:
            reading.execute(sa.select(event_tables.events)).all()
            assert client.delete("/users/leaver").json()["erased"] is False
            assert held()
            assert metric(client, "hrnn_collector_erasing") == 1
        deadline = time.monotonic() + 60
        while metric(client, "hrnn_collector_erasing"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not held()


def test_attempts_to_open_the_feature_store_leave_nothing_open(tmp_path):
    settings = ServeSettings(
        event_log=f"sqlite:///{tmp_path}/events.db", feature_root=str(tmp_path / "none yet")
    )
    EventLog.open(settings.event_log, create=True).close()
    collector = Collector(settings)

    def opened():
        links = [p.readlink() for p in Path("/proc/self/fd").iterdir() if p.is_symlink()]
        return sum(link.name.startswith("events.db") for link in links)

    before = opened()
    for _ in range(5):
        with pytest.raises(UnavailableError, match="no feature store"):
            collector._open_live()
    assert opened() == before


class TestIntake:
    """Bodies are refused before they are held."""

    @pytest.fixture(scope="class")
    def small(self, features, tmp_path_factory):
        settings = ServeSettings(
            event_log=f"sqlite:///{tmp_path_factory.mktemp('log')}/events.db",
            feature_root=features.root,
            max_body_bytes=1_000_000,
            max_buffered_bytes=1_500_000,
            max_open_requests=3,
            max_queued_writes=2,
            visible_wait_seconds=0,
            append_deadline_seconds=20,
        )
        collector = Collector(settings)
        with TestClient(application(collector)) as client:
            client.collector, client.url = collector, settings.event_log
            yield client

    def test_too_large_by_its_own_word_is_not_read(self, small):
        def never():
            pytest.fail("read")
            yield b""

        headers = {"Content-Length": "2000000", "Content-Type": "application/json"}
        answer = small.post("/events", content=never(), headers=headers)
        assert (answer.status_code, answer.json()["reason"]) == (413, "too_large")

    def test_too_large_without_a_word_is_read_no_further(self, small):
        sent = []

        def chunks():
            for n in range(100):
                sent.append(n)
                yield b" " * 100_000

        answer = small.post("/events", content=chunks())
        assert (answer.status_code, answer.json()["reason"]) == (413, "too_large")

    def test_nothing_is_held_in_the_end(self, small):
        assert small.post("/events", json=event("held")).status_code == 200
        assert small.collector.intake._buffered == small.collector.intake._requests == 0

    def test_all_bodies_together_and_all_requests_are_bounded(self):
        """Two bodies that fit one by one, and more requests than may be open."""
        intake = Intake(max_body=10, max_buffered=15, max_requests=2)

        def request(*chunks):
            given = iter(chunks)

            async def receive():
                chunk = next(given, None)
                body = {"body": chunk or b"", "more_body": chunk is not None}
                return {"type": "http.request", **body}

            return Request({"type": "http", "headers": [], "state": {}}, receive)

        async def run():
            first, second, third = (request(b"[1, 2,", b" 3]"), request(b"[4,5,6,7]"), request())
            with intake.request(first):
                assert await intake.read_json(first, 5) == [1, 2, 3]
                with intake.request(second):
                    with pytest.raises(ProblemError) as refused:
                        await intake.read_json(second, 5)
                    assert (refused.value.status, refused.value.retry) == (429, True)
                    with pytest.raises(ProblemError) as refused, intake.request(third):
                        pass
                    assert (refused.value.status, refused.value.retry) == (429, True)
            again = request(b"[4,5,6,7]")
            with intake.request(again):  # now there is room
                assert await intake.read_json(again, 5) == [4, 5, 6, 7]

        asyncio.run(run())
        assert intake._buffered == intake._requests == 0

    def test_a_full_queue_refuses_what_it_has_not_read(self, small):
        def never():
            pytest.fail("read")
            yield b""

        with closing(EventLog.open(small.url)) as other, other.write():  # holds the write lock
            futures = [small.collector.appender.submit(lambda _: None) for _ in range(2)]
            headers = {"Content-Length": "20", "Content-Type": "application/json"}
            answer = small.post("/events", content=never(), headers=headers)
            assert (answer.status_code, answer.json()["reason"]) == (429, "queue_full")
            assert answer.headers["Retry-After"]
        for future in futures:
            future.result(30)


def test_many_senders_at_once_lose_and_double_nothing(service, log):
    def send(k):
        for n in range(10):
            # The events of every other sender are those of the one before, sent again.
            batch = [event(f"m{k // 2}-{n}-{j}", user_id=f"m{j}") for j in range(5)]
            assert service.post("/events", json={"events": batch}).status_code == 200

    threads = [threading.Thread(target=send, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = [row.event_id for row in stored(log) if row.event_id.startswith("em")]
    assert len(ids) == len(set(ids)) == 2 * 10 * 5


def test_unknown_paths_and_methods(service):
    assert service.get("/nothing").status_code == 404
    assert service.get("/events").status_code == 405
    assert service.post("/items/x", json={}).status_code == 405


def test_health_and_metrics(service):
    assert service.get("/v2/health/live").status_code == 200
    assert service.get("/v2/health/ready").json() == {"ready": True}
    text = service.get("/metrics").text
    for name in (
        "hrnn_collector_lag_seconds 0.0",
        "hrnn_collector_queued_writes 0.0",
        'hrnn_collector_events_total{outcome="stored"}',
        "hrnn_collector_commit_duration_seconds_count",
    ):
        assert name in text


def test_no_log_is_said():
    with pytest.raises(InputError, match="no event log"):
        Collector(ServeSettings())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
almost_events = st.fixed_dictionaries(
    {},
    optional={
        name: json_values | st.text(min_size=1, max_size=8) | st.floats(min_value=0, max_value=1e9)
        for name in (
            *("event_id", "user_id", "item_id", "timestamp", "event_type", "event_value"),
            *("impression", "context", "colour"),
        )
    },
)


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(almost_events, min_size=1, max_size=4))
def test_anything_almost_an_event_is_stored_or_refused(service, events):
    answer = service.post(
        "/events",
        content=json.dumps({"events": events}).encode(errors="surrogatepass"),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code in (200, 400), answer.text
    if "events" in answer.json():
        assert len(answer.json()["events"]) == len(events)
