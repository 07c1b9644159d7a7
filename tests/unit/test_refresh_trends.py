"""Refreshing the trend: every engine against a naive count, point-in-time reads, order, faults."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.features import steps as features
from components.refresh_trends import steps as refresh
from feature_repo.event_log import EventLog, NewEvent
from feature_repo.historical import training_features
from feature_repo.store import FeatureReader, FeatureStoreSettings, applied, apply
from model.errors import InputError, UnavailableError
from model.schema import Schema
from model.trends import TrendSnapshot
from tests.clean_tables import PERIOD, START, make_log, naive_count, naive_q, write_clean

WINDOW = 3 * PERIOD
CUT = START + 12 * PERIOD  # the pipeline has seen what is before
ODD = ["it's", '"quoted"', "🎬", "line\nbreak", "100%", "a:b", "\\"]


@pytest.fixture(scope="module")
def rows():
    """A log in which an item appears, one vanishes and ids are odd, sorted as clean tables are."""
    rows = [(f"{r[1]}{ODD[k % 7]}" if k % 5 == 0 else r[1], r) for k, r in enumerate(make_log())]
    rows = [(r[0], item, *r[2:]) for item, r in rows]
    rows = [r for r in rows if not (r[1] == "i0" and r[2] >= CUT)]
    return [*rows, ("u1", "new", CUT + 5 * PERIOD, None, None)]


@pytest.fixture
def everywhere(settings, monkeypatch):
    """A store named by the environment, on both online stores."""
    monkeypatch.setenv("HRNN_FEATURE_ROOT", settings.root)
    monkeypatch.setenv("HRNN_ONLINE_STORE", settings.online)
    monkeypatch.setenv("HRNN_REDIS_URL", settings.redis_url or "")
    return settings


def store_of_the_past(folder, rows, window=WINDOW, store=None, **settings):
    """What a pipeline run on the events before `CUT` leaves; `store`: the environment's."""
    clean = write_clean(folder / "past", [r for r in rows if r[2] < CUT])
    trend = {"period_seconds": PERIOD, "window_seconds": window, "smoothing": 0.5}
    root = "" if store else str(folder / "store")
    features.run(clean, root, trend, settings, folder / "features")
    return store or FeatureStoreSettings(root=root)


def write_events(path, rows):
    stamps = pa.array([r[2] for r in rows], pa.int64())
    pq.write_table(pa.table({"item_id": [r[1] for r in rows], "timestamp": stamps}), path)
    return str(path)


def write_event_log(url, rows):
    log = EventLog.open(url, create=True)
    with log.write() as transaction:
        transaction.append([NewEvent(str(k), r[0], r[1], r[2]) for k, r in enumerate(rows)])
        transaction.put_item("only described", {})
    log.close()


def go(store, source, folder, **settings):
    root = "" if store.online == "redis" else store.root
    return refresh.run(source, root, settings, folder / "refresh")


def assert_naive(snapshot, rows, as_of, window, num_items):
    assert snapshot.as_of == as_of
    assert snapshot.num_items == num_items
    items = {r[1] for r in rows}
    for item in items:
        expected = naive_q(rows, item, as_of, window, 0.5, num_items)[1]
        assert snapshot.dense([item])[0] == pytest.approx(expected, rel=1e-14), item
    counted = {i for i in items if naive_count(rows, i, as_of, window)}
    assert set(snapshot.item_ids) == counted
    mass = np.exp(snapshot.log_q).sum()
    mass += (num_items - len(counted)) * np.exp(snapshot.floor)
    assert mass == pytest.approx(1, abs=1e-12)


SPARK = pytest.mark.skipif(not shutil.which("java"), reason="no Java for Spark")


@pytest.mark.parametrize(
    ("source", "window"),
    [
        *((s, w) for s in ("duckdb", "sqlite", "postgresql") for w in (0, WINDOW, 100)),
        pytest.param("spark", WINDOW, marks=SPARK),
    ],
)
def test_every_engine_counts_as_a_naive_loop_does(tmp_path, request, rows, source, window):
    store = store_of_the_past(tmp_path, rows, window)
    described = {"cold"}
    settings = {}
    if source in ("duckdb", "spark"):
        uri = write_events(tmp_path / "events.parquet", rows)
        settings = {"engine": source}
    else:
        uri = f"sqlite:///{tmp_path}/events.db"
        if source == "postgresql":
            uri = request.getfixturevalue("postgres_server").database()
        write_event_log(uri, rows)
        described.add("only described")
    summary = go(store, uri, tmp_path, **settings)
    as_of = max(r[2] for r in rows) + 1
    snapshot = FeatureReader(store).trend()
    assert_naive(snapshot, rows, as_of, window, len({r[1] for r in rows} | described))
    assert summary["in_force"]
    assert summary["trend_version"] == snapshot.version
    assert summary["events"] == sum(not window or r[2] >= as_of - window for r in rows)
    written = json.loads((tmp_path / "refresh" / "trend.json").read_text())
    assert TrendSnapshot.from_json(written).version == snapshot.version


