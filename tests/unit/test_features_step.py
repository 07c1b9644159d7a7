"""Features step: sources against naive loops, point-in-time joins, online = offline, re-runs."""

import json
from contextlib import closing
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.features.steps import FeaturesSettings, run
from feature_repo.event_log import EventLog, NewEvent
from feature_repo.historical import training_features
from feature_repo.live import LiveFeatures
from feature_repo.names import feature_names
from feature_repo.store import FeatureReader, FeatureStoreSettings
from model.errors import InputError
from model.query import Event
from model.trends import TrendSnapshot
from tests.clean_tables import (
    HARSH,
    PERIOD,
    START,
    make_log,
    naive_count,
    naive_q,
    write_clean,
)


def execute(tmp_path, rows, window=0, settings=None, **clean):
    folder = write_clean(tmp_path / "clean", rows, **clean)
    trend = {"period_seconds": PERIOD, "window_seconds": window, "smoothing": 0.5}
    out = tmp_path / "out"
    summary = run(folder, str(tmp_path / "store"), trend, settings or {}, out)
    return summary, FeatureStoreSettings(root=str(tmp_path / "store"))


@pytest.mark.parametrize("window", [0, PERIOD, 3 * PERIOD, 2 * PERIOD + 123, 100])
def test_popularity_at_any_moment_equals_a_naive_loop(tmp_path, window):
    rows = make_log()
    summary, settings = execute(tmp_path, rows, window)
    num_items = len({r[1] for r in rows} | {"cold"})
    assert summary["num_items"] == num_items
    as_of = max(r[2] for r in rows) + 1
    asked = [(r[0], r[1], r[2]) for r in rows]
    boundary = (START // PERIOD + 5) * PERIOD
    asked += [("u0", "i1", boundary + d) for d in (-1, 0, 1)] + [("nobody", "i1", boundary)]
    asked += [("u1", "i1", as_of), ("u1", "never seen", as_of), ("u1", "cold", as_of)]
    found = training_features(settings, asked)
    rows_start = min(r[2] for r in rows)
    assert len(found) == len(asked)  # no entity row is lost
    for (_, item, second), row in zip(asked, found.itertuples(), strict=True):
        moment = as_of if second == as_of else second // PERIOD * PERIOD
        count, log_q = naive_q(rows, item, moment, window, 0.5, num_items)
        if naive_count(rows, item, moment, 0) == 0:  # not seen before the period: no row
            assert np.isnan(row.item_popularity__count)
        else:
            assert row.item_popularity__count == count
        if second // PERIOD == rows_start // PERIOD:  # before the first count there is no share
            assert np.isnan(row.item_trend__log_q)
        else:
            assert row.item_trend__log_q == pytest.approx(log_q, rel=1e-14)


@pytest.mark.parametrize("window", [0, 3 * PERIOD])
def test_popularity_rows_grow_with_events_not_with_periods(tmp_path, window):
    rows = [("u1", f"i{j % 3}", START + j * 500 * PERIOD) for j in range(12)]
    summary, settings = execute(tmp_path, [(*r, None, None) for r in rows], window, users=False)
    assert summary["rows"]["item_popularity"] <= (2 if window else 1) * len(rows)
    assert summary["rows"]["catalogue_popularity"] > 11 * 500
    asked = [("u1", item, START + k * 250 * PERIOD) for k in range(1, 22) for item in ("i0", "i2")]
    found = training_features(settings, asked)["item_trend__log_q"]
    for (_, item, second), log_q in zip(asked, found, strict=True):
        moment = second // PERIOD * PERIOD
        expected = naive_q(rows, item, moment, window, 0.5, summary["num_items"])[1]
        assert log_q == pytest.approx(expected, rel=1e-14)


def test_events_at_or_after_a_periods_start_change_nothing_before(tmp_path):
    rows = make_log()
    cut = (START // PERIOD + 8) * PERIOD
    asked = [(r[0], r[1], r[2]) for r in rows if r[2] < cut + PERIOD]
    _, whole = execute(tmp_path / "whole", rows, 3 * PERIOD, extra_items=[r[1] for r in rows])
    # Everything from the period's start on is another item's, still in the same log.
    other = [(r[0], "i0" if r[2] >= cut else r[1], *r[2:]) for r in rows]
    _, changed = execute(tmp_path / "changed", other, 3 * PERIOD, extra_items=[r[1] for r in rows])
    columns = ["item_popularity__count", "item_trend__log_q"]
    a, b = training_features(whole, asked)[columns], training_features(changed, asked)[columns]
    pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize("window", [0, 3 * PERIOD])
def test_training_and_serving_agree_at_the_same_moment(tmp_path, window):
    from feast import FeatureStore

    rows = make_log()
    summary, settings = execute(tmp_path, rows, window)
    items = sorted({r[1] for r in rows})
    trained = training_features(settings, [("u1", item, summary["as_of"]) for item in items])
    store = FeatureStore(config=settings.repo_config())
    served = store.get_online_features(
        features=store.get_feature_service("training_v2"),
        entity_rows=[{"user_id": "u1", "item_id": item, "catalogue_id": "all"} for item in items],
        full_feature_names=True,
    ).to_dict()
    features = [name for name in served if "__" in name]
    assert len(features) == 11
    for name in features:
        for offline, online in zip(trained[name], served[name], strict=True):
            if isinstance(offline, np.ndarray):
                assert offline.tolist() == online
            else:
                assert offline == online or (pd.isna(offline) and online is None)
    snapshot = FeatureReader(settings).trend()
    np.testing.assert_allclose(
        snapshot.dense(items), served["item_trend__log_q"], rtol=1e-14, atol=0
    )
    for item in [*items, "cold"]:
        expected = naive_q(rows, item, summary["as_of"], window, 0.5, summary["num_items"])[1]
        assert snapshot.dense([item])[0] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("batch", [1, 7, 29, 10_000])
def test_histories_are_the_newest_events_in_the_logs_order(tmp_path, monkeypatch, batch):
    monkeypatch.setattr("components.features.sources._HISTORY_ROWS", batch)
    rows = make_log(users=6)
    summary, settings = execute(tmp_path, rows, settings={"history_length": 30})
    reader = FeatureReader(settings)
    for user in {r[0] for r in rows}:
        own = [Event(r[1], r[2], r[3], r[4]) for r in rows if r[0] == user]
        assert reader.user(user).history == own[-30:]
    assert summary["rows"]["user_history"] == 6


def test_profiles_carry_odd_names_and_odd_text(tmp_path):
    rows = make_log()
    _, settings = execute(tmp_path, rows)
    reader = FeatureReader(settings)
    ids = [*sorted({r[0] for r in rows})[1:], "silent"]
    for j, user in enumerate(ids[:-2]):
        assert reader.user(user).profile == {"Some field, odd": HARSH[j % 7], "tags": HARSH}
    assert reader.user(ids[-2]).profile["tags"] == []
    silent = reader.user("silent")
    assert silent.known
    assert silent.profile["tags"] == ["a"]
    assert silent.history == []
    undescribed = reader.user(sorted({r[0] for r in rows})[0])
    assert undescribed.known
    assert undescribed.profile == {"tags": []}


def test_interactions_alone_are_enough(tmp_path):
    rows = [(r[0], r[1], r[2]) for r in make_log()]
    folder = tmp_path / "clean"
    write_clean(folder, make_log(), users=False, items=False)
    table = pq.read_table(folder / "interactions.parquet", columns=["user_id", "item_id"])
    stamps = pa.array([r[2] for r in rows], pa.int64())
    pq.write_table(table.append_column("timestamp", stamps), folder / "interactions.parquet")
    summary = run(  # trend is chosen
        folder, str(tmp_path / "store"), {}, {}, tmp_path / "out"
    )
    assert summary["trend"]["period_seconds"]
    reader = FeatureReader(FeatureStoreSettings(root=str(tmp_path / "store")))
    user = reader.user("u3")
    assert user.known
    assert user.profile == {}
    assert {(e.event_type, e.value) for e in user.history} == {(None, None)}
    assert not reader.user("u99").known


def test_outputs_describe_what_was_stored(tmp_path, capsys):
    rows = make_log()
    summary, settings = execute(tmp_path, rows, settings={"trend_top_items": 4})
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    stored = FeatureReader(settings).trend()
    written = TrendSnapshot.from_json(json.loads((tmp_path / "out" / "trend.json").read_text()))
    assert stored.version == written.version == summary["trend_version"]
    assert len(stored.item_ids) == 4
    assert np.exp(stored.log_q).sum() + (stored.num_items - 4) * np.exp(
        stored.floor
    ) == pytest.approx(1, abs=1e-14)
    for view, count in summary["rows"].items():
        assert pq.read_metadata(settings.source(view)).num_rows == count
        assert summary["online_rows"][view] <= count
    assert "item_popularity:" in capsys.readouterr().out


def test_a_rerun_changes_nothing_and_a_smaller_log_forgets(tmp_path):
    rows = make_log()
    first, settings = execute(tmp_path, rows)
    with closing(EventLog.open(f"sqlite:///{tmp_path}/events.db", create=True)) as log:
        with log.write() as transaction:
            transaction.append([NewEvent("e1", "live only", "i1", first["as_of"])])
        LiveFeatures(settings, log).follow()
    before = {v: _content(settings.source(v)) for v in first["rows"]}
    again, _ = execute(tmp_path, rows)
    assert again["trend_version"] == first["trend_version"]
    assert again["forgotten"] == {}
    assert {v: _content(settings.source(v)) for v in first["rows"]} == before
    reader = FeatureReader(settings)
    assert reader.user("u1").known
    remaining = [r for r in rows if r[0] != "u1"]
    third, _ = execute(tmp_path, remaining)
    assert third["forgotten"]["user_profile"] == third["forgotten"]["user_history"] == 1
    assert not reader.user("u1").known
    assert reader.user("u2").known
    assert reader.user("live only").known  # never was in a log
    assert not [p for p in settings.path.iterdir() if p.name.startswith(".")]


def test_a_run_that_dies_before_replacing_sources_is_repaired_by_the_next(tmp_path, monkeypatch):
    rows = make_log()
    _, settings = execute(tmp_path, rows)
    remaining = [r for r in rows if r[0] != "u1"]

    def die(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("feature_repo.store.forget", die)
        with pytest.raises(RuntimeError):
            execute(tmp_path, remaining)
    reader = FeatureReader(settings)
    assert reader.user("u1").known  # the old state still stands
    execute(tmp_path, remaining)
    assert not reader.user("u1").known


def test_too_many_popularity_rows_drop_the_earliest_periods(tmp_path, capsys):
    rows = make_log()
    whole, _ = execute(tmp_path / "whole", rows)
    limit = whole["rows"]["item_popularity"] // 2
    summary, settings = execute(tmp_path, rows, settings={"popularity_max_rows": limit})
    items = len({r[1] for r in rows})
    assert limit - items < summary["rows"]["item_popularity"] <= limit
    assert "left out" in capsys.readouterr().out
    newest = pq.read_table(settings.source("item_popularity"))["event_timestamp"].to_pylist()
    assert max(newest) == datetime.fromtimestamp(summary["as_of"], UTC)
    few, _ = execute(tmp_path / "few", rows, settings={"popularity_max_rows": 1})
    assert few["rows"]["item_popularity"] == items  # the moment serving reads always stays


def test_problems_are_named(tmp_path):
    empty = write_clean(tmp_path / "empty", make_log())
    table = pq.read_table(empty / "interactions.parquet")
    pq.write_table(table.slice(0, 0), empty / "interactions.parquet")
    with pytest.raises(InputError, match="no interactions"):
        run(empty, str(tmp_path / "store"), {}, {}, tmp_path / "out")
    with pytest.raises(InputError, match=r"features\.history: no such setting"):
        run(empty, "", {}, {"history": 1}, tmp_path / "out")
    assert FeaturesSettings().history_length == 100


def test_an_empty_store_name_means_the_environments(tmp_path, monkeypatch):
    folder = write_clean(tmp_path / "clean", make_log())
    monkeypatch.delenv("HRNN_FEATURE_ROOT", raising=False)
    with pytest.raises(InputError, match="HRNN_FEATURE_ROOT"):
        run(folder, "", {}, {}, tmp_path / "out")
    monkeypatch.setenv("HRNN_FEATURE_ROOT", str(tmp_path / "store"))
    run(folder, "", {"period_seconds": PERIOD}, {}, tmp_path / "out")
    assert FeatureReader(FeatureStoreSettings.from_env()).user("u1").known


def test_titles_and_created_at_reach_the_item_view(tmp_path):
    rows = make_log()
    _, settings = execute(tmp_path, rows)
    table = pq.read_table(settings.source("item_metadata")).to_pylist()
    by_id = {r["item_id"]: r for r in table}
    assert by_id["cold"]["title"] == "Title cold"
    assert by_id["cold"]["first_seen"] == START - 100
    last = max(by_id)  # its created_at is missing
    assert by_id[last]["first_seen"] == min(r[2] for r in rows if r[1] == last)
    assert set(feature_names({"year": "numeric"}).values()) <= set(by_id["cold"])


def _content(path):
    return sorted(map(str, pq.read_table(path).to_pylist()))  # as text: NaN equals NaN
