"""Feature store: round trips through a real SQLite online store and a real Redis server."""

import asyncio
import json
import math
import os
import pickletools
import socket
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import redis
from feast.data_source import PushMode
from feast.errors import PushSourceNotFoundException

from feature_repo import connection
from feature_repo.connection import open_store
from feature_repo.event_log import EventLog, NewEvent
from feature_repo.fast_redis import RedisUsers
from feature_repo.historical import training_features
from feature_repo.live import LiveFeatures
from feature_repo.names import SERVING_USER, USER_HISTORY, VIEW_ENTITY, feature_names
from feature_repo.online import protos, write_rows
from feature_repo.refresh import publish_trend
from feature_repo.settings import FeatureStoreSettings, redis_connection
from feature_repo.snapshot import truncate
from feature_repo.store import FeatureReader as AnyReader
from feature_repo.store import (
    Session,
    UserFeatures,
    ViewOptions,
    apply,
    forget,
    materialise,
)
from model.errors import InputError, UnavailableError
from model.query import Event
from model.schema import FieldKind, Schema
from model.trends import TrendSnapshot
from tests.feature_sources import AS_OF, HARSH, SCHEMA, filled, snapshot, write_sources
from tests.feature_store import CheckedReader as FeatureReader

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(settings):
    return filled(settings)


def test_data_of_1998_is_served_exactly_as_written(store):
    reader = FeatureReader(store)
    user = reader.user("u1")
    assert user.known
    assert user.profile == {"age": 30.5, "Lieblings-Farbe": HARSH[0], "tags": HARSH}
    assert user.history == [
        Event(HARSH[1], AS_OF - 10, "play", None),
        Event("i1", AS_OF - 5, None, 4.5),
    ]
    assert reader.user("u2").profile == {"tags": []}  # missing values are absent
    assert reader.user("nobody") == UserFeatures(known=False, profile={}, history=[])


def test_trend_round_trips_bit_for_bit(store):
    rng = np.random.default_rng(0)
    written = snapshot(rng.integers(1, 10**6, 3000).tolist())
    write_sources(store, trend=written)
    materialise(store, AS_OF)
    read = FeatureReader(store).trend()
    assert read.item_ids == written.item_ids
    assert read.log_q.tobytes() == written.log_q.tobytes()
    assert read.log_q.dtype == np.float64
    assert (read.floor, read.as_of, read.window_seconds, read.num_items) == (
        written.floor,
        written.as_of,
        written.window_seconds,
        written.num_items,
    )
    assert read.version == written.version


def test_no_trend_yet_is_none(settings):
    write_sources(settings)
    apply(settings, SCHEMA)
    reader = FeatureReader(settings)
    assert reader.trend() is None
    assert not reader.user("u1").known


def test_a_missing_store_is_unavailable_and_leaves_nothing_behind(tmp_path):
    settings = FeatureStoreSettings(root=str(tmp_path / "nothing"))
    for use in (FeatureReader, lambda s: materialise(s, AS_OF)):
        with pytest.raises(UnavailableError, match="no feature store in"):
            use(settings)
    assert not (tmp_path / "nothing").exists()


def test_a_store_that_breaks_is_unavailable_and_one_that_is_rebuilt_is_used(tmp_path):
    settings = FeatureStoreSettings(root=str(tmp_path))
    write_sources(settings)
    apply(settings, SCHEMA)
    for path in tmp_path.glob("online_store.db*"):
        path.unlink()
    reader = FeatureReader(settings)
    for use in (reader.trend, lambda: reader.user("u1")):
        with pytest.raises(UnavailableError, match="cannot read the trend"):
            use()
    apply(settings, SCHEMA)
    materialise(settings, AS_OF)
    assert reader.trend().as_of == AS_OF
    assert reader.user("u1").known


def of_unequal_columns(settings, user_id):
    row = protos({"item_ids": ["a", "b"], "timestamps": [1], "event_types": [], "event_values": []})
    write_rows(open_store(settings), USER_HISTORY, [(user_id, row, AS_OF)])


