"""Online features that follow the event log: both logs, both online stores, real servers."""

import random
import sqlite3
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest
import redis
import sqlalchemy as sa
from feast.infra.online_stores.helpers import _mmh3
from hypothesis import given
from hypothesis import strategies as st

from feature_repo import event_log as event_log_module
from feature_repo import live as live_module
from feature_repo.event_log import EventLog, NewEvent, Outcome, Turn
from feature_repo.event_tables import events as events_table
from feature_repo.event_tables import log_head, metadata, users
from feature_repo.histories import events_of, merge, values_of
from feature_repo.live import LiveFeatures
from feature_repo.names import LIVE_CHECKPOINT, LIVE_VIEWS
from feature_repo.settings import FeatureStoreSettings
from feature_repo.store import UserFeatures, ViewOptions, apply, forget, materialise
from model.errors import UnavailableError
from model.query import Event
from tests.feature_sources import AS_OF, HARSH, SCHEMA, filled, write_sources
from tests.feature_store import CheckedReader as FeatureReader


@pytest.fixture
def store(settings):
    return filled(settings)


@pytest.fixture
def log(log_url):
    with closing(EventLog.open(log_url, create=True)) as log:
        yield log


@pytest.fixture
def follower(store, log):
    return LiveFeatures(store, log)


def event(n, user="u1", at=None, **fields):
    return NewEvent(f"e{n}", user, f"i{n}", AS_OF + n if at is None else at, **fields)


def append(log, *events):
    with log.write() as transaction:
        transaction.append(events)


def items(reader, user="u1"):
    return [e.item_id for e in reader.user(user).history]


def test_late_events_are_sorted_in_and_nothing_newer_is_lost(log, follower, store):
    reader = FeatureReader(store)
    append(log, event(50, event_type="buy", event_value=2.0))
    follower.follow()
    append(log, event("late", at=AS_OF - 7))
    follower.follow()
    assert reader.user("u1").history == [
        Event(HARSH[1], AS_OF - 10, "play"),
        Event("ilate", AS_OF - 7),
        Event("i1", AS_OF - 5, None, 4.5),
        Event("i50", AS_OF + 50, "buy", 2.0),
    ]


def test_a_new_user_becomes_known(log, follower, store):
    append(log, event(1, user="🙂 new"))
    follower.follow()
    reader = FeatureReader(store)
    assert reader.user("🙂 new") == UserFeatures(True, {}, [Event("i1", AS_OF + 1)])
    assert reader.user("nobody") == UserFeatures(known=False)


def test_capped_at_history_length(log, store):
    apply(store, SCHEMA, ViewOptions(history_length=3))
    append(log, *(event(n) for n in range(9)))
    LiveFeatures(store, log).follow()
    assert items(FeatureReader(store)) == ["i6", "i7", "i8"]


def test_a_longer_history_is_used_by_a_running_follower(log, follower, store, monkeypatch):
    monkeypatch.setattr(live_module, "REGISTRY_SECONDS", 0)
    apply(store, SCHEMA, ViewOptions(history_length=2))
    append(log, event(1), event(2))
    follower.follow()
    apply(store, SCHEMA, ViewOptions(history_length=4))
    append(log, event(3))
    follower.follow()
    reader = FeatureReader(store)
    reader.trend()
    assert items(reader) == ["i1", "i1", "i2", "i3"]


def test_a_run_on_the_log_itself_counts_nothing_twice(log, follower, store):
    append(log, event(3), replace(event(4), event_id="again", item_id="i3", timestamp=AS_OF + 3))
    append(log, event(5))
    follower.follow()
    history = {"u1": [("older", AS_OF - 5), ("i3", AS_OF + 3), ("i3", AS_OF + 3)]}
    write_sources(store, history=history, as_of=AS_OF + 4)
    materialise(store, AS_OF + 4)
    assert items(FeatureReader(store)) == ["older", "i3", "i3", "i5"]


