"""The event log on a real SQLite file and a real PostgreSQL server."""

import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest
import sqlalchemy as sa

from feature_repo import event_log, event_tables
from feature_repo.event_log import EventLog, NewEvent, Outcome, StorageFullError, UserState
from model.errors import InputError, UnavailableError
from model.query import Event

HARSH = ['say "hi"', "it's; DROP TABLE events", "☃🎬 é", "line\nbreak", "\\", "NULL", "%s :x ?"]


@pytest.fixture
def log(log_url):
    log = EventLog.open(log_url, create=True)
    yield log
    log.close()


def event(n, user="u", at=None, **fields):
    return NewEvent(f"e{n}", user, f"i{n}", 1000 + n if at is None else at, **fields)


def append(log, *events):
    with log.write() as transaction:
        return transaction.append(events)


def rows(log, table=event_tables.events):
    with log.engine.connect() as connection:
        return connection.execute(sa.select(table).order_by(table.c.seq)).all()


def test_what_is_appended_is_read_back_as_it_was(log):
    full = NewEvent(
        HARSH[0], HARSH[1], HARSH[2], 893_286_638, "buy", 0.1, tuple(HARSH), {"d": "tv"}
    )
    bare = NewEvent(HARSH[3], HARSH[4], HARSH[5], 0)
    assert append(log, full, bare) == [Outcome.STORED] * 2
    (first, second), head = rows(log), log.position().seq
    assert (first.seq, second.seq, head) == (1, 2, 2)
    assert first[1:7] == (HARSH[0], HARSH[1], HARSH[2], 893_286_638, "buy", 0.1)
    assert (first.impression, first.context) == (HARSH, {"d": "tv"})
    assert second[4:9] == (0, None, None, None, None)


def test_an_event_counts_once_in_a_batch_and_over_batches(log):
    again = replace(event(1), item_id="other")
    assert append(log, event(1), again) == [Outcome.STORED, Outcome.DUPLICATE]
    assert append(log, event(2), again) == [Outcome.STORED, Outcome.DUPLICATE]
    assert [(row.event_id, row.item_id) for row in rows(log)] == [("e1", "i1"), ("e2", "i2")]


def test_a_failed_transaction_leaves_nothing(log):
    append(log, event(1))
    with pytest.raises(ZeroDivisionError), log.write() as transaction:
        transaction.append([event(2)])
        transaction.put_user("u", {"age": 3})
        raise ZeroDivisionError
    assert log.position().seq == 1
    assert append(log, event(2)) == [Outcome.STORED]
    assert [row.seq for row in rows(log)] == [1, 2]


def test_numbers_ascend_in_the_order_in_which_changes_become_visible(log, log_url):
    """Several writers, each with its own connection; a reader that goes on from what it saw."""
    writers, each, done = 4, 40, threading.Event()

    def write(w):
        own = EventLog.open(log_url)
        for n in range(each):
            append(own, *(event(f"{w}-{n}-{k}", at=1) for k in range(3)))
        own.close()

    def follow():
        seen, users = 0, []
        while True:
            stop = done.is_set()
            with log.engine.connect() as connection:
                query = sa.select(event_tables.events.c.seq).where(event_tables.events.c.seq > seen)
                users += (new := sorted(connection.scalars(query)))
            seen = new[-1] if new else seen
            if stop:
                return users

    with ThreadPoolExecutor(writers + 1) as pool:
        reader = pool.submit(follow)
        for job in [pool.submit(write, w) for w in range(writers)]:
            job.result()
        done.set()
        assert reader.result() == list(range(1, writers * each * 3 + 1))
    assert len({row.event_id for row in rows(log)}) == writers * each * 3


def test_histories_are_the_newest_events_in_event_time_order(log):
    append(log, event(5), event(3), event(9, user="other"))
    append(log, replace(event(4), event_type="buy", event_value=2.5), event("tie", at=1005))
    states = log.states(["u", "other", "nobody", "u"], 3)
    assert states["u"].history == (
        Event("i4", 1004, "buy", 2.5),
        Event("i5", 1005),
        Event("itie", 1005),
    )
    assert states["other"].history == (Event("i9", 1009),)
    assert states["nobody"] == UserState()