def test_a_refresh_equals_the_pipelines_own_count(tmp_path, rows):
    store = store_of_the_past(tmp_path, rows)
    clean = write_clean(tmp_path / "whole", rows)
    go(store, str(clean), tmp_path)
    refreshed = FeatureReader(store).trend()
    trend = {"period_seconds": PERIOD, "window_seconds": WINDOW, "smoothing": 0.5}
    features.run(clean, store.root, trend, {}, tmp_path / "features")
    assert FeatureReader(store).trend().version == refreshed.version


def test_training_reads_what_was_in_force_and_serving_reads_the_same(tmp_path, rows, everywhere):
    """After each of several refreshes: offline = online = naive, for every item."""
    from feast import FeatureStore

    store = store_of_the_past(tmp_path, rows, store=everywhere)
    everything = write_events(tmp_path / "events.parquet", rows)
    moments = [CUT + 400, CUT + PERIOD + 1, CUT + 6 * PERIOD, max(r[2] for r in rows) + 1]
    num_items = []
    for moment in moments:
        num_items.append(go(store, everything, tmp_path, as_of=moment)["num_items"])
        items = sorted({r[1] for r in rows if r[2] < moment})
        feast = FeatureStore(config=store.repo_config())
        online = feast.get_online_features(
            features=feast.get_feature_service("training_v2"),
            entity_rows=[{"user_id": "u1", "item_id": i, "catalogue_id": "all"} for i in items],
            full_feature_names=True,
        ).to_dict()
        offline = training_features(store, [("u1", i, moment) for i in items])
        for k, item in enumerate(items):
            count, log_q = naive_q(rows, item, moment, WINDOW, 0.5, num_items[-1])
            assert (online["item_popularity__count"][k] or 0) == count
            assert np.nan_to_num(offline["item_popularity__count"][k]) == count
            assert online["item_trend__log_q"][k] == pytest.approx(log_q, rel=1e-14)
            assert offline["item_trend__log_q"][k] == online["item_trend__log_q"][k]
    # Later refreshes have not changed what training reads of earlier moments.
    for moment, size in zip(moments, num_items, strict=True):
        found = training_features(store, [("u1", "i1", moment), ("u1", "i1", moment + 1)])
        expected = naive_q(rows, "i1", moment, WINDOW, 0.5, size)[1]
        assert found["item_trend__log_q"].tolist() == pytest.approx([expected] * 2, rel=1e-14)


def test_what_a_refresh_adds_is_counted_anew_by_the_next_run(tmp_path, rows):
    store = store_of_the_past(tmp_path, rows)
    clean = write_clean(tmp_path / "whole", rows)
    go(store, str(clean), tmp_path, as_of=CUT + 5)
    go(store, str(clean), tmp_path)
    folder = store.source("item_popularity").parent
    assert len(list(folder.glob("refresh-*.parquet"))) == 2
    assert not [p for p in folder.iterdir() if p.suffix != ".parquet"]
    trend = applied(store)[1].trend.model_dump()
    features.run(clean, store.root, trend, {}, tmp_path / "features")
    assert [p.name for p in folder.iterdir()] == ["history.parquet"]


def test_repeating_changes_nothing_and_older_ones_are_not_put_in_force(tmp_path, rows, everywhere):
    store = store_of_the_past(tmp_path, rows, store=everywhere)
    everything = write_events(tmp_path / "events.parquet", rows)
    first = go(store, everything, tmp_path)
    again = go(store, everything, tmp_path)
    assert (again["trend_version"], again["changed_items"]) == (
        first["trend_version"],
        first["changed_items"],
    )
    assert first["previous_as_of"] < first["as_of"] == again["previous_as_of"]
    older = go(store, everything, tmp_path, as_of=CUT + 9)
    assert not older["in_force"]
    assert FeatureReader(store).trend().version == first["trend_version"]
    files = store.source("item_popularity").parent.glob("refresh-*.parquet")
    assert len(list(files)) == 1


def test_the_snapshot_is_as_long_as_the_pipelines(tmp_path, rows):
    store = store_of_the_past(tmp_path, rows, trend_top_items=3)
    summary = go(store, write_events(tmp_path / "events.parquet", rows), tmp_path)
    assert summary["trend_items"] == 3
    assert len(FeatureReader(store).trend().item_ids) == 3


def test_events_from_the_future_do_not_move_the_window(tmp_path, rows):
    store = store_of_the_past(tmp_path, rows)
    future = ("u1", "i1", int(time.time()) + 40_000, None, None)
    go(store, write_events(tmp_path / "events.parquet", [*rows, future]), tmp_path)
    snapshot = FeatureReader(store).trend()
    num_items = len({r[1] for r in rows} | {"cold"})
    assert_naive(snapshot, rows, max(r[2] for r in rows) + 1, WINDOW, num_items)