def of_milliseconds(settings, user_id):
    """A time that no request may have: asked for with it, the predictor would refuse."""
    at = [1_700_000_000_000]
    row = protos({"item_ids": ["a"], "timestamps": at, "event_types": [], "event_values": []})
    write_rows(open_store(settings), USER_HISTORY, [(user_id, row, AS_OF)])


def of_noise(settings, user_id):
    """Bytes that are no message of Feast's where the history's are."""
    store, noise = open_store(settings), b"\xff\xfe"
    if settings.online == "sqlite":
        with closing(sqlite3.connect(settings.online_path)) as connection, connection:
            changed = connection.execute(
                f"UPDATE {store.project}_{USER_HISTORY} SET value = ?"  # noqa: S608
                " WHERE instr(entity_key, CAST(? AS BLOB)) AND feature_name = 'item_ids'",
                [noise, user_id],
            )
            assert changed.rowcount == 1
        return
    users = RedisUsers(store, store.get_feature_service(SERVING_USER))
    place = users._names.index(f"{USER_HISTORY}__item_ids")
    with redis.Redis.from_url(settings.redis_url) as connection:
        assert connection.hset(users._key(user_id), users._fields[place], noise) == 0


def of_another_type(settings, user_id):
    store = open_store(settings)
    key = RedisUsers(store, store.get_feature_service(SERVING_USER))._key(user_id)
    with redis.Redis.from_url(settings.redis_url) as connection:
        connection.delete(key)
        connection.set(key, "not a hash")


@pytest.mark.parametrize("spoil", [of_unequal_columns, of_milliseconds, of_noise])
def test_a_row_that_cannot_be_read_is_that_users_alone(store, spoil):
    reader = FeatureReader(store)
    before = reader.users(["u1", "u2", "nobody"])
    spoil(store, "u1")
    bad, *others = reader.users(["u1", "u2", "nobody"])
    assert isinstance(bad, UnavailableError) and "row cannot be read" in str(bad)
    assert "u1" not in str(bad)
    assert others == before[1:] and others[0].known
    with pytest.raises(UnavailableError, match="row cannot be read"):
        reader.user("u1")


def test_a_row_that_cannot_be_read_costs_its_neighbours_few_reads(store, monkeypatch):
    users = ["u1", "u2", *(f"stranger {n}" for n in range(62))]
    of_noise(store, "u2")
    reader, reads = FeatureReader(store), []
    read = Session.read
    monkeypatch.setattr(
        Session, "read", lambda self, *of: (reads.append(len(of[-1])), read(self, *of))[1]
    )
    found = AnyReader.users(reader, users)
    assert [k for k, one in enumerate(found) if isinstance(one, UnavailableError)] == [1]
    assert found[0].known
    assert len(reads) <= 2 + 2 * 6  # one for the trend; halves of 64 until it is alone


@pytest.fixture
def redis_store(tmp_path, redis_server):
    url = redis_server.database()
    settings = FeatureStoreSettings(root=str(tmp_path / "f"), online="redis", redis_url=url)
    return filled(settings)


def read_users(settings, *steps):
    """What the asynchronous reader finds: users to read, and functions to call in between."""
    reader = AnyReader(settings)
    reader.trend()

    async def read():
        try:
            return [step() if callable(step) else await reader.read_users(step) for step in steps]
        finally:
            await reader.close()

    return asyncio.run(read())


def test_nor_is_one_of_another_kind_in_redis(redis_store):
    (before,) = read_users(redis_store, ["u1", "u2"])
    store = open_store(redis_store)
    key = RedisUsers(store, store.get_feature_service(SERVING_USER))._key("u1")
    with redis.Redis.from_url(redis_store.redis_url) as connection:
        connection.delete(key)
        connection.set(key, "not a hash")
    ((bad, good),) = read_users(redis_store, ["u1", "u2"])
    assert isinstance(bad, UnavailableError) and good == before[1]