def test_a_run_does_not_touch_what_is_live(log, follower, store):
    append(log, event(1, user="live only"), event(2))
    with log.write() as transaction:
        transaction.put_user("u1", {"age": 99})
    follower.follow()
    materialise(store, AS_OF)
    reader = FeatureReader(store)
    assert items(reader, "live only") == ["i1"]
    assert items(reader)[-1] == "i2"
    assert reader.user("u1").profile["age"] == 99


def test_fields_lie_over_those_of_the_last_run(log, follower, store):
    fields = {"age": 31, "tags": None, "Lieblings-Farbe": ["not", "one"], "unheard of": "x"}
    with log.write() as transaction:
        transaction.put_user("u1", fields)
        transaction.put_user("new", {"tags": ["a"], "age": "old"})
    follower.follow()
    reader = FeatureReader(store)
    assert reader.user("u1").profile == {"age": 31, "Lieblings-Farbe": HARSH[0]}
    assert reader.user("new") == UserFeatures(True, {"tags": ["a"]}, [])


class TestDeletion:
    def test_a_user_is_unknown_even_after_a_run_on_old_tables(self, log, follower, store):
        append(log, event(1))
        follower.follow()
        with log.write() as transaction:
            transaction.delete_user("u1")
        follower.follow()
        reader = FeatureReader(store)
        assert reader.user("u1") == UserFeatures(known=False)
        assert reader.user("u2").known
        materialise(store, AS_OF)
        assert reader.user("u1") == UserFeatures(known=False)

    def test_who_comes_back_is_a_new_user(self, log, follower, store):
        with log.write() as transaction:
            transaction.delete_user("u1")
        later = log.states(["u1"], 1)["u1"].deleted_at + 1
        append(log, event(1, at=later))
        follower.follow()
        assert FeatureReader(store).user("u1") == UserFeatures(True, {}, [Event("i1", later)])

    def test_the_rows_of_the_last_run_are_blanked(self, log, follower, store):
        append(log, event(1))
        with log.write() as transaction:
            transaction.delete_user("u1")
        follower.follow()
        forget(store, {"user_live": ["u1"]})  # so that only the others would speak
        assert not FeatureReader(store).user("u1").known


