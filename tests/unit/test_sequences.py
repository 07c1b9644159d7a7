"""BPTT batches hold every position once, in order, without padding."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.catalogue import Catalogue
from model.sequences import Histories, bptt_batches, pack
from model.shown import Shown
from tests import synthetic


def _log(lengths):
    return synthetic.histories([list(range(n)) for n in lengths], [list(range(n)) for n in lengths])


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=15),
    bptt=st.integers(1, 12),
    budget=st.integers(1, 60),
    seed=st.none() | st.integers(0, 5),
)
def test_every_position_once_and_state_follows_the_user(lengths, bptt, budget, seed):
    log = _log(lengths)
    rng = None if seed is None else np.random.default_rng(seed)
    seen, owners_before = [], np.array([], int)
    user_E = np.repeat(np.arange(len(log)), np.diff(log.offset_U1))
    ends_before = np.array([], int)
    for batch in bptt_batches(log, bptt=bptt, batch_events=budget, rng=rng):
        assert batch.batch_size_T.sum() == len(batch.event_N)
        assert (np.diff(batch.batch_size_T) <= 0).all()
        assert len(batch.batch_size_T) <= bptt
        first_S = batch.event_N[: batch.batch_size_T[0]]
        last_S = batch.event_N[batch.last_S]
        owners = user_E[first_S]
        assert (owners == user_E[last_S]).all()
        for s, previous in enumerate(batch.previous_S):
            if previous < 0:
                assert first_S[s] == log.offset_U1[owners[s]]
            else:
                assert owners_before[previous] == owners[s]
                assert first_S[s] == ends_before[previous] + 1
        owners_before, ends_before = owners, last_S
        seen.extend(batch.event_N.tolist())
    assert sorted(seen) == list(range(log.num_events))


def test_pack_is_time_major():
    batch = pack(np.array([10, 20]), np.array([3, 1]))
    assert batch.event_N.tolist() == [10, 20, 11, 12]
    assert batch.batch_size_T.tolist() == [2, 1, 1]
    assert batch.last_S.tolist() == [3, 1]


def test_subset_keeps_events_of_chosen_users_in_order():
    log = _log([2, 3, 1])
    part = log.subset(np.array([2, 1]))
    assert part.user_ids == ("u2", "u1")
    assert part.item_E.tolist() == [0, 0, 1, 2]
    assert part.offset_U1.tolist() == [0, 1, 4]


def test_from_table_drops_short_histories(tmp_path):
    log = synthetic.histories([[0, 1, 2], [1], [2, 0]], [[1, 2, 3], [5], [7, 7]])
    clean = synthetic.clean_tables(tmp_path, log, genres=False)
    catalogue = Catalogue(("i000", "i001", "i002"))
    read = Histories.from_table(clean / "interactions.parquet", catalogue, min_events=2)
    assert read.user_ids == ("u0", "u2")
    assert read.item_E.tolist() == [0, 1, 2, 2, 0]
    assert read.timestamp_E.tolist() == [1, 2, 3, 7, 7]


def test_event_columns_follow_their_events():
    log = synthetic.histories([[0, 1, 2], [3, 4]], [[1, 2, 3], [4, 5]])
    log = replace(
        log,
        value_E=np.arange(5.0),
        event_type_E=np.array(list("abcde"), dtype=object),
        context_fields={"device": np.array(list("vwxyz"), dtype=object)},
        shown=Shown(np.array([7, 8, 9, 7], np.int32), np.array([0, 1, 1, 2, 4, 4])),
    )
    swapped = log.subset(np.array([1, 0]))
    assert swapped.value_E.tolist() == [3, 4, 0, 1, 2]
    assert "".join(swapped.event_type_E) == "deabc"
    assert "".join(swapped.context_fields["device"]) == "yzvwx"
    some = log.where(np.array([False, True, True, False, False]))
    assert some.item_E.tolist() == [1, 2] and some.offset_U1.tolist() == [0, 2, 2]
    assert log.reordered(np.array([1, 0, 2, 3, 4])).item_E.tolist() == [1, 0, 2, 3, 4]
    assert log.user_E.tolist() == [0, 0, 0, 1, 1]
    assert _lists(swapped) == [[9, 7], [], [7], [], [8]]
    assert _lists(some) == [[], [8]]
    assert _lists(log.reordered(np.array([1, 0, 2, 3, 4]))) == [[], [7], [8], [9, 7], []]
    smaller = np.arange(10) - 1
    smaller[[1, 8]] = -1  # one that was chosen and one that was only shown
    assert _lists(log.with_items(np.where(np.arange(10) == 0, 9, smaller))) == [[6], [], [8, 6], []]


def _lists(log):
    return [log.shown.of(np.array([e]))[0].tolist() for e in range(log.num_events)]
