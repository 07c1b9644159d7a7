"""log q(t): leak-free, normalised, chosen by the data."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import columns, trend_table
from model.errors import InputError
from model.trend_table import TrendTable
from model.trends import (
    DAY,
    HOUR,
    ResolvedTrend,
    TrendSettings,
    TrendSnapshot,
    _prequential_log_likelihood,
    choose_trend,
    items_for_choice,
    snapshot_from_counts,
)

logs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 300)), min_size=1, max_size=60)


def naive_log_q(item, time, num_items, period, window, smoothing, now):
    start = now // period * period
    counts = np.full(num_items, smoothing)
    for j, t in zip(item, time, strict=True):
        if t < start and (window == 0 or t >= start - window):
            counts[j] += 1
    return np.log(counts / counts.sum())


@settings(deadline=None)
@given(log=logs, period=st.integers(1, 50), window=st.integers(0, 120), now=st.integers(0, 300))
def test_table_equals_the_naive_count(log, period, window, now):
    item, time = (np.array(column) for column in zip(*log, strict=True))
    trend = ResolvedTrend(period, window, 0.5)
    table = TrendTable.build(item, time, 5, trend, np.array([now // period]))
    row = table.log_q_PM[table.row_of(np.array([now]))[0]]
    np.testing.assert_allclose(row, naive_log_q(item, time, 5, period, window, 0.5, now), rtol=1e-6)


@settings(deadline=None)
@given(
    log=logs,
    period=st.integers(1, 50),
    window=st.integers(0, 120),
    events=st.integers(1, 9),
    own=st.booleans(),
)
def test_a_table_is_the_same_however_few_events_are_counted_at_once(
    log, period, window, events, own
):
    item, time = (np.array(column) for column in zip(*log, strict=True))
    given = (item, time, 5, ResolvedTrend(period, window, 0.5), np.array([3, 8]), own)
    whole = TrendTable.build(*given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trend_table, "RANGE_EVENTS", events)
        patch.setattr(trend_table, "READ_EVENTS", events)
        patch.setattr(columns, "FILE_EVENTS", 4)
        table = TrendTable.build(*given)
        np.testing.assert_array_equal(table.log_q_PM, whole.log_q_PM)
    for name in ("period_P", "total_P", "offset_M1", "row_Z", "delta_Z", "count_Z"):
        np.testing.assert_array_equal(getattr(table, name), getattr(whole, name))


@settings(deadline=None)
@given(log=logs, period=st.integers(1, 50), window=st.integers(0, 120), seed=st.integers(0, 9))
def test_parts_of_the_table_equal_the_table(log, period, window, seed):
    item, time = (np.array(column) for column in zip(*log, strict=True))
    table = TrendTable.build(item, time, 5, ResolvedTrend(period, window, 0.5))
    whole = torch.from_numpy(table.log_q_PM)
    generator = torch.Generator().manual_seed(seed)
    row_N = torch.randint(len(whole), (7,), generator=generator)
    item_N = torch.randint(5, (7,), generator=generator)
    torch.testing.assert_close(table.at(row_N, item_N), whole[row_N, item_N])
    row_U, item_S = row_N.unique(), torch.tensor([4, 0, 3])
    torch.testing.assert_close(table.rows(row_U), whole[row_U])
    torch.testing.assert_close(table.columns(row_U, item_S), whole[row_U][:, item_S])


def test_memory_of_a_table_follows_the_events():
    rng = np.random.default_rng(0)
    item, time = rng.integers(0, 10**6, 500), rng.integers(0, 10**4, 500) * HOUR
    table = TrendTable.build(item, time, 10**6, ResolvedTrend(HOUR, DAY, 1.0))
    assert len(table.row_Z) <= 2 * len(item)
    rows = torch.from_numpy(table.row_of(time))
    log_q = table.at(rows, torch.from_numpy(item))
    assert log_q.isfinite().all() and float(log_q.exp().max()) < 1e-5


@settings(deadline=None)
@given(log=logs, period=st.integers(1, 50), window=st.integers(0, 120))
def test_likelihood_of_the_choice_equals_the_naive_sum(log, period, window):
    log = sorted(log, key=lambda event: event[1])
    item, time = (np.array(column) for column in zip(*log, strict=True))
    naive = [
        sum(naive_log_q(item, time, 5, period, window, alpha, t)[j] for j, t in log)
        for alpha in (0.5, 2.0)
    ]
    value = _prequential_log_likelihood(item, time, 5, period, window, (0.5, 2.0))
    assert value.tolist() == pytest.approx(naive)


@settings(max_examples=30, deadline=None)
@given(log=logs, period=st.integers(1, 50), cut=st.integers(0, 300), seed=st.integers(0, 99))
def test_no_event_at_or_after_the_period_start_matters(log, period, cut, seed):
    item, time = (np.array(column) for column in zip(*log, strict=True))
    start = cut // period * period
    other = item.copy()
    later = time >= start
    other[later] = np.random.default_rng(seed).integers(0, 5, later.sum())
    trend = ResolvedTrend(period, 0, 1.0)
    rows = [
        TrendTable.build(i, time, 5, trend, np.array([cut // period])).log_q_PM[
            np.searchsorted(np.union1d(time // period, [cut // period]), cut // period)
        ]
        for i in (item, other)
    ]
    np.testing.assert_array_equal(*rows)


def test_news_gets_hours_and_films_the_whole_past():
    rng = np.random.default_rng(0)
    hours = np.repeat(np.arange(24 * 14), 100)
    time = hours * HOUR + rng.integers(0, HOUR, len(hours))
    news = (hours + rng.integers(0, 3, len(hours))) % 50  # the top items move on every hour
    fast = choose_trend(news, time, 50, TrendSettings())
    assert fast.period_seconds == HOUR
    assert 0 < fast.window_seconds <= 6 * HOUR
    films = rng.choice(50, p=(p := np.arange(1, 51) / np.arange(1, 51).sum()), size=len(time))
    assert p.sum() == pytest.approx(1)
    assert choose_trend(films, time, 50, TrendSettings()).window_seconds == 0
    fixed = TrendSettings(period_seconds=DAY, window_seconds=7 * DAY)
    resolved = choose_trend(films, time, 50, fixed)
    assert resolved.period_seconds == DAY and resolved.window_seconds == 7 * DAY
    fixed = TrendSettings(period_seconds=DAY, window_seconds=7 * DAY, smoothing=2.0)
    assert choose_trend(films, time, 50, fixed) == ResolvedTrend(DAY, 7 * DAY, 2.0)


def test_smoothing_does_not_drown_a_short_window():
    """Of 5,000 articles a few are read in an hour: one pseudo-count each would outweigh them."""
    rng = np.random.default_rng(0)
    hours = np.repeat(np.arange(24 * 7), 100)
    time = hours * HOUR + rng.integers(0, HOUR, len(hours))
    item = (hours + rng.integers(0, 3, len(hours))) * 7 % 5000
    resolved = choose_trend(item, time, 5000, TrendSettings())
    assert resolved.window_seconds == HOUR and resolved.smoothing < 0.2


def test_of_a_long_log_the_choice_sees_a_sample_of_items_and_chooses_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    hours = np.repeat(np.arange(24 * 14), 400)
    time = hours * HOUR + rng.integers(0, HOUR, len(hours))
    item = (hours + rng.integers(0, 3, len(hours))) % 50
    ids = [f"item {j}" for j in range(50)]
    whole = choose_trend(item, time, 50, TrendSettings())
    assert items_for_choice(ids, len(item)).all()
    monkeypatch.setattr("model.trends.MAX_CHOICE_EVENTS", len(item) // 3)
    monkeypatch.setattr("model.trends.MIN_CHOICE_ITEMS", 5)
    chosen_M = items_for_choice(ids, len(item))
    assert chosen_M.sum() == 17
    order = rng.permutation(50)  # whatever the order of the catalogue, the items are the same
    assert items_for_choice([ids[j] for j in order], len(item)).tolist() == chosen_M[order].tolist()
    seen = chosen_M[item]
    position = np.cumsum(chosen_M) - 1
    sample = choose_trend(position[item[seen]], time[seen], 17, TrendSettings(), table_items=50)
    assert sample == whole
    assert items_for_choice(ids, 10**12).sum() == 5  # never too few to say something
    assert items_for_choice(ids[:3], 10**12).all()


def test_the_choice_fits_the_table_of_the_whole_catalogue():
    time = np.arange(0, 60 * DAY, 600)
    item = np.zeros(len(time), dtype=np.int64)
    assert choose_trend(item, time, 1, TrendSettings()).period_seconds == HOUR
    large = choose_trend(item, time, 1, TrendSettings(), table_items=2**27 // 100)
    assert large.period_seconds == DAY


@pytest.mark.parametrize("smoothing", [0.0, -1.0, float("nan"), float("inf")])
def test_every_item_has_a_trend(smoothing):
    """Without smoothing log q of an item nobody used is −∞."""
    with pytest.raises(InputError, match="smoothing"):
        TrendSettings.parse({"smoothing": smoothing})


def test_snapshot_is_a_distribution_and_round_trips():
    snapshot = snapshot_from_counts(
        ["b", "a", "c"], [5, 5, 1], num_items=10, smoothing=0.5, as_of=7, window_seconds=0
    )
    assert snapshot.item_ids == ("a", "b", "c")  # ties by id
    assert np.exp(snapshot.log_q).sum() + 7 * np.exp(snapshot.floor) == pytest.approx(1)
    again = TrendSnapshot.from_json(snapshot.to_json())
    np.testing.assert_array_equal(again.log_q, snapshot.log_q)
    assert again.version == snapshot.version
    assert snapshot.dense(["c", "zz"]).tolist() == [snapshot.log_q[2], snapshot.floor]
