"""Kept states, where a reading begins, and what is remembered for the next model."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model import states
from model.query import History, Query
from model.states import States, beginning

STATE = np.zeros(4, np.float32)


@given(st.integers(0, 400), st.integers(0, 2**31))
def test_a_reading_begins_in_the_first_quarter(length, seed):
    rng = np.random.default_rng(seed)
    time_L = 10**9 + np.cumsum(rng.integers(0, 10**5, length))
    key_L = rng.integers(-(2**62), 2**62, length)
    first = beginning(time_L, key_L)
    assert 0 <= first <= length // 4
    assert length >= states.WHOLE or first == 0


@given(st.sampled_from(["seconds", "days", "equal"]), st.integers(0, 2**31))
def test_it_stays_the_same_event_while_the_history_slides(gaps, seed):
    rng = np.random.default_rng(seed)
    gap = {
        "seconds": rng.integers(1, 60, 600),
        "days": np.full(600, 86_400),
        "equal": np.zeros(600),
    }
    time_E = 10**9 + np.cumsum(gap[gaps]).astype(np.int64)
    key_E = rng.integers(0, 1000, 600)
    begins = [
        end - 100 + beginning(time_E[end - 100 : end], key_E[end - 100 : end])
        for end in range(100, 600)
    ]
    assert np.all(np.diff(begins) >= 0) or gaps == "equal"
    changes = np.count_nonzero(np.diff(begins))
    # Two of 27 windows by chance; an arithmetic progression of times repeats its own pattern.
    assert changes < 500 / 4


def query(length, user=None, at=0.0, text="i"):
    message = np.arange(10_000.0)  # whatever the columns were cut from
    events = History(
        [f"{text}{k}" for k in range(length)], message[:length], None, message[:length]
    )
    return Query(events, at, user or {})


def test_what_is_remembered_is_bounded_in_bytes_and_holds_no_message():
    kept = States(1000, recent_bytes=50_000)
    for user in range(1000):
        kept.keep(user.to_bytes(2), STATE, query(1 + user % 50, {"age": 3.0, "name": "x" * 3900}))
        assert kept._size <= 50_000
        assert kept._size == sum(one.size for one in kept._recent.values())
    recent = kept.recent()
    assert 1 < len(recent) < 50
    assert len(recent[0].query.history) == 50, "newest first"
    assert all(one.query.history.time_L.base is None for one in recent)
    assert recent[0].query.user == {}, "no field is read"
    kept.keep(b"short", STATE, query(1, {"name": "x" * 3000}), ["name"])
    assert kept.recent()[0].query.user == {"name": "x" * 3000}
    for huge in ("x" * 4001, ["x" * 99] * 40):
        kept.keep(b"huge", STATE, query(1, {"name": huge}), ["name"])
        assert kept.get(b"huge") is not None
        assert kept.recent()[0].query.user == {"name": "x" * 3000}
    kept.keep(b"long", STATE, query(300))
    assert kept.recent()[0].query.history.item_ids == [f"i{k}" for k in range(100, 300)]


def test_what_is_remembered_is_forgotten_after_some_minutes():
    now = [1000.0]
    kept = States(1000, clock=lambda: now[0])
    kept.keep(b"a", STATE, query(1))
    now[0] += 400
    kept.keep(b"b", STATE, query(2))
    kept.keep(b"taken over", STATE, query(3), at=now[0] - 500)
    assert [len(one.query.history) for one in kept.recent()] == [2, 1, 3]
    now[0] += 101
    assert [len(one.query.history) for one in kept.recent()] == [2, 1]
    kept.keep(b"a", STATE, query(1))  # asked for again
    now[0] += 500
    assert [one.at for one in kept.recent()] == [now[0] - 500]
    now[0] += 100
    kept.forget_old()
    assert kept._size == 0 and not kept._recent
    assert kept.recent() == []
    assert kept.get(b"a") is not None, "states say nothing of what was read"


def test_what_was_read_before_comes_behind_what_is_read():
    kept = States(3)
    kept.keep(b"now", STATE, query(1))
    for n, at in enumerate((-1.0, -2.0, -3.0)):  # newest first
        kept.keep(bytes([n]), STATE + n, query(1), at=at)
    assert [kept.get(bytes([n])) is not None for n in range(3)] == [True, True, False]
    kept.keep(b"one more", STATE, query(1))
    assert kept.get(b"now") is None, "they were asked for since"
