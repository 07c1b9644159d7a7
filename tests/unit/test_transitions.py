"""Transition counts equal a plain loop; cross-fitted ones never count a user's own pairs."""

from collections import defaultdict
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import columns
from model import transitions as transitions_module
from model.transitions import DAMPING, TransitionPrior, Transitions, again_share
from tests import synthetic

M = 6
LOGS = st.lists(st.lists(st.integers(0, M - 1), min_size=1, max_size=15), min_size=2, max_size=6)


def _log(users):
    return synthetic.histories(users, [list(range(len(u))) for u in users])


def _brute(users):
    counts = defaultdict(Fraction)
    for user in users:
        for k, item in enumerate(user):
            for lag in range(1, 11):
                if k - lag >= 0:
                    counts[user[k - lag], item] += Fraction(1, lag)
    return counts


def _dense(transitions, rows):
    return torch.cat([transitions.scatter(torch.tensor([[r]]), torch.ones(1)) for r in rows])


def _plain(users, followers, again=0.0):
    """The rows of the counts as a loop makes them: [(items, probabilities)] by item."""
    brute = _brute(users)
    rows = []
    for i in range(M):
        total = sum(c for (a, _), c in brute.items() if a == i)
        follows = {j: c for (a, j), c in brute.items() if a == i}
        if again:
            follows[i] = follows.get(i, 0) + Fraction(DAMPING) * Fraction(again)
        found = sorted((-c, j) for j, c in follows.items())[:followers]
        chosen = sorted((j, -c) for c, j in found)
        rows.append(([j for j, _ in chosen], [float(c / (total + DAMPING)) for _, c in chosen]))
    return rows


def _rows(transitions, folds=1):
    offset = transitions.offset_R1.tolist()
    assert len(offset) == folds * M + 1
    spans = [slice(*span) for span in pairwise(offset)]
    return [(transitions.item_Z[s].tolist(), transitions.probability_Z[s].tolist()) for s in spans]


@settings(max_examples=100, deadline=None)
@given(
    LOGS,
    st.sampled_from([1, 2, 50]),
    st.sampled_from([1, 3, 7, 2**19]),
    st.sampled_from([0.0, 0.25, 1.0]),
)
def test_counts_equal_a_loop_however_few_events_are_counted_at_once(
    users, followers, events, again
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transitions_module, "RANGE_EVENTS", events)
        fold = np.arange(len(users)) % 2
        whole, cross = Transitions.fitted(_log(users), M, fold, 2, followers, again)
        alone = Transitions.count(_log(users), M, followers)
    wanted = _plain(users, followers, again)
    others = [
        _plain([u for u, f in zip(users, fold, strict=True) if f != k], followers, again)
        for k in (0, 1)
    ]
    counted = _plain(users, followers)
    for got, rows in ((whole, wanted), (alone, counted), (cross, others[0] + others[1])):
        for (items, probability), (wanted_items, wanted_probability) in zip(
            _rows(got, len(rows) // M), rows, strict=True
        ):
            assert items == wanted_items
            assert probability == pytest.approx(wanted_probability, rel=1e-6)


@given(LOGS, st.sampled_from([1, 3, 2**22]))
def test_how_much_comes_again_equals_a_loop(users, events):
    brute = _brute(users)
    same = sum(c for (i, j), c in brute.items() if i == j)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transitions_module, "AGAIN_EVENTS", events)
        share = again_share(_log(users))
    assert share == pytest.approx(float(same / max(sum(brute.values()), Fraction(1, 10))))


def test_where_items_come_again_one_of_which_nothing_is_known_does_too():
    """A home is visited again and again, and by nobody else: others' counts say nothing of it."""
    log = _log([[0, 0, 1, 0], [1, 1, 2, 2]])
    whole, _ = Transitions.fitted(log, M, None, 1, again=again_share(log))
    unknown = _dense(whole, [5])[0]
    assert unknown.tolist() == pytest.approx([0, 0, 0, 0, 0, again_share(log)])
    never = _log([[0, 1, 2], [2, 1, 0]])
    assert again_share(never) == 0.0
    assert _rows(Transitions.fitted(never, M, None, 1, again=0.0)[0])[5] == ([], [])


def test_a_growing_column_is_in_a_file_once_it_is_long(monkeypatch):
    monkeypatch.setattr(columns, "FILE_EVENTS", 6)
    for pieces, in_file in (
        ([], False),
        ([[1, 2], [3]], False),
        ([[1, 2], [3], [4, 5, 6], [7]], True),
    ):
        column = columns.GrowingColumn(np.int32)
        for piece in pieces:
            column.extend(np.array(piece))
        whole = column.finish()
        assert isinstance(whole, np.memmap) == in_file
        assert whole.dtype == np.int32
        assert whole.tolist() == [value for piece in pieces for value in piece]


