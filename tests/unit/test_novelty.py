"""How much of what is chosen is new."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.novelty import new_item_share
from tests import synthetic


def _log(item_E, time_E):
    return synthetic.histories([list(item_E)], [sorted(time_E)])


def test_extremes():
    assert new_item_share(_log([0] * 100, range(100))) == 0.0
    assert new_item_share(_log(range(100), range(100))) == 1.0
    assert new_item_share(_log([0] * 95 + [1] * 5, range(100))) == 0.5  # of the last ten
    assert new_item_share(_log([0, 1, 2], [5, 5, 5])) == 0.0  # no time passes


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 50)), min_size=1, max_size=60))
def test_is_what_counting_says(events):
    times = sorted(t for _, t in events)
    items = [i for i, _ in events]
    cut = times[int(0.9 * len(times))]
    before = {i for i, t in zip(items, times, strict=True) if t < cut}
    tail = [i not in before for i, t in zip(items, times, strict=True) if t >= cut]
    wanted = 0.0 if len(tail) == len(times) else float(np.mean(tail))
    assert new_item_share(_log(items, times)) == wanted