def test_redis_that_refuses_everything_is_no_matter_of_rows(redis_store):
    def allow(sign):
        with redis.Redis.from_url(redis_store.redis_url) as connection:
            connection.acl_setuser("default", enabled=True, commands=[f"{sign}hmget"])

    try:
        with pytest.raises(UnavailableError, match="cannot read users' features"):
            read_users(redis_store, lambda: allow("-"), ["u1", "u2"])
    finally:
        allow("+")
    ((first, second),) = read_users(redis_store, ["u1", "u2"])
    assert first.known and second.known


def test_a_connection_that_went_away_between_reads_costs_none(redis_store):
    def cut():
        with redis.Redis.from_url(redis_store.redis_url) as connection:
            return connection.client_kill_filter(_type="normal", skipme=True)

    first, closed, second = read_users(redis_store, ["u1"], cut, ["u1"])
    assert closed >= 1
    assert first == second and first[0].known


def test_a_new_schema_is_picked_up_by_a_running_reader(store):
    reader = FeatureReader(store)
    assert "age" in reader.user("u1").profile
    apply(store, Schema.parse({"users": {"tags": "multi_categorical"}}))
    reader.trend()
    assert reader.user("u1").profile == {"tags": HARSH}


def test_many_threads_share_a_reader(store):
    reader = FeatureReader(store)
    with ThreadPoolExecutor(8) as pool:
        users = list(pool.map(reader.user, ["u1", "nobody"] * 100))
    assert [u.known for u in users] == [True, False] * 100


def test_the_trend_lags_behind_when_the_log_goes_on(settings):
    """By the log's own time: a log of 1998 that has ended leaves its trend current."""
    hour = 3600
    write_sources(settings, history={"u1": [("i1", AS_OF - 5)], "u2": [("i1", AS_OF + 5 * hour)]})
    apply(settings, SCHEMA, ViewOptions(popularity_ttl_seconds=hour))
    reader = FeatureReader(settings)
    assert reader.trend_lag() == (0, hour)  # nothing was read yet
    materialise(settings, AS_OF + 6 * hour)
    reader.trend()
    reader.user("u1")
    assert reader.trend_lag() == (0, hour)
    reader.user("u2")
    reader.user("u1")
    assert reader.trend_lag() == (5 * hour, hour)
    publish_trend(
        settings, snapshot(as_of=AS_OF + 5 * hour), pa.table({"item_id": ["i0"], "n": [7]}), 0.3
    )
    reader.trend()
    assert reader.trend_lag() == (0, hour)


def test_an_event_from_the_future_counts_until_now_only(settings):
    tomorrow = int(time.time()) + 86_400
    write_sources(settings, history={"u1": [("i1", tomorrow)]})
    apply(settings, SCHEMA)
    materialise(settings, tomorrow + 10)
    reader = FeatureReader(settings)
    reader.user("u1")
    lag, _ = reader.trend_lag()
    assert lag <= time.time() - AS_OF


def test_a_history_silent_for_longer_than_the_ttl_is_not_served(store):
    apply(store, SCHEMA, ViewOptions(history_ttl_seconds=4))
    user = FeatureReader(store).user("u1")  # the last event is 5 s before the snapshot
    assert user.known
    assert user.history == []
    apply(store, SCHEMA, ViewOptions(history_ttl_seconds=5))
    assert len(FeatureReader(store).user("u1").history) == 2


def test_a_history_ages_with_the_log_not_with_the_snapshot_alone(settings):
    """Nobody counts the trend anew, but events go on."""
    history = {"silent": [("i1", AS_OF - 5)], "active": [("i1", AS_OF + 100)]}
    write_sources(settings, history=history)
    apply(settings, SCHEMA, ViewOptions(history_ttl_seconds=50))
    materialise(settings, AS_OF + 200)
    reader = FeatureReader(settings)
    assert len(reader.user("silent").history) == 1
    assert len(reader.user("active").history) == 1
    assert reader.user("silent").history == []