class TestFollowing:
    def test_nothing_new_is_no_work(self, log, follower, monkeypatch):
        append(log, event(1))
        assert follower.follow() == 1
        monkeypatch.setattr(live_module, "write_rows", lambda *_: pytest.fail("wrote"))
        assert follower.follow() == 1

    @pytest.mark.parametrize("portion", [1, 7, 1000])
    def test_any_portions_lead_to_the_same(self, log, store, monkeypatch, portion):
        monkeypatch.setattr(live_module, "PORTION", portion)
        follower = LiveFeatures(store, log)
        follower.follow()
        append(log, *(event(n, user=f"u{n % 4}") for n in range(20)))
        assert follower.follow() == 20
        reader = FeatureReader(store)
        for user in range(4):
            own = [f"i{n}" for n in range(20) if n % 4 == user]
            assert items(reader, f"u{user}")[-5:] == own

    @pytest.mark.parametrize("lost", ["everything", "checkpoint", "rows since a moment"])
    def test_a_store_that_has_lost_rows_is_filled_again(self, log, follower, store, lost):
        append(log, event(1), event(2, user="other"))
        follower.follow()
        checkpoint = follower._checkpoint()
        append(log, event(3))
        follower.follow()
        if lost == "rows since a moment":
            forget(store, {"user_live": ["u1"]})
            with log.follower_lock() as turn:
                follower._set_checkpoint(turn, checkpoint)
        else:
            forget(store, {LIVE_CHECKPOINT: ["all"]})
        if lost == "everything":
            forget(store, {"user_live": ["u1", "other"]})
        follower.follow()
        reader = FeatureReader(store)
        assert items(reader)[-2:] == ["i1", "i3"]
        assert items(reader, "other") == ["i2"]

    def test_another_log_is_followed_from_its_beginning(self, follower, store, tmp_path):
        append(follower._events, *(event(n) for n in range(5)))
        follower.follow()
        with closing(EventLog.open(f"sqlite:///{tmp_path}/new.db", create=True)) as other:
            append(other, event("other", user="other", at=AS_OF))
            assert LiveFeatures(store, other).follow() == 1
        assert items(FeatureReader(store), "other") == ["iother"]

    def test_changes_while_all_users_are_written_are_not_missed(
        self, log, follower, store, monkeypatch
    ):
        monkeypatch.setattr(live_module, "PORTION", 2)
        append(log, *(event(n, user=f"v{n}") for n in range(6)))
        pages = Turn.user_ids
        late = iter([event(90, user="v0"), event(91, user="v5"), event(92, user="brand new")])

        def user_ids(turn, **arguments):
            page = pages(turn, **arguments)
            for one in late:
                append(log, one)
                break
            return page

        monkeypatch.setattr(Turn, "user_ids", user_ids)
        follower.follow()
        reader = FeatureReader(store)
        assert items(reader, "v0") == ["i0", "i90"]
        assert items(reader, "v5") == ["i5", "i91"]
        assert items(reader, "brand new") == ["i92"]
        assert [items(reader, f"v{n}") for n in range(1, 5)] == [[f"i{n}"] for n in range(1, 5)]

    def test_several_writers_and_followers_of_the_same_users(self, log, log_url, store):
        """Every follower reads, writes and falls behind at random; the end is the log's state."""
        users, each = [f"v{n}" for n in range(5)], 25

        def collect(seed):
            rng = random.Random(seed)
            with closing(EventLog.open(log_url)) as own:
                follower = LiveFeatures(store, own)
                for n in range(each):
                    at = AS_OF + rng.randrange(1000)
                    append(own, event(f"{seed}-{n}", user=rng.choice(users), at=at))
                    if rng.random() < 0.8:
                        follower.follow()
                follower.follow()

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(collect, range(3)))
        reader, states = FeatureReader(store), log.states(users, 100)
        assert sum(len(state.history) for state in states.values()) == 3 * each
        for user in users:
            assert reader.user(user).history == list(states[user].history)

    def test_who_waits_is_told_of_each_portion_and_a_growing_log_is_not_chased(
        self, log, follower, monkeypatch
    ):
        monkeypatch.setattr(live_module, "PORTION", 2)
        follower.follow()
        append(log, *(event(n) for n in range(5)))
        told = []

        def progress(seq):
            told.append(seq)
            append(log, event(100 + seq))  # and so on for ever

        assert follower.follow(progress) == 6
        assert told == [0, 2, 4, 6]
        assert log.position().seq == 9

    def test_one_at_a_time(self, log, follower, monkeypatch):
        from feature_repo import event_tables

        monkeypatch.setattr(event_tables, "LOCK_SECONDS", 0.2)
        if log.engine.dialect.name == "postgresql":
            url = log.engine.url.render_as_string(hide_password=False)
            monkeypatch.setattr(event_tables, "LOCK_SECONDS", 1)
            follower._events = EventLog.open(url)
        with log.follower_lock(), pytest.raises(UnavailableError):
            follower.follow()
        follower.follow()
        follower._events.close()