def test_changes_come_in_portions_and_miss_nothing(log):
    with log.write() as transaction:
        transaction.append([event(n, user=f"u{n % 7}") for n in range(25)])
        transaction.put_user("fields only", {"a": 1})
        transaction.delete_user("u3")
        transaction.append([event(99, user="last")])
    after, users = 0, []
    while (found := log.changes(after, limit=4)).users:
        assert found.upto > after
        users += found.users
        after = found.upto
    assert set(users) == {*(f"u{n}" for n in range(7)), "fields only", "last"}
    assert after == log.position().seq
    assert log.changes(after).upto == after


def test_fields_are_replaced_and_items_followed_in_order(log):
    with log.write() as transaction:
        transaction.put_item("a", {"genres": ["x"], "year": None}, 5)
        transaction.put_item("b", {})
        transaction.put_user("u", {"age": 30.5})
    with log.write() as transaction:
        transaction.put_item("a", {"title": "☃"})
        transaction.put_user("u", {"job": "cook"})
    assert log.states(["u"], 1)["u"].fields == {"job": "cook"}
    found = log.items()
    assert [(i.item_id, i.fields, i.created_at) for i in found] == [
        ("b", {}, None),
        ("a", {"title": "☃"}, None),
    ]
    assert log.items(after=found[0].seq) == found[1:]
    assert log.items(limit=1) == found[:1]


class TestDeletion:
    def test_a_user_is_gone_and_late_events_of_the_past_stay_out(self, log):
        append(log, event(1), event(2), event(3, user="other"))
        with log.write() as transaction:
            transaction.put_user("u", {"age": 3})
            assert transaction.delete_user("u") == 2
        assert [row.user_id for row in rows(log)] == ["other"]
        assert rows(log, event_tables.users) == []
        assert append(log, event(1), event(7)) == [Outcome.USER_DELETED] * 2

    def test_an_event_sent_again_does_not_come_back(self, log):
        """Without a time of its own it would be one of now; and clocks may be ahead."""
        append(log, event(1), event(2, at=int(time.time()) + 250), event(3, user="other"))
        with log.write() as transaction:
            transaction.delete_user("u")
        later = int(time.time()) + 1000
        assert append(log, event(1, at=later)) == [Outcome.USER_DELETED]
        assert append(log, event(2, at=later), event(3, user="other")) == [
            Outcome.USER_DELETED,
            Outcome.DUPLICATE,
        ]
        # A copy of the second one, in a run's tables, is of before the deletion too.
        assert log.states(["u"], 9)["u"].deleted_at >= later - 760
        assert append(log, event(4, at=later)) == [Outcome.STORED]

    def test_an_id_that_was_deleted_with_another_user_can_be_deleted_again(self, log):
        append(log, event(1, user="anonymous"))
        with log.write() as transaction:
            transaction.delete_user("anonymous")
        assert append(log, event(1, user="logged in")) == [Outcome.STORED]
        with log.write() as transaction:
            assert transaction.delete_user("logged in") == 1
        assert rows(log) == []

    def test_an_event_of_a_far_future_does_not_lock_out_who_comes_back(self, log):
        append(log, event(1, at=int(time.time()) + 10**9))
        with log.write() as transaction:
            transaction.delete_user("u")
        assert append(log, event(2, at=int(time.time()) + 2)) == [Outcome.STORED]

    def test_who_comes_back_starts_anew(self, log):
        append(log, event(1))
        with log.write() as transaction:
            transaction.delete_user("u")
        later = log.states(["u"], 9)["u"].deleted_at + 1
        assert append(log, event(8, at=later)) == [Outcome.STORED]
        assert log.states(["u"], 9)["u"] == UserState((Event("i8", later),), {}, later - 1)

    def test_nothing_of_a_deleted_user_is_left_in_the_files(self, tmp_path):
        log = EventLog.open(f"sqlite:///{tmp_path}/events.db", create=True)
        append(log, event("needle in a haystack", user="secret person", at=1))
        with log.write() as transaction:
            transaction.delete_user("secret person")
        assert log.erase_traces()
        files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        log.close()
        assert b"needle in a haystack" not in files
        assert files.count(b"secret person") <= 2  # the note that this user is deleted, its index