class TestPush:
    """Rows pushed with Feast's own API, by someone who knows nothing of the event log."""

    def row(self, store, user, **values):
        view = open_store(store).get_feature_view("user_profile")
        frame = pd.DataFrame({"user_id": [user], "event_timestamp": [pd.Timestamp.now("UTC")]})
        for feature in view.features:
            frame[feature.name] = [values.get(feature.name)]
        frame["first_seen"] = frame["first_seen"].fillna(AS_OF).astype("int64")
        return frame

    def push(self, store, frame, source="user_profile_push"):
        open_store(store).push(source, frame, to=PushMode.ONLINE)

    def test_a_pushed_profile_is_read_until_the_next_run(self, store):
        reader = FeatureReader(store)
        before = reader.user("u1")
        self.push(store, self.row(store, "u1", age=77.0))
        self.push(store, self.row(store, "pushed", age=5.0))
        assert reader.user("u1").profile == {"age": 77.0}
        assert reader.user("u1").history == before.history
        assert reader.user("pushed").profile == {"age": 5.0}
        materialise(store, AS_OF)
        assert reader.user("u1") == before

    def test_it_cannot_touch_what_the_event_log_says(self, store, tmp_path):
        with closing(EventLog.open(f"sqlite:///{tmp_path}/log.db", create=True)) as log:
            with log.write() as transaction:
                transaction.append([NewEvent("e", "u1", "live", AS_OF + 9)])
                transaction.put_user("u1", {"age": 50})
                transaction.delete_user("u2")
            LiveFeatures(store, log).follow()
        for user in ("u1", "u2"):
            self.push(store, self.row(store, user, age=77.0))
        reader = FeatureReader(store)
        assert reader.user("u1").profile["age"] == 50
        assert reader.user("u1").history[-1].item_id == "live"
        assert reader.user("u2") == UserFeatures(known=False)  # stays deleted
        for source in ("user_live_push", "user_history_push"):
            with pytest.raises(PushSourceNotFoundException):
                self.push(store, self.row(store, "u1"), source)

    def test_half_a_row_is_refused(self, store):
        before = FeatureReader(store).user("u1")
        with pytest.raises(KeyError):
            self.push(store, self.row(store, "u1").drop(columns="age"))
        assert FeatureReader(store).user("u1") == before


class TestMaterialiseAgain:
    def test_another_older_dataset_leaves_nothing_of_the_first(self, store):
        write_sources(store, history={"u1": [("old", 1000)]}, as_of=2000)
        materialise(store, 2000)
        reader = FeatureReader(store)
        assert [e.item_id for e in reader.user("u1").history] == ["old"]
        assert reader.trend().as_of == 2000

    def test_a_correction_of_equal_time_is_served(self, store):
        write_sources(store, trend=snapshot((1, 1, 50)))
        materialise(store, AS_OF)
        assert FeatureReader(store).trend().item_ids[0] == "i2"

    def test_forgotten_users_are_unknown_until_they_return(self, store):
        forget(store, {"user_profile": ["u1"], "user_history": ["u1"], "item_metadata": ["i0"]})
        reader = FeatureReader(store)
        assert reader.user("u1") == UserFeatures(known=False)
        assert reader.user("u2").known
        materialise(store, AS_OF)
        assert reader.user("u1").known


@pytest.mark.parametrize("top", [1, 2, 3, 10])
def test_truncation_keeps_a_distribution(top):
    whole = snapshot((50, 20, 9, 3))
    cut = truncate(whole, top)
    kept = len(cut.item_ids)
    assert kept == min(top, 4)
    assert cut.item_ids == whole.item_ids[:kept]
    mass = np.exp(cut.log_q).sum() + (cut.num_items - kept) * math.exp(cut.floor)
    assert mass == pytest.approx(1, abs=1e-14)
    assert cut.floor <= cut.log_q[-1]
    if top >= 4:
        assert cut is whole


