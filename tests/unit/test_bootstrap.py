"""Intervals: known coverage, a brute-force twin, and the cost for many users."""

import time

import numpy as np
import pytest

from model.bootstrap import (
    UserSums,
    comparisons_of,
    intervals,
    paired_difference,
    paired_ratio,
)


def clustered(rng, num_users, spread=1.0, noise=1.0):
    """Cases of users who differ: value = user's own mean + noise, 1 to 9 cases each."""
    user_N = np.repeat(np.arange(num_users), rng.integers(1, 10, size=num_users))
    own_U = rng.normal(0.0, spread, size=num_users)
    return own_U[user_N] + rng.normal(0.0, noise, size=len(user_N)), user_N


def test_resampling_equals_drawing_whole_users_by_hand():
    rng = np.random.default_rng(0)
    value_N, user_N = clustered(rng, 12)
    other_N = np.where(rng.random(len(value_N)) < 0.5, np.nan, value_N)  # a slice
    got_RX = UserSums.of([value_N, other_N], user_N, 12).resampled(samples=20, seed=3)
    draws = np.random.default_rng(3)
    for got_X in got_RX:
        drawn = draws.integers(12, size=12)
        cases = np.concatenate([np.flatnonzero(user_N == u) for u in drawn])
        assert got_X[0] == pytest.approx(value_N[cases].mean())
        assert got_X[1] == pytest.approx(np.nanmean(other_N[cases]))


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered, naive = 0, 0
    for trial in range(300):
        value_N, user_N = clustered(rng, 80)
        [interval] = intervals(UserSums.of([value_N], user_N, 80), samples=300, seed=trial)
        covered += interval.low <= 0.0 <= interval.high
        # Cases taken for independent: the interval is too narrow, which is why users are drawn.
        each = UserSums.of([value_N], np.arange(len(value_N)), len(value_N))
        [interval] = intervals(each, samples=300, seed=trial)
        naive += interval.low <= 0.0 <= interval.high
    assert 0.90 <= covered / 300 <= 0.98
    assert naive / 300 < 0.80


def test_ppl_interval_is_the_exponential_of_the_means():
    value_N, user_N = clustered(np.random.default_rng(2), 30)
    sums = UserSums.of([value_N], user_N, 30)
    [plain], [ppl] = intervals(sums), intervals(sums, np.exp)
    assert ppl.value == pytest.approx(np.exp(value_N.mean()))
    # Percentiles between two resamplings are interpolated after the exponential: nearly equal.
    np.testing.assert_allclose([ppl.low, ppl.high], np.exp([plain.low, plain.high]), rtol=1e-3)


def test_pairing_sees_what_separate_intervals_cannot():
    rng = np.random.default_rng(3)
    value_N, user_N = clustered(rng, 100, spread=3.0)
    better_N = value_N - 0.2 + rng.normal(0.0, 0.1, size=len(value_N))
    difference = paired_difference(better_N, value_N, user_N)
    ratio = paired_ratio(better_N, value_N, user_N)
    assert difference.excludes_zero and ratio.excludes_zero
    assert difference.low < -0.2 < difference.high
    assert ratio.value == pytest.approx(np.exp(difference.value))
    one, other = intervals(UserSums.of([better_N, value_N], user_N, 100))
    assert one.high > other.low


def test_equal_models_are_told_apart_as_rarely_as_they_should():
    rng = np.random.default_rng(4)
    wrong = 0
    for trial in range(200):
        value_N, user_N = clustered(rng, 60)
        other_N = value_N + rng.normal(size=60)[user_N]  # users prefer one or the other
        wrong += paired_difference(value_N, other_N, user_N, samples=200, seed=trial).excludes_zero
    assert wrong / 200 < 0.12


def test_a_model_against_itself_shows_no_difference():
    value_N, user_N = clustered(np.random.default_rng(5), 20)
    same = paired_ratio(value_N, value_N, user_N)
    assert (same.value, same.low, same.high, same.excludes_zero) == (1.0, 1.0, 1.0, False)


def test_results_depend_on_the_seed_alone(monkeypatch):
    value_N, user_N = clustered(np.random.default_rng(6), 20)
    sums = UserSums.of([value_N], user_N, 20)
    whole = sums.resampled(seed=1)
    monkeypatch.setattr("model.bootstrap.WEIGHT_CELLS", 50)
    np.testing.assert_allclose(sums.resampled(seed=1), whole)
    assert not np.allclose(sums.resampled(seed=2), whole)


def test_figures_without_cases_are_nan_and_do_not_disturb_the_others():
    value_N, user_N = clustered(np.random.default_rng(7), 20)
    nothing_N = np.full(len(value_N), np.nan)
    empty, full = intervals(UserSums.of([nothing_N, value_N], user_N, 25))
    assert np.isnan([empty.value, empty.low, empty.high]).all()
    assert full.low < full.value < full.high
    [none] = intervals(UserSums.of([np.array([])], np.array([], np.int64), 0))
    assert np.isnan(none.value)
    [nothing] = comparisons_of(np.array([np.nan]), np.full((9, 1), np.nan))
    assert not nothing.excludes_zero


def test_many_users_are_cheap():
    rng = np.random.default_rng(8)
    user_N = np.sort(rng.integers(100_000, size=500_000))
    columns = [rng.normal(size=len(user_N)) for _ in range(4)]
    started = time.process_time()
    intervals(UserSums.of(columns, user_N, 100_000), samples=200)
    assert time.process_time() - started < 10
