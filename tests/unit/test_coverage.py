"""What is served is counted as exactly as is claimed, in bounded memory."""

import numpy as np
import pytest
from prometheus_client import REGISTRY

from model.trends import snapshot_from_counts
from serving.coverage import Coverage, DistinctCounter
from serving.ranking import Trend


@pytest.mark.parametrize("distinct", [0, 1, 100, 50_000])
def test_distinct_items_are_estimated_within_a_percent(distinct):
    counter = DistinctCounter()
    for _ in range(2):  # again and again the same
        counter.add(f"item {j}" for j in range(distinct))
    assert counter.estimate() == pytest.approx(distinct, rel=0.01, abs=0.1)


def test_a_full_counter_stays_finite():
    counter = DistinctCounter(cells=8)
    counter.add(map(str, range(1000)))
    assert np.isfinite(counter.estimate())


def value(name):
    return REGISTRY.get_sample_value(name) or 0.0


def test_share_of_the_catalogue_and_rank_of_what_is_served():
    ids = [f"i{j:03}" for j in range(100)]
    trend = Trend.of(
        snapshot_from_counts(
            ids[:50], np.arange(50, 0, -1), num_items=100, smoothing=1, as_of=0, window_seconds=0
        )
    )
    now = [0.0]
    coverage = Coverage(10.0, lambda: now[0])
    before = value("hrnn_served_trend_rank_sum"), value("hrnn_served_trend_rank_count")
    coverage.served(ids[:20], trend)  # places 0 to 19
    coverage.served(ids[90:], trend)  # not listed
    coverage.served([], trend)
    after = value("hrnn_served_trend_rank_sum"), value("hrnn_served_trend_rank_count")
    assert np.subtract(after, before) == pytest.approx([0.095 + 0.5, 2])
    now[0] = 10.0
    coverage.served(ids[:1], trend)
    assert value("hrnn_served_coverage") == pytest.approx(0.3, rel=0.01)
    now[0] = 20.0
    coverage.served(ids[:1], trend)
    assert value("hrnn_served_coverage") == pytest.approx(0.01, rel=0.02), "another window"