def test_long_counts_are_in_files_and_the_same(monkeypatch):
    log = _log([[0, 1, 2, 3], [3, 1, 0, 5], [2, 2, 4]])
    fold = np.array([0, 1, 0])
    wanted = Transitions.fitted(log, M, fold, 2)
    monkeypatch.setattr(columns, "FILE_EVENTS", 3)
    monkeypatch.setattr(columns, "READ_EVENTS", 2)
    for got, same in zip(Transitions.fitted(log, M, fold, 2), wanted, strict=True):
        for name, tensor in got.tensors().items():
            assert torch.equal(tensor, same.tensors()[name])


def test_scatter_sums_the_rows_by_weight_and_skips_missing_items():
    transitions = Transitions.count(_log([[0, 1, 2, 3], [3, 1, 0]]), M)
    rows = torch.tensor([[0, 3, -1], [-1, -1, -1], [5, 0, 0]])
    dense = _dense(transitions, range(M))
    wanted = [0.5 * dense[0] + 0.3 * dense[3], 0 * dense[0], 0.5 * dense[5] + 0.5 * dense[0]]
    got = transitions.scatter(rows, torch.tensor([0.5, 0.3, 0.2]))
    torch.testing.assert_close(got, torch.stack(wanted))


def test_only_the_most_frequent_followers_are_kept():
    transitions = Transitions.count(_log([[0, 1], [0, 1], [0, 2]]), M, followers=1)
    assert transitions.item_Z[: int(transitions.offset_R1[1])].tolist() == [1]


def test_the_prior_turns_popularity_into_the_mixture_of_the_counts():
    transitions = Transitions.count(_log([[0, 1, 2], [0, 1, 3], [2, 1]]), M)
    p = torch.softmax(torch.randn(M), 0)
    prior, epsilon = TransitionPrior(M), 0.3
    prior.inverse_p_M = 1.0 / p
    with torch.no_grad():
        prior.log_gamma.fill_(0.0)
        prior.log_kappa.fill_(float(np.log((1 - epsilon) / epsilon)))
        recent = torch.tensor([[1, 0] + [-1] * 8])
        got = (p.log() + prior(transitions, recent)).exp() * epsilon
        followed = transitions.scatter(recent, prior.alpha_R)
    torch.testing.assert_close(got, epsilon * p + (1 - epsilon) * followed)


def test_foreign_arrays_are_refused():
    tensors = Transitions.count(_log([[0, 1, 2]]), M).tensors()
    assert Transitions.from_tensors(tensors, M).num_items == M
    with pytest.raises(ValueError, match="do not fit"):
        Transitions.from_tensors(tensors, M + 1)
    with pytest.raises(ValueError, match="do not fit"):
        Transitions.from_tensors(tensors | {"item": tensors["item"] + M}, M)


def test_some_columns_and_single_items_equal_the_dense_lookup():
    transitions = Transitions.count(_log([[0, 1, 2, 3], [3, 1, 0, 5]]), M)
    rows = torch.tensor([[0, 3, -1], [-1, -1, -1], [5, 0, 1]])
    weight = torch.rand(3)
    dense = transitions.scatter(rows, weight)
    columns, single = torch.tensor([0, 2, 5]), torch.tensor([2, 1, 5])
    torch.testing.assert_close(transitions.scatter(rows, weight, columns), dense[:, columns])
    torch.testing.assert_close(transitions.at(rows, weight, single), dense[range(3), single])


@settings(max_examples=50, deadline=None)
@given(LOGS, st.lists(st.lists(st.integers(-1, M - 1), min_size=10, max_size=10), max_size=4))
def test_the_sparse_bonus_is_the_dense_one(users, recent):
    transitions, prior = Transitions.count(_log(users), M), TransitionPrior(M)
    prior.inverse_p_M.copy_(torch.arange(1.0, M + 1))
    recent_BR = np.array(recent, dtype=np.int64).reshape(-1, 10)
    with torch.no_grad():
        dense_BM = prior(transitions, torch.from_numpy(recent_BR)).numpy()
    key_S, bonus_S = prior.sparse(transitions, recent_BR)
    assert (np.diff(key_S) > 0).all()
    sparse_BM = np.zeros(dense_BM.shape)
    sparse_BM.ravel()[key_S] = bonus_S
    np.testing.assert_allclose(sparse_BM, dense_BM, atol=1e-6)