class TestTheLock:
    """A log on PostgreSQL, whose followers' sessions end after a second without a sign of life."""

    @pytest.fixture
    def log_url(self, postgres_server, monkeypatch):
        monkeypatch.setattr(event_log_module, "FROZEN_SECONDS", 1)
        return postgres_server.database()

    @pytest.fixture
    def slow_writes(self, monkeypatch):
        """Lets one follower's writes of users take long; `before`: called first."""
        write_rows = live_module.write_rows

        def slow(follower, before):
            def write(store, view, rows):
                if store is follower._session.store and view.name == "user_live":
                    before()
                return write_rows(store, view, rows)

            monkeypatch.setattr(live_module, "write_rows", write)

        return slow

    def test_is_kept_through_a_long_rebuild(self, log, store, slow_writes, monkeypatch):
        monkeypatch.setattr(live_module, "PORTION", 1)
        append(log, *(event(n, user=f"v{n}") for n in range(8)))
        follower = LiveFeatures(store, log)
        slow_writes(follower, lambda: time.sleep(0.3))
        assert follower.follow() == 8
        assert items(FeatureReader(store), "v7") == ["i7"]

    @pytest.mark.parametrize("rebuild", [False, True])
    def test_is_lost_by_who_is_frozen_and_then_nothing_newer_is_undone(
        self, log, log_url, follower, store, slow_writes, rebuild
    ):
        """One reads the log and freezes; another goes on; the first wakes up and writes."""
        append(log, event(1))
        follower.follow()
        append(log, event(2))
        if rebuild:
            follower.rebuild()

        def frozen():
            # The real thing: the database ends the session of a follower that does nothing.
            time.sleep(1)
            with closing(EventLog.open(log_url)) as other:
                append(other, event(3))
                deadline = time.monotonic() + 60
                while True:
                    try:
                        assert LiveFeatures(store, other).follow() == 3
                        return
                    except UnavailableError:
                        assert time.monotonic() < deadline

        slow_writes(follower, frozen)
        with pytest.raises(UnavailableError):
            follower.follow()
        assert follower._checkpoint().seq == 3  # the mark of the one that went on
        assert items(FeatureReader(store))[-1] != "i3"  # no store can refuse the old row...
        slow_writes(follower, lambda: None)
        follower.follow()
        assert items(FeatureReader(store))[-3:] == ["i1", "i2", "i3"]  # ...so it is mended


class TestAnOlderLog:
    """The event log was lost and restored from a backup."""

    @pytest.fixture
    def restored(self, log, follower, store):
        append(log, event(1, user="kept"))
        follower.follow()
        position = log.position()
        append(log, event(2, user="lost"), event(3, user="kept"))
        with log.write() as transaction:
            transaction.delete_user("deleted")
            transaction.delete_user("u1")
        follower.follow()
        reader = FeatureReader(store)
        assert items(reader, "lost") == ["i2"]
        with log.write() as transaction:
            for table in ("events", "deleted_users"):
                gone = sa.text(f"DELETE FROM {table} WHERE seq > {position.seq}")  # noqa: S608
                transaction._connection.execute(gone)
            transaction.seq = position.seq
        follower.follow()
        reader.trend()
        return reader

    def test_histories_that_it_lacks_are_gone(self, restored):
        assert items(restored, "kept") == ["i1"]
        assert not restored.user("lost").known

    def test_deletions_that_it_lacks_are_repeated(self, log, follower, store, caplog):
        append(log, event(1, user="gone"), event(2, user="back"))
        with log.write() as transaction:
            transaction.put_user("gone", {"age": 30})
        follower.follow()
        with log.engine.connect() as connection:
            backup = {t: connection.execute(sa.select(t)).all() for t in (events_table, users)}
        now = int(time.time())
        with log.write() as transaction:
            for user in ("gone", "back"):
                transaction.delete_user(user)
        append(log, event(3, user="back", at=now + 100))
        follower.follow()
        with log.write() as transaction:
            for table in metadata.sorted_tables:
                if table is not log_head:
                    transaction._connection.execute(table.delete())
            for table, rows in backup.items():
                transaction._connection.execute(table.insert(), [row._asdict() for row in rows])
            transaction._connection.execute(sa.update(log_head).values(log_id="restored"))
        append(log, event(4, user="back", at=now + 200), event(5, user="gone", at=now - 50))
        follower.follow()
        reader = FeatureReader(store)
        assert not reader.user("gone").known
        assert items(reader, "back") == ["i4"]
        with closing(LiveFeatures(store, log)) as other:  # a later event brings nothing back
            append(log, event(6, user="gone", at=now + 200))
            other.follow()
        assert items(FeatureReader(store), "gone") == ["i6"]
        with log.engine.connect() as connection:
            left = set(connection.scalars(sa.select(events_table.c.event_id)))
        assert left == {"e4", "e6"}
        with log.write() as transaction:
            assert transaction.append([event(1, user="gone")]) == [Outcome.USER_DELETED]
        assert "lacked 2 deletions" in caplog.text
        assert not any(word in caplog.text for word in ("gone", "back"))

    @pytest.mark.parametrize("when", ["while all are written", "after that"])
    def test_nor_are_they_lost_to_events_of_users_not_written_yet(
        self, log, follower, store, monkeypatch, when
    ):
        append(log, event(1, user="first"), event(2, user="gone"))
        follower.follow()
        now = int(time.time())
        with log.write() as transaction:
            transaction.delete_user("gone")
        follower.follow()
        late = event(7, user="gone", at=now + 100)
        with log.write() as transaction:
            transaction._connection.execute(metadata.tables["deleted_users"].delete())
            transaction._connection.execute(metadata.tables["deleted_events"].delete())
            transaction._connection.execute(sa.update(log_head).values(log_id="restored"))
            if when == "while all are written":  # the backup is of before the deletion
                transaction.append([event(2, user="gone")])
        monkeypatch.setattr(live_module, "PORTION", 1)
        write_users, written = LiveFeatures._write_users, []

        def write(self, turn, page, *rest):
            write_users(self, turn, page, *rest)
            if when == "while all are written" and not written:
                append(log, late)
            written.extend(page)

        monkeypatch.setattr(LiveFeatures, "_write_users", write)
        follower.follow()
        if when == "after that":  # the backup is of before the user came
            assert "gone" not in written
            append(log, late, event(8, user="gone", at=now - 100))
            follower.follow()
        follower.follow()
        assert items(FeatureReader(store), "gone") == ["i7"]
        assert log.states(["gone"], 9)["gone"].deleted_at is not None

    def test_a_deletion_is_not_taken_back(self, restored, store):
        materialise(store, AS_OF)
        assert not FeatureReader(store).user("u1").known


