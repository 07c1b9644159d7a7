"""Simultaneous events: is their stored order signal or noise?"""

import numpy as np
import pytest

from model.sequences import Histories
from model.ties import shuffled_ties, stored_order_matters


def histories(item_UT: np.ndarray, same_second: int) -> Histories:
    """Users with `same_second` events in every second."""
    users, length = item_UT.shape
    return Histories(
        user_ids=tuple(str(u) for u in range(users)),
        item_E=item_UT.ravel().astype(np.int64),
        timestamp_E=np.tile(np.arange(length) // same_second, users).astype(np.int64),
        offset_U1=np.arange(0, users * length + 1, length, dtype=np.int64),
    )


def chain(users: int, length: int, items: int, rng: np.random.Generator) -> np.ndarray:
    """Every user walks through the items in their order."""
    return (rng.integers(items, size=(users, 1)) + np.arange(length)) % items


def test_a_true_order_is_recognised() -> None:
    rng = np.random.default_rng(0)
    assert stored_order_matters(histories(chain(60, 20, 10, rng), same_second=4))


@pytest.mark.parametrize("seed", range(5))
def test_an_arbitrary_order_is_recognised(seed: int) -> None:
    rng = np.random.default_rng(seed)
    log = histories(chain(60, 20, 10, rng), same_second=4)
    assert not stored_order_matters(log.reordered(shuffled_ties(log, rng)))


def test_an_order_by_id_matters() -> None:
    """Sorted by item within a second: foreseeable, wherever the log is served from."""
    rng = np.random.default_rng(1)
    item_UT = np.sort(rng.integers(30, size=(200, 5, 4)), axis=2).reshape(200, 20)
    assert stored_order_matters(histories(item_UT, same_second=4))


@pytest.mark.parametrize("users", [1, 2, 60])
def test_without_simultaneous_events_there_is_nothing_to_find(users: int) -> None:
    rng = np.random.default_rng(2)
    assert not stored_order_matters(histories(chain(users, 20, 10, rng), same_second=1))


def test_only_simultaneous_events_change_places() -> None:
    rng = np.random.default_rng(3)
    log = histories(chain(5, 20, 10, rng), same_second=4)
    order_E = shuffled_ties(log, rng)
    assert sorted(order_E) == list(range(log.num_events))
    assert (order_E // 4 == np.arange(log.num_events) // 4).all()
    assert (order_E != np.arange(log.num_events)).any()
