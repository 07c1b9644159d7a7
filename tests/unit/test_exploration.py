"""The exploration bonus against its definition."""

import hashlib

import numpy as np
import pytest

from model.trends import snapshot_from_counts
from serving.exploration import uncertainty, uniform


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