def test_truncation_of_a_catalogue_that_is_all_counted():
    whole = TrendSnapshot(("a", "b"), np.log([0.75, 0.25]), -50.0, 1, 0, num_items=2)
    assert truncate(whole, 1).floor == pytest.approx(math.log(0.25))


def test_field_names_feast_cannot_take_are_escaped():
    kinds = dict.fromkeys(
        ["age", "user_id", "a b", "a-b", "x:y", "größe", "company_y", "__", "1st", "Count"],
        FieldKind.NUMERIC,
    )
    names = feature_names(kinds)
    assert names["age"] == "age"
    assert len(set(names.values())) == len(names)
    for field, name in names.items():
        if field != "age":
            assert name.isidentifier()
            assert name.startswith("field_")
            assert not name.endswith("_y")


def test_fields_that_differ_only_in_case_are_refused():
    with pytest.raises(InputError, match="'Age' and 'age'"):
        feature_names({"Age": FieldKind.NUMERIC, "age": FieldKind.NUMERIC})


def test_views_have_ttl_owner_and_description_and_services_are_versioned(tmp_path):
    from feature_repo.definitions import build

    definitions = build(tmp_path, Schema(), ViewOptions())
    assert list(definitions.views) == list(VIEW_ENTITY)
    for view in definitions.views.values():
        assert view.owner
        assert view.description
        assert view.ttl is not None
        assert view.features  # also without any field in the schema
    assert list(definitions.services) == [
        "serving_user_v2",
        "serving_user_v1",
        "serving_trend_v1",
        "training_v2",
    ]


def test_on_demand_features_put_a_name_into_the_registry_and_serving_never_loads_it(
    store, monkeypatch
):
    """Feast would unpickle code from the registry; ours is only the path of a function."""
    import dill

    from feature_repo.on_demand import item_log_q

    operations = [op.name for op, _, _ in pickletools.genops(dill.dumps(item_log_q, recurse=True))]
    assert "REDUCE" not in operations and "BUILD" not in operations  # nothing but a look-up
    monkeypatch.setattr("dill.loads", lambda *_: pytest.fail("unpickled"))
    reader = FeatureReader(store)
    assert reader.user("u1").known
    assert reader.trend() is not None


class TestRegistryInADatabase:
    @pytest.fixture(params=["sqlite", "postgresql"])
    def settings(self, request, tmp_path):
        if request.param == "sqlite":
            url = f"sqlite:///{tmp_path}/registry-of-all.db"
        else:
            url = request.getfixturevalue("postgres_server").database()
        return FeatureStoreSettings(root=str(tmp_path / "features"), registry_url=url)

    def test_it_serves_and_trains_as_a_file_does(self, settings):
        write_sources(settings)
        with pytest.raises(UnavailableError, match="no feature store in"):
            FeatureReader(settings)
        apply(settings, SCHEMA)
        materialise(settings, AS_OF)
        assert not settings.registry_path.exists()
        reader = FeatureReader(settings)
        assert reader.user("u1").profile["tags"] == HARSH
        assert reader.trend().version == snapshot().version
        found = training_features(settings, [("u1", "i0", AS_OF), ("u2", "never", AS_OF)])
        assert found["item_popularity__count"][0] == 7
        assert found["item_trend__log_q"].tolist() == pytest.approx(
            [math.log(7.5 / 10.5), math.log(0.5 / 10.5)]
        )

    def test_a_running_reader_notices_a_new_schema_at_once(self, settings):
        """Also within the second that Feast's own times are of."""
        filled(settings)
        reader = FeatureReader(settings)
        assert "age" in reader.user("u1").profile
        apply(settings, Schema.parse({"users": {"tags": "multi_categorical"}}))
        reader.trend()
        assert reader.user("u1").profile == {"tags": HARSH}

    def test_a_registry_that_is_away_changes_nothing_for_readers(self, settings, monkeypatch):
        filled(settings)
        reader = FeatureReader(settings)
        engine = connection._registry_engine(settings.registry_url)
        with engine.begin() as database:  # as if somebody had dropped it
            database.exec_driver_sql("ALTER TABLE feature_services RENAME TO gone")
        try:
            assert reader.trend().version == snapshot().version
            assert reader.user("u1").known
            with pytest.raises(UnavailableError):
                FeatureReader(settings)
        finally:
            with engine.begin() as database:
                database.exec_driver_sql("ALTER TABLE gone RENAME TO feature_services")
        assert FeatureReader(settings).user("u1").known

    @pytest.mark.parametrize("url", ["mysql://u:secret@h/db", "registry.db", "s3://b/registry"])
    def test_other_addresses_are_refused_without_repeating_them(self, url):
        with pytest.raises(InputError, match="is not sqlite:///PATH or postgresql") as error:
            FeatureStoreSettings.parse({"root": "/f", "registry_url": url}, "feature store")
        assert "secret" not in str(error.value)