@pytest.mark.parametrize("point", ["_add", "write_rows"])
def test_a_refresh_that_dies_half_way_is_mended_by_the_next(tmp_path, rows, monkeypatch, point):
    """Between any two writes the old snapshot is in force, whole; the next refresh completes it."""
    import feature_repo.refresh as module

    store = store_of_the_past(tmp_path, rows)
    everything = write_events(tmp_path / "events.parquet", rows)
    before = FeatureReader(store).trend().version
    real = getattr(module, point)
    for survived in range(3 if point == "write_rows" else 2):
        calls = []

        def die(*arguments, survived=survived, calls=calls):
            if len(calls) == survived:
                raise KeyboardInterrupt
            calls.append(1)
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(module, point, die)
            with pytest.raises(KeyboardInterrupt):
                go(store, everything, tmp_path)
        assert FeatureReader(store).trend().version == before
    go(store, everything, tmp_path)
    num_items = len({r[1] for r in rows} | {"cold"})
    assert_naive(FeatureReader(store).trend(), rows, max(r[2] for r in rows) + 1, WINDOW, num_items)
    assert not [p for p in store.path.iterdir() if p.name.startswith(".")]


def test_a_reader_never_sees_a_mixture(tmp_path, rows, everywhere):
    """Many refreshes while others read: every snapshot read is one that was written, and whole."""
    store = store_of_the_past(tmp_path, rows, store=everywhere)
    everything = write_events(tmp_path / "events.parquet", rows)
    reader = FeatureReader(store)
    written, seen, done = {reader.trend().version}, [], []

    def read():
        while not done:
            snapshot = reader.trend()
            mass = np.exp(snapshot.log_q).sum()
            mass += (snapshot.num_items - len(snapshot.item_ids)) * np.exp(snapshot.floor)
            seen.append((snapshot.version, mass))
        return len(seen)

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for step in range(12):
                summary = go(store, everything, tmp_path, as_of=CUT + 300 * (step + 1))
                written.add(summary["trend_version"])
        finally:
            done.append(1)
        assert all(r.result(60) for r in readers)
    assert {version for version, _ in seen} <= written
    assert [mass for _, mass in seen] == pytest.approx([1.0] * len(seen), abs=1e-12)


class TestProblemsAreNamed:
    def test_no_log(self, tmp_path, rows, monkeypatch):
        store = store_of_the_past(tmp_path, rows)
        monkeypatch.delenv("HRNN_EVENT_LOG", raising=False)
        with pytest.raises(InputError, match="HRNN_EVENT_LOG"):
            go(store, "", tmp_path)
        for uri in (str(tmp_path / "none"), str(tmp_path), str(store.registry_path)):
            with pytest.raises(InputError, match="no events there"):
                go(store, uri, tmp_path)
        with pytest.raises(InputError, match="no event log there"):
            go(store, f"sqlite:///{tmp_path}/none.db", tmp_path)
        with pytest.raises(UnavailableError, match="cannot open the event log"):
            go(store, f"postgresql://u:secret@/db?host={tmp_path}", tmp_path)

    def test_the_environment_names_the_log(self, tmp_path, rows, monkeypatch):
        store = store_of_the_past(tmp_path, rows)
        monkeypatch.setenv("HRNN_EVENT_LOG", write_events(tmp_path / "events.parquet", rows))
        assert go(store, "", tmp_path)["in_force"]

    def test_wrong_and_empty_tables(self, tmp_path, rows):
        store = store_of_the_past(tmp_path, rows)
        with pytest.raises(InputError, match="no events until now"):
            go(store, write_events(tmp_path / "events.parquet", []), tmp_path)
        pq.write_table(pa.table({"item_id": ["a"], "timestamp": [1.5]}), tmp_path / "odd.parquet")
        with pytest.raises(InputError, match="whole Unix seconds"):
            go(store, str(tmp_path / "odd.parquet"), tmp_path)

    def test_a_store_without_a_trend(self, tmp_path, rows):
        everything = write_events(tmp_path / "events.parquet", rows)
        store = FeatureStoreSettings(root=str(tmp_path / "store"))
        with pytest.raises(UnavailableError, match="no feature store"):
            go(store, everything, tmp_path)
        apply(store, Schema())
        with pytest.raises(InputError, match="does not say how trends are counted"):
            go(store, everything, tmp_path)

    def test_a_wrong_setting(self, tmp_path):
        with pytest.raises(InputError, match=r"refresh_trends\.window: no such setting"):
            refresh.run("x", str(tmp_path), {"window": 5}, tmp_path)
