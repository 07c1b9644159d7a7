"""The feed of new items: pages, another log, too many, and what is no collector."""

import json
import time
from contextlib import closing, contextmanager
from urllib.parse import parse_qs, urlsplit

import pytest

from model.errors import UnavailableError
from serving import live_items
from serving.live_items import ItemFeed
from tests.http_server import Handler, HttpServer

IN_BUNDLE = {"known": {"genre": "a"}}


def select(items):
    """As the recommender does: what the bundle has as it is, is no news."""
    return {i: f for i, f in items.items() if IN_BUNDLE.get(i) != f}, 0


class Log:
    """Answers like the collector; items by the number of their newest write."""

    def __init__(self):
        self.log_id, self.seq, self.rows, self.asked = "log", 0, {}, []

    def put(self, item, **fields):
        self.seq += 1
        self.rows.pop(item, None)
        self.rows[item] = {"item_id": item, "fields": fields, "created_at": None, "seq": self.seq}

    def __call__(self, handler):
        query = {k: int(v[0]) for k, v in parse_qs(urlsplit(handler.path).query).items()}
        self.asked.append(query["after"])
        rows = [r for r in self.rows.values() if r["seq"] > query["after"]][: query["limit"]]
        reply(handler, {"log_id": self.log_id, "seq": self.seq, "items": rows})


def reply(handler, content, status=200):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def served(respond):
    class Answers(Handler):
        def do_GET(self):
            respond(self)

    with HttpServer(Answers) as server:
        yield server.address


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def feed(log):
    with served(log) as url, closing(ItemFeed(url, deadline=30, max_items=5)) as feed:
        yield feed


def poll(feed):
    feed.poll(select)
    changed, feed.changed = feed.changed, False
    return changed


def test_news_are_read_once(log, feed, monkeypatch):
    monkeypatch.setattr(live_items, "PAGE", 2)
    assert not poll(feed)
    for n in range(5):
        log.put(f"i{n}", genre="x")
    log.put("known", genre="a")
    assert poll(feed)
    assert feed.items == {f"i{n}": {"genre": "x"} for n in range(5)}
    before = feed.revision()
    assert not poll(feed)
    assert log.asked[-1] == 6
    log.put("i3", genre="y")
    assert poll(feed)
    assert feed.items["i3"] == {"genre": "y"}
    assert feed.revision() != before
    log.put("i3", genre="x")
    assert poll(feed)
    assert feed.revision() == before


def test_what_the_model_has_as_it_is_is_no_news(log, feed):
    log.put("known", genre="b")
    assert poll(feed)
    log.put("known", genre="a")
    assert poll(feed)
    assert feed.items == {}
    log.put("known", genre="a")
    assert not poll(feed)


@pytest.mark.parametrize("change", ["another log", "an older state"])
def test_what_another_log_lacks_is_gone(log, feed, change):
    for item in ("kept", "gone"):
        log.put(item)
    assert poll(feed)
    del log.rows["gone"]
    log.seq = 1
    if change == "another log":
        log.log_id, log.seq = "other", 9
    assert poll(feed)
    assert feed.items == {"kept": {}}


def test_too_many_are_left_out_and_said(log, feed, caplog):
    for n in range(9):
        log.put(f"i{n}")
    assert poll(feed)
    assert len(feed.items) == 5
    assert "HRNN_MAX_LIVE_ITEMS" in caplog.text
    log.put("i0", genre="changed")
    assert poll(feed)
    assert feed.items["i0"] == {"genre": "changed"}


def test_another_model_keeps_what_is_known_while_the_collector_is_away(log):
    with served(log) as url:
        feed = ItemFeed(url, deadline=5, max_items=9)
        log.put("a")
        log.put("known", genre="b")
        assert poll(feed)
    feed.rebase(lambda items: ({i: f for i, f in items.items() if i != "a"}, 0))
    with pytest.raises(UnavailableError):
        feed.poll(select)
    assert feed.changed
    assert feed.items == {"known": {"genre": "b"}}
    feed.close()


GOOD = {"item_id": "i", "fields": {}, "seq": 1}
GARBAGE = {
    "no JSON": b"<html>",
    "not UTF-8": b'{"items": "\xff"}',
    "no object": [],
    "nothing in it": {},
    "no list": {"log_id": "l", "seq": 1, "items": 3},
    "no fields": {"log_id": "l", "seq": 1, "items": [{"item_id": "i", "seq": 1}]},
    "no text": {"log_id": "l", "seq": 1, "items": [GOOD | {"item_id": 3}]},
    "fields of another kind": {"log_id": "l", "seq": 1, "items": [GOOD | {"fields": []}]},
    "not in order": {"log_id": "l", "seq": 2, "items": [GOOD | {"seq": 2}, GOOD]},
    "the same for ever": {"log_id": "l", "seq": 1, "items": [GOOD | {"seq": 0}]},
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_is_refused_and_nothing_is_lost(log, case):
    answers = [log, lambda handler: reply(handler, GARBAGE[case])]
    with served(lambda handler: answers[0](handler)) as url:
        feed = ItemFeed(url, deadline=10, max_items=9)
        log.log_id = "l"
        assert not poll(feed)
        answers.pop(0)
        with pytest.raises(UnavailableError):
            feed.poll(select)
        answers.insert(0, log)
        log.put("new")
        assert poll(feed)
        assert feed.items == {"new": {}}
        feed.close()


def _error(handler):
    reply(handler, {"error": "no"}, status=503)


def _endless(handler):
    handler.send_response(200)
    handler.end_headers()
    with pytest.raises(OSError):
        while True:
            handler.wfile.write(b"[" * 2**20)


def _trickle(handler):
    handler.send_response(200)
    handler.end_headers()
    with pytest.raises(OSError):
        while True:
            handler.wfile.write(b" ")
            time.sleep(0.05)


@pytest.mark.parametrize("respond", [_error, _endless, _trickle])
def test_no_answer_is_waited_for_longer_than_the_deadline(respond):
    with served(respond) as url, closing(ItemFeed(url, deadline=2, max_items=9)) as feed:
        started = time.monotonic()
        with pytest.raises(UnavailableError):
            feed.poll(select)
        assert time.monotonic() - started < 60
