"""Protocols: nothing of the test is in the training, and every event is somewhere."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from model.sequences import Histories
from model.splits import (
    Cases,
    SplitSettings,
    UserSplit,
    events_before,
    last_events,
    later_events,
    leave_one_out,
    split_cold_items,
    split_time,
    split_users,
)
from tests import synthetic

ITEMS = 6


@st.composite
def logs(draw, min_length=1):
    """Up to six users with ties in time; event numbers in `value_E` say who is who."""
    events = st.tuples(st.integers(0, ITEMS - 1), st.integers(0, 12))
    users = draw(st.lists(st.lists(events, min_size=min_length, max_size=8), min_size=1))
    users = [sorted(user, key=lambda event: event[1]) for user in users]
    return numbered([[i for i, _ in user] for user in users], [[t for _, t in u] for u in users])


def numbered(items, times):
    log = synthetic.histories(items, times)
    return Histories(
        log.user_ids,
        log.item_E,
        log.timestamp_E,
        log.offset_U1,
        value_E=np.arange(log.num_events, dtype=np.float64),
    )


def numbers(log):
    return log.value_E.astype(int).tolist()


def by_user(log):
    return {
        user: numbers(log)[log.offset_U1[u] : log.offset_U1[u + 1]]
        for u, user in enumerate(log.user_ids)
    }


def case_numbers(cases):
    return [numbers(cases.histories)[e] for e in cases.event_N]


@given(logs())
def test_leave_one_out_against_a_loop(log):
    own = by_user(log)
    if not any(len(events) >= 3 for events in own.values()):
        with pytest.raises(InputError):
            leave_one_out(log)
        return
    split = leave_one_out(log)
    assert by_user(split.train) == {u: e[:-2] if len(e) >= 3 else e for u, e in own.items()}
    readers = {u: e for u, e in own.items() if len(e) >= 3}
    assert by_user(split.valid.histories) == {u: e[:-1] for u, e in readers.items()}
    assert by_user(split.test.histories) == readers
    assert case_numbers(split.valid) == [e[-2] for e in readers.values()]
    assert case_numbers(split.test) == [e[-1] for e in readers.values()]
    parts = numbers(split.train) + case_numbers(split.valid) + case_numbers(split.test)
    assert sorted(parts) == numbers(log)


@given(logs(), st.sampled_from([0.3, 0.5, 0.7, 0.9]), st.sampled_from([None, 1, 3]))
def test_temporal_split_leaks_nothing_and_loses_nothing(log, share, frame):
    try:
        split = split_time(log, share, frame)
    except InputError:
        first = log.timestamp_E == log.timestamp_E.min()
        assert log.num_events < 2 or first.sum() > int(share * log.num_events)
        return
    read = case_numbers(split.test)
    assert sorted(numbers(split.train) + read) == numbers(log)
    assert split.train.timestamp_E.max() < split.cut
    assert (log.timestamp_E[read] >= split.cut).all()
    assert split.train.num_events <= share * log.num_events
    # Test users come whole, so that every case has all of the user's earlier events.
    own = by_user(log)
    assert all(own[u] == e for u, e in by_user(split.test.histories).items())
    framed = [e for f in split.frames for e in f.cases.event_N]
    assert sorted(framed) == split.test.event_N.tolist()
    for f in split.frames:
        time = f.cases.histories.timestamp_E[f.cases.event_N]
        assert f.start <= time.min() <= time.max() < f.end
        assert frame is None or f.end - f.start == frame
        assert len(np.intersect1d(numbers(events_before(log, f.start)), case_numbers(f.cases))) == 0


def test_temporal_split_refuses_what_makes_no_sense():
    log = synthetic.successor(5, 4, 7, seed=0)
    for arguments in ((0.0,), (1.0,), (0.7, 0)):
        with pytest.raises(InputError):
            split_time(log, *arguments)


@given(logs(), logs(), st.integers(0, 3))
def test_cold_items_against_a_loop(train, test, seed):
    split = split_cold_items(UserSplit(train, train, test), ITEMS, seed=seed)
    held = set(split.item_J.tolist())
    assert len(held) == ITEMS // 2
    for part in (split.train, split.valid):
        assert not held & set(part.item_E.tolist())
        assert numbers(part) == [e for e in numbers(train) if train.item_E[e] not in held]
    expected = []
    for events in by_user(test).values():
        cold = [e for e in events if test.item_E[e] in held]
        if cold:
            kept = [e for e in events if test.item_E[e] not in held]
            expected.append((kept, cold))
    log = split.cases.histories
    assert list(by_user(log).values()) == [[*kept, cold[0]] for kept, cold in expected]
    assert split.cases.event_N.tolist() == (log.offset_U1[1:] - 1).tolist()
    relevant_NJ = split.relevant(np.arange(len(expected)))
    for n, (kept, cold) in enumerate(expected):
        chosen = {int(j) for j in split.item_J[relevant_NJ[n]]}
        assert chosen == {int(test.item_E[e]) for e in cold}
        asked_at = log.timestamp_E[split.cases.event_N[n]]
        assert asked_at == max(test.timestamp_E[e] for e in [*kept, cold[0]])


def test_cold_items_depend_on_the_seed_alone():
    users = split_users(synthetic.successor(20, 6, 40, seed=1), SplitSettings())
    one, same = split_cold_items(users, 40, seed=1), split_cold_items(users, 40, seed=1)
    other = split_cold_items(users, 40, seed=2)
    assert one.item_J.tolist() == same.item_J.tolist() != other.item_J.tolist()
    with pytest.raises(InputError):
        split_cold_items(users, 40, share=1.0)


@given(logs(), st.data())
def test_trimmed_cases_keep_exactly_what_comes_before(log, data):
    picked = data.draw(st.sets(st.integers(0, log.num_events - 1), min_size=1))
    cases = Cases(log, np.array(sorted(picked)))
    trimmed = cases.trimmed()
    assert case_numbers(trimmed) == sorted(picked)
    own = by_user(log)
    assert by_user(trimmed.histories) == {
        user: [e for e in events if e <= max(set(events) & picked)]
        for user, events in own.items()
        if set(events) & picked
    }


def test_users_without_events_have_no_last_and_no_later_ones():
    log = numbered([[], [1, 2], [], [3], []], [[], [1, 2], [], [3], []])
    assert last_events(log).tolist() == [1, 2]
    assert later_events(log).tolist() == [1]


def test_user_split_is_the_published_one():
    """Pinned: figures of different versions can be compared only on the same users."""
    log = synthetic.successor(50, 6, 10, seed=2)
    split = split_users(log, SplitSettings())
    order = np.random.RandomState(0).permutation(50)
    ids = np.sort(np.array(log.user_ids))  # not all numbers: sorted as text
    assert list(split.test.user_ids) == ids[np.sort(order[:10])].tolist()
    assert list(split.valid.user_ids) == ids[np.sort(order[10:14])].tolist()
    assert list(split.train.user_ids) == ids[np.sort(order[14:])].tolist()


def test_users_can_be_ordered_as_text():
    ids = tuple(str(u) for u in range(1, 13))
    log = replace(synthetic.histories([[0] * 5] * 12, [list(range(5))] * 12), user_ids=ids)
    order = np.random.RandomState(0).permutation(12)
    for as_text, ordered in ((False, ids), (True, tuple(sorted(ids)))):
        split = split_users(log, SplitSettings(), as_text=as_text)
        assert set(split.test.user_ids) == {ordered[u] for u in order[:2]}


def test_by_hash_users_of_few_events_are_trained_on_and_not_tested_on():
    """In a shop they may be nearly all; those of the other sides stay out, as they may grow."""
    lengths = np.arange(600) % 8  # 0 to 7 events
    log = numbered([[1] * n for n in lengths], [list(range(n)) for n in lengths])
    by_hash = SplitSettings(assign="hash", min_events=5)
    split = split_users(log, by_hash)
    assert min(map(len, (split.train, split.valid, split.test))) > 20

    def length(part: Histories) -> set[int]:
        return set(np.diff(part.offset_U1).tolist())

    assert length(split.train) == {2, 3, 4, 5, 6, 7}
    assert length(split.valid) == length(split.test) == {5, 6, 7}
    # Everybody's side is the one that he has among users of any length.
    whole = split_users(log, SplitSettings(assign="hash", min_events=2))
    assert set(split.train.user_ids) == set(whole.train.user_ids)
    assert set(split.test.user_ids) < set(whole.test.user_ids)
    assert set(split.valid.user_ids) < set(whole.valid.user_ids)
    # The published split has room for them nowhere.
    published = split_users(log, SplitSettings(min_events=5))
    assert length(published.train) == {5, 6, 7}


@pytest.mark.parametrize("long_users", [1, 2, 5])
def test_by_hash_few_long_users_take_no_side_from_the_others(long_users):
    lengths = [7] * long_users + [3] * 500
    log = numbered([[1] * n for n in lengths], [list(range(n)) for n in lengths])
    whole = numbered([[1] * 3] * len(lengths), [list(range(3))] * len(lengths))
    split = split_users(log, SplitSettings(assign="hash", min_events=5))
    alone = split_users(whole, SplitSettings(assign="hash", min_events=2))
    short = set(log.user_ids[long_users:])
    assert set(split.train.user_ids) & short == set(alone.train.user_ids) & short
    assert len(split.test) >= 1


@pytest.mark.parametrize("users", [3, 10, 400])
def test_by_hash_users_keep_their_side_when_others_join(users):
    log = synthetic.successor(2 * users, 6, 10, seed=0)
    settings = SplitSettings(assign="hash")
    before, after = split_users(log.subset(np.arange(users)), settings), split_users(log, settings)
    for part in ("train", "valid", "test"):
        assert len(getattr(before, part)) >= (0 if part == "train" else 1)
    sides = [set(before.train.user_ids), set(before.valid.user_ids), set(before.test.user_ids)]
    assert len(set.union(*sides)) == users == sum(map(len, sides))
    if users == 400:  # with few users, the nearest fill a side that would be empty
        assert set(before.test.user_ids) <= set(after.test.user_ids)
        assert set(before.train.user_ids) <= set(after.train.user_ids)
        assert len(before.test) / users == pytest.approx(0.2, abs=0.06)
        other = split_users(log, SplitSettings(assign="hash", seed=1))
        assert other.test.user_ids != after.test.user_ids