class TestSettings:
    def test_from_env(self):
        env = {"HRNN_FEATURE_ROOT": "/f", "HRNN_ONLINE_STORE": "", "HRNN_REDIS_URL": ""}
        assert FeatureStoreSettings.from_env(env) == FeatureStoreSettings(root="/f")
        whole = FeatureStoreSettings(root="/f", online="redis", redis_url="redis://:secret@h")
        assert FeatureStoreSettings.from_env(whole.to_env()) == whole
        plain = FeatureStoreSettings(root="/f")
        assert FeatureStoreSettings.from_env(os.environ | plain.to_env()) == plain
        with pytest.raises(InputError, match="HRNN_FEATURE_ROOT"):
            FeatureStoreSettings.from_env({})
        with pytest.raises(InputError, match="needs redis_url"):
            FeatureStoreSettings.from_env({"HRNN_FEATURE_ROOT": "/f", "HRNN_ONLINE_STORE": "redis"})

    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("redis://h", "h:6379,db=0"),
            ("redis://:p%40ss@h:7/2", "h:7,db=2,password=p@ss"),
            ("rediss://me:x@h:7", "h:7,db=0,username=me,password=x,ssl=true"),
            ("h:7,db=1", "h:7,db=1"),
        ],
    )
    def test_redis_addresses(self, url, expected):
        head, *options = redis_connection(url).split(",")
        assert head == expected.split(",")[0]
        assert set(expected.split(",")[1:]) <= set(options)
        assert "socket_timeout=5" in options

    @pytest.mark.parametrize("url", ["h", "redis://", "redis://h:port", "redis://:a,b@h:1"])
    def test_bad_redis_addresses_are_refused_without_repeating_them(self, url):
        with pytest.raises(InputError) as error:
            redis_connection(url)
        assert "a,b" not in str(error.value)


def test_an_unreachable_redis_is_unavailable_without_its_password(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # bound but not listening: refused at once
        url = f"redis://:secret@127.0.0.1:{sock.getsockname()[1]}"
        settings = FeatureStoreSettings(root=str(tmp_path), online="redis", redis_url=url)
        write_sources(settings)
        apply(settings, SCHEMA)
        reader, started = FeatureReader(settings), time.monotonic()
        with pytest.raises(UnavailableError) as error:
            reader.user("u1")
    assert time.monotonic() - started < 1  # no retries: the caller has its own fallback
    assert "secret" not in str(error.value)


def test_feasts_own_command_line_applies_the_same_definitions(tmp_path):
    settings = FeatureStoreSettings(root=str(tmp_path))
    write_sources(settings)
    apply(settings, SCHEMA)
    settings.registry_path.unlink()
    environment = {**os.environ, "HRNN_FEATURE_ROOT": str(tmp_path), "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", "from feast.cli.cli import cli; cli()"]
    done = subprocess.run(
        [*command, "-c", str(REPO / "feature_repo"), "apply"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    materialise(settings, AS_OF)
    user = FeatureReader(settings).user("u1")
    assert user.profile["Lieblings-Farbe"] == HARSH[0]
    assert json.loads((tmp_path / "applied.json").read_text())["options"]["history_length"] == 100