class TestOpening:
    def test_creating_twice_at_once_and_again_keeps_what_is_there(self, log_url):
        with ThreadPoolExecutor(4) as pool:
            logs = list(pool.map(lambda _: EventLog.open(log_url, create=True), range(4)))
        append(logs[0], event(1))
        again = EventLog.open(log_url, create=True)
        assert again.position().seq == 1
        for log in (*logs, again):
            log.close()

    def test_what_is_not_there_is_not_made(self, log_url, tmp_path):
        with pytest.raises(InputError, match="no event log"):
            EventLog.open(log_url)
        assert not list(tmp_path.iterdir())

    def test_a_database_of_someone_else(self, tmp_path):
        path = tmp_path / "other.db"
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE t (x)")
        with pytest.raises(InputError, match="tables are missing"):
            EventLog.open(f"sqlite:///{path}")
        path.write_bytes(b"no database at all" * 100)
        with pytest.raises(UnavailableError, match="cannot open the event log"):
            EventLog.open(f"sqlite:///{path}")

    def test_a_later_format_is_refused(self, log, log_url):
        with log.engine.begin() as connection:
            connection.execute(sa.update(event_tables.log_head).values(format=99))
        with pytest.raises(InputError, match="format 99"):
            EventLog.open(log_url)

    @pytest.mark.parametrize(
        "url", ["", "events.db", "mysql://h/d", "sqlite://", "postgresql://u:secret@h", "x:y@z"]
    )
    def test_bad_addresses_are_refused_without_repeating_them(self, url):
        with pytest.raises(InputError, match="sqlite:///PATH") as error:
            EventLog.open(url)
        assert "secret" not in str(error.value)

    def test_nobody_listens(self, tmp_path):
        url = f"postgresql://u:secret@/d?host={tmp_path}"
        with pytest.raises(UnavailableError, match="OperationalError") as error:
            EventLog.open(url)
        assert "secret" not in str(error.value)


def test_giving_up_bytes_that_somebody_reads_keeps_no_writer_out(tmp_path):
    """SQLite's checkpoint holds the writers' lock for as long as it waits for readers."""
    url = f"sqlite:///{tmp_path}/events.db"
    stop, attempts = threading.Event(), []

    def erase():
        while not stop.is_set():
            attempts.append(log.erase_traces())
            stop.wait(0.2)  # the collector waits longer

    with closing(EventLog.open(url, create=True)) as log:
        append(log, event(1))
        with closing(EventLog.open(url)) as other, other._read() as reading:
            reading.execute(sa.select(event_tables.events)).all()
            append(log, event(2))  # what the reader does not see is in the write-ahead log
            thread = threading.Thread(target=erase)
            thread.start()
            try:
                writer = sqlite3.connect(tmp_path / "events.db", timeout=2, isolation_level=None)
                with closing(writer):
                    while len(attempts) < 3:
                        assert thread.is_alive()
                        writer.execute("BEGIN IMMEDIATE")  # waits 2 s, a write of the log 5
                        writer.execute("ROLLBACK")
            finally:
                stop.set()
                thread.join()
        assert set(attempts) == {False}
        assert log.erase_traces()
        with log.engine.connect() as pooled:
            waits = pooled.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
        assert waits == 1000 * event_tables.LOCK_SECONDS


def test_sqlite_is_durable_and_overwrites_what_is_deleted(tmp_path):
    log = EventLog.open(f"sqlite:///{tmp_path}/events.db", create=True)
    with log.engine.connect() as connection:
        values = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "secure_delete")
        ]
    log.close()
    assert values == ["wal", 2, 1]


def test_a_writer_that_waits_too_long_is_told(log, log_url, monkeypatch):
    monkeypatch.setattr(event_tables, "LOCK_SECONDS", 1)
    with closing(EventLog.open(log_url)) as other, log.write() as transaction:
        transaction.append([event(1)])
        with pytest.raises(UnavailableError, match="cannot write to the event log"), other.write():
            pytest.fail("two writers at once")
    assert log.position().seq == 1


def test_a_full_disk_is_named():
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorname = "SQLITE_FULL"
    with (
        pytest.raises(StorageFullError, match="its disk is full"),
        event_log._errors("write to"),
    ):
        raise sa.exc.OperationalError("INSERT", {}, full)


def test_a_writer_that_freezes_keeps_no_other_from_writing(postgres_url, monkeypatch):
    monkeypatch.setattr(event_log, "FROZEN_SECONDS", 1)
    with closing(EventLog.open(postgres_url, create=True)) as frozen:
        with pytest.raises(UnavailableError), frozen.write() as transaction:
            transaction.append([event(1)])
            with closing(EventLog.open(postgres_url)) as other:
                assert append(other, event(2)) == [Outcome.STORED]
        assert [row.event_id for row in rows(frozen)] == ["e2"]
