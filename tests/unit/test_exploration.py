"""The exploration bonus against its definition."""

import hashlib

import numpy as np
import pytest

from model.trends import snapshot_from_counts
from serving.exploration import propensity, uncertainty, uniform
from serving.ranking import Trend, ranked


def splitmix64(seed, position):
    """One number at a time, in Python's integers."""
    mask = 2**64 - 1
    z = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest())
    z = (z + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) / 2**53


def test_numbers_depend_on_seed_and_place_alone_and_fill_the_unit_interval():
    drawn = uniform("a", 20_000)
    assert drawn[:50].tolist() == [splitmix64("a", j) for j in range(50)]
    assert np.array_equal(uniform("a", 10), drawn[:10])
    assert drawn.min() >= 0 and drawn.max() < 1
    assert np.histogram(drawn, 10, (0, 1))[0] == pytest.approx(np.full(10, 2000), rel=0.1)
    assert abs(np.corrcoef(drawn, uniform("b", 20_000))[0, 1]) < 0.03


def test_uncertainty_falls_like_the_root_of_the_count():
    counts = np.array([99, 24, 3, 0])
    trend = snapshot_from_counts(
        ["a", "b", "c", "d"], counts, num_items=6, smoothing=0.5, as_of=0, window_seconds=0
    )
    sigma = uncertainty(trend, ["d", "c", "b", "a", "never seen"])
    expected = [1.0, *np.sqrt(0.5 / (counts[[2, 1, 0]] + 0.5)), 1.0]
    assert sigma == pytest.approx(expected)


ITEMS, K = [f"i{j:02}" for j in range(12)], 3


def answered(base_M, limit_M, uniform_M):
    """Items that come with these draws, and their propensities."""
    bonus_M = limit_M * uniform_M
    results, _ = ranked(ITEMS, base_M + bonus_M, Trend.uniform(), 1.0, K, bonus_M, limit_M)
    return {r.item_id: r.propensity for r in results}


def test_a_propensity_is_how_often_the_item_comes_when_only_its_own_draw_changes():
    rng = np.random.default_rng(0)
    chances = []
    for _ in range(20):
        base_M, limit_M = rng.normal(0, 1, len(ITEMS)), rng.uniform(0, 3, len(ITEMS))
        uniform_M = rng.random(len(ITEMS))
        for item, came in answered(base_M, limit_M, uniform_M).items():
            j, others = ITEMS.index(item), uniform_M.copy()
            often = 0
            for others[j] in (np.arange(200) + 0.5) / 200:
                often += item in answered(base_M, limit_M, others)
            assert came == pytest.approx(often / 200, abs=0.006)
            chances.append(came)
    assert min(chances) < 0.7 and max(chances) == 1.0


def test_rewards_weighted_by_propensity_are_unbiased_where_plain_means_are_not():
    """Item 0 is liked the more the better it scores, and so it is shown: its mean looks better."""
    rng = np.random.default_rng(1)
    limit_M = np.full(len(ITEMS), 0.5)
    limit_M[0] = 8.0
    liked, shown, weighted = [], [], []
    for _ in range(4000):
        base_M = rng.normal(0, 1, len(ITEMS))
        reward = 1 / (1 + np.exp(-2 * base_M[0]))
        came = answered(base_M, limit_M, rng.random(len(ITEMS))).get(ITEMS[0])
        liked.append(reward)
        weighted.append(0.0 if came is None else reward / came)
        if came is not None:
            shown.append(reward)
    truth = np.mean(liked)
    assert np.mean(shown) > truth + 0.03
    error = np.std(weighted) / np.sqrt(len(weighted))
    assert abs(np.mean(weighted) - truth) < 4 * error < 0.05


def test_what_has_no_room_to_rise_comes_surely_or_not_at_all():
    assert propensity(2.0, 0.0, 1.0) == propensity(2.0, 5.0, 1.0) == 1.0
    assert propensity(0.0, 4.0, 1.0) == 0.75
    assert 0 < propensity(0.0, 1.0, 1.0) < 1e-9, "rounding: it did come"