class TestKeysOfAnotherType:
    """Something else wrote where rows of users, or the checkpoint, belong in Redis."""

    @pytest.fixture
    def store(self, tmp_path, redis_server):
        url = redis_server.database()
        settings = FeatureStoreSettings(root=str(tmp_path / "f"), online="redis", redis_url=url)
        return filled(settings)

    def spoil(self, store, part):
        with redis.Redis.from_url(store.redis_url) as connection:
            (key,) = (key for key in connection.scan_iter() if part in key)
            connection.delete(key)
            connection.rpush(key, "no hash")

    def test_a_users_holds_up_nobody_and_is_mended(self, log, follower, store, caplog):
        append(log, *(event(n, user=user) for n, user in enumerate(("harry", "sally", "joe"))))
        follower.follow()
        self.spoil(store, b"sally")
        append(log, *(event(9 + n, user=u) for n, u in enumerate(("harry", "sally", "joe"))))
        assert follower.follow() == log.position().seq
        reader = FeatureReader(store)
        assert [items(reader, u) for u in ("harry", "sally", "joe")] == [
            ["i0", "i9"],
            ["i1", "i10"],
            ["i2", "i11"],
        ]
        assert follower.replaced == 1
        assert "1 keys in Redis held no features" in caplog.text
        assert "sally" not in caplog.text

    @pytest.mark.parametrize("part", [b"catalogue_id", b"sally"])
    def test_nor_the_checkpoints_or_one_in_a_rebuild(self, log, follower, store, part):
        append(log, event(1, user="sally"))
        follower.follow()
        self.spoil(store, part)
        with closing(LiveFeatures(store, log)) as other:
            if part == b"sally":
                other.rebuild()
            append(log, event(2, user="joe"))
            assert other.follow() == log.position().seq
            assert other.replaced == 1
        users = FeatureReader(store)
        materialise(store, AS_OF)
        users.trend()
        assert (items(users, "sally"), items(users, "joe")) == (["i1"], ["i2"])


class TestUnreadableRows:
    """Values of the online store that are none of Feast's; both stores."""

    def spoil(self, store, view, feature, part):
        if store.online == "redis":
            field = _mmh3(f"{view}:{feature}")
            with redis.Redis.from_url(store.redis_url) as connection:
                (key,) = (key for key in connection.scan_iter() if part in key)
                assert connection.hexists(key, field)
                connection.hset(key, field, b"\xff\xff")
        else:
            with closing(sqlite3.connect(store.online_path)) as connection, connection:
                assert connection.execute(
                    f"UPDATE hrnn_{view} SET value = x'ffff'"  # noqa: S608 - our own name
                    " WHERE feature_name = ? AND instr(entity_key, ?)",
                    (feature, part),
                ).rowcount

    @pytest.fixture
    def spoilt(self, log, follower, store):
        append(log, *(event(n, user=user) for n, user in enumerate(("harry", "sally", "joe"))))
        with log.write() as transaction:
            transaction.delete_user("u1")
        follower.follow()
        self.spoil(store, "user_live", "deleted_at", b"sally")

    def test_one_holds_up_no_rebuild_and_is_mended_by_it(
        self, log, follower, store, spoilt, caplog
    ):
        follower.rebuild()
        assert follower.follow() == log.position().seq
        reader = FeatureReader(store)
        assert [items(reader, u) for u in ("harry", "sally", "joe")] == [["i0"], ["i1"], ["i2"]]
        assert not reader.user("u1").known
        assert follower.replaced == 1
        assert "1 rows of the online store could not be read" in caplog.text
        assert "sally" not in caplog.text

    def test_nor_does_it_hide_the_deletions_of_its_neighbours(self, log, follower, store, spoilt):
        with log.write() as transaction:
            transaction._connection.execute(metadata.tables["deleted_users"].delete())
            transaction._connection.execute(sa.update(log_head).values(log_id="restored"))
            transaction.append([event(9)])
        follower.follow()
        assert log.states(["u1"], 1)["u1"].deleted_at is not None
        assert items(FeatureReader(store), "sally") == ["i1"]

    def test_an_unreadable_checkpoint_is_as_good_as_none(self, log, follower, store):
        append(log, event(1, user="sally"))
        follower.follow()
        self.spoil(store, LIVE_CHECKPOINT, "seq", b"catalogue_id")
        append(log, event(2, user="joe"))
        with closing(LiveFeatures(store, log)) as other:
            assert other.follow() == log.position().seq
            assert other.replaced == 1
        reader = FeatureReader(store)
        assert (items(reader, "sally"), items(reader, "joe")) == (["i1"], ["i2"])


def test_live_views_are_not_materialised(store):
    assert not LIVE_VIEWS & materialise(store, AS_OF).keys()


def test_a_registry_of_before_the_live_views_still_serves(store, monkeypatch):
    from feature_repo import store as store_module

    monkeypatch.setattr(store_module, "SERVING_USER", "not registered")
    user = FeatureReader(store).user("u1")
    assert [e.item_id for e in user.history] == [HARSH[1], "i1"]
    assert user.profile["age"] == 30.5


events = st.lists(
    st.builds(
        Event,
        st.sampled_from("abc"),
        st.integers(0, 5),
        st.sampled_from([None, "x"]),
        st.sampled_from([None, 0.5]),
    ),
    max_size=12,
).map(lambda found: sorted(found, key=lambda e: e.timestamp))


@given(events)
def test_arrays_hold_events_exactly(history):
    assert events_of(values_of(history)) == history


@given(events, events, st.integers(1, 30))
def test_two_histories_make_one(run, live, length):
    whole = merge(run, live, 100)
    assert [e.timestamp for e in whole] == sorted(e.timestamp for e in whole)
    keys = [Counter((e.item_id, e.timestamp) for e in h) for h in (run, live, whole)]
    assert keys[2] == keys[0] | keys[1]  # the larger number of each
    assert merge(run, live, length) == whole[-length:]
    assert merge(live, live, 100) == merge([], live, 100) == merge(live, [], 100) == live
    # Within one second the log's events keep their form and order.
    for second in range(6):
        mine = [e for e in live if e.timestamp == second]
        both = [e for e in whole if e.timestamp == second]
        assert both[len(both) - len(mine) :] == mine
